"""Weak scaling: examples per second on 1 and on P processes, each with as many examples.

    python benchmarks/training/scaling.py --processes 2 --batch 128 --steps 30

Every process has one thread, so that P cores are compared with one. The efficiency is the rate on
P over P times the rate on one. No more can be had than the cores allow: of P trainings at once
that share nothing each is slower than one alone, and all wait for the slowest where they share a
step. What is lost beyond that is the message and the waiting of each step.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from nelbo import data
from nelbo._utils.distributed import gather, process_group
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer


def measure(batch: int, steps: int, dropout: float) -> None:
    """Print the examples per second of all processes together, the median over the steps."""
    torch.set_num_threads(1)
    with process_group() as rank:
        dataset = data.load("digits")
        processes = len(gather(0))
        options = {"batch": batch * processes, "dropout": dropout}
        learner = Trainer(*configure(dataset.schema, 1000, **options), dataset)
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            learner.step()
            seconds.append(max(gather(time.perf_counter() - begun)))
        if rank == 0:
            print(json.dumps(batch * processes / sorted(seconds)[steps // 2]))


def main() -> None:
    """The rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--measure", action="store_true", help="what each process does")
    given = parser.parse_args()
    if given.measure:
        measure(given.batch, given.steps, given.dropout)
        return
    shared = [f"--{k}={getattr(given, k)}" for k in ("batch", "steps", "dropout")]

    def start(processes: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, "--measure", *shared]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def rate(started: subprocess.Popen[str]) -> float:
        out, _ = started.communicate(timeout=3600)
        if started.returncode:
            sys.exit(f"a training ended with exit code {started.returncode}")
        return float(out.splitlines()[-1])

    p = given.processes
    one = rate(start(1))
    print(f"1 process: {one:.1f} examples/s")
    apart = p * min([rate(each) for each in [start(1) for _ in range(p)]])
    print(f"{p} that share nothing, {p} times the slowest: {apart:.1f}, {apart / one / p:.3f}")
    together = rate(start(p))
    print(f"{p} together: {together:.1f}, efficiency {together / one / p:.3f}")
    print(f"of what the cores allow: {together / apart:.3f}")


if __name__ == "__main__":
    main()
