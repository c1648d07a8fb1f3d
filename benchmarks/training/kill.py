"""Trainings killed by SIGKILL at random moments and resumed end as one that was left alone.

    python benchmarks/training/kill.py [--kills 25] [--seed 0] [--data digits rows]

`digits` takes most of its time in validations; `rows`, of three numbers of three levels, has a
checkpoint every second step. The disk is made slow, so that many kills are while it writes. A
training is resumed and killed until it ends; what it left is compared with what the one without a
kill left, and another begins, until there were enough kills. All tensors are compared by their
bits (weights, moving average, best, optimiser, times, learned γ), and all events and words but the
clock's; the weights, the configuration and the names of the files as they are. The order of the
data shows in all of them.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nelbo._utils import files, tensor_files
from nelbo.runs import config as run_config
from nelbo.runs import training_state
from nelbo.runs.train import resume, train

OPTIONS = {"steps": 200, "batch": 16, "width": 8, "depth": 1, "schedule": "learned-ends"}
EVERY = {"digits": 25, "rows": 2}  # steps from one checkpoint to the next
DISK = 0.02  # seconds, added to each sync


def live(source: str, out: Path, every: int) -> None:
    """In a process of its own: train or resume, as a user would."""
    torch.set_num_threads(1)
    sync = os.fsync

    def slow_sync(handle: int) -> None:
        time.sleep(DISK)
        sync(handle)

    files.os.fsync = slow_sync
    if run_config.is_run(out):
        resume(out)
    else:
        train(source, out, evaluate_every=every, **OPTIONS)


def start(*arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=live, args=arguments)
    process.start()
    return process


def half_written(run: Path) -> set[Path]:
    return {path for path in run.iterdir() if files.is_part(path)}


def contents(run: Path) -> dict[str, object]:
    """Return the contents of a run, without the clock."""
    found: dict[str, object] = {"names": sorted(p.name for p in run.iterdir() if p.is_file())}
    for name in (run_config.CONFIG, run_config.WEIGHTS):
        found[name] = (run / name).read_bytes()
    for name in (run_config.STATE, run_config.BEFORE):
        tensors, about = tensor_files.read_tensors(run / name, hashed=True)
        del about["progress"]["seconds"]
        found[f"{name}, about"] = about
        for key, tensor in tensors.items():
            bits = tensor.flatten().view(torch.uint8).numpy().tobytes()
            found[f"{name}, {key}"] = (tensor.dtype, tuple(tensor.shape), bits)
    events = [json.loads(line) for line in (run / run_config.METRICS).read_text().splitlines()]
    found[run_config.METRICS] = [{k: v for k, v in e.items() if k != "seconds"} for e in events]
    return found


def trial(folder: Path, data: str, kills: int, r: random.Random) -> None:
    source, every = data, EVERY[data]
    if data == "rows":
        source = str(folder / "rows.npy")
        np.save(source, np.random.default_rng(0).integers(0, 3, (60, 3)))
    begun = time.monotonic()
    first = start(source, folder / f"{data}-whole", every)
    first.join()
    interval = (time.monotonic() - begun) * every / OPTIONS["steps"]
    whole = contents(folder / f"{data}-whole")
    killed = trainings = cut = between = 0
    while killed < kills:
        out = folder / f"{data}-{trainings}"
        while True:
            stale = half_written(out)
            process = start(source, out, every)
            # long enough, now and then, to get from one checkpoint to the next
            process.join(r.uniform(0, max(1.5 * interval, 2.0)) if killed < kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            killed += 1
            cut += bool(half_written(out) - stale)
            with contextlib.suppress(OSError, ValueError, IndexError):
                step = tensor_files.read_tensors(out / run_config.STATE)[1]["progress"]["step"]
                between += run_config.read_metrics(out)[-1]["step"] > step
            between += training_state.is_in(out) and not (out / run_config.STATE).exists()
        if process.exitcode:
            sys.exit(f"{out} could not be resumed: exit code {process.exitcode}")
        ended = contents(out)
        wrong = [k for k in sorted(whole.keys() | ended.keys()) if whole.get(k) != ended.get(k)]
        if wrong:
            sys.exit(f"{out} differs after {killed} kills in {', '.join(wrong)}")
        trainings += 1
        print(f"{data}: {trainings} trainings, {killed} kills", file=sys.stderr, flush=True)
    print(
        f"{data}: {killed} kills ({cut} while a file was written, {between} between the files of a"
        f" checkpoint), {trainings} trainings of {OPTIONS['steps']} steps;"
        f" all {len(whole)} parts equal to the bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", nargs="+", choices=EVERY, default=list(EVERY))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for data in options.data:
            trial(Path(folder), data, options.kills, random.Random(options.seed))


if __name__ == "__main__":
    main()
