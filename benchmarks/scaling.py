"""Weak scaling: examples per second on 1 and on P processes, each with as many examples.

    python benchmarks/scaling.py --processes 2 --batch 128 --steps 30

Every process has one thread, so that P cores are compared with one. The efficiency is the rate on
P over P times the rate on one; with fewer idle cores than processes it says nothing.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from nelbo import data
from nelbo._processes import gather, together
from nelbo.config import configure
from nelbo.learner import Learner


def measure(batch: int, steps: int, dropout: float) -> None:
    """Prints the examples per second of all processes together, the median over the steps."""
    torch.set_num_threads(1)
    with together() as rank:
        dataset = data.load("digits")
        processes = len(gather(0))
        options = {"batch": batch * processes, "dropout": dropout}
        learner = Learner(*configure(dataset.schema, 1000, **options), dataset)
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
    rates = []
    for processes in (1, given.processes):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), __file__, "--measure"]
        command += [f"--{k}={getattr(given, k)}" for k in ("batch", "steps", "dropout")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
        rates.append(float(done.stdout.splitlines()[-1]))
        print(f"{processes} processes: {rates[-1]:.1f} examples/s")
    print(f"efficiency {rates[1] / rates[0] / given.processes:.3f}")


if __name__ == "__main__":
    main()
