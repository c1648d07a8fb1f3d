"""Data larger than memory: does peak memory grow with the rows, and does training wait for them?

    python benchmarks/data/streaming.py [--rows 300000] [--images 5000] [--steps 100]
        [--json out.json]

Parquet shards of a mixed table and tar shards of 32x32 images are made, once of that many and once
of ten times as many; none where the number is 0. Each is loaded and trained on in a process of its
own, with preset auto, from disk: images as if memory had no room for them. Told are the peak
resident memory of the process, and the share of the time of its steps that it waited for examples;
of a table the steps are those about the end of its first window of blocks.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

SHARDS, WARM_UP = 8, 5


def make_table(folder: Path, rows: int) -> None:
    """Ten columns: four real, two of cents, two of few integers, two of words."""
    import numpy as np
    import polars as pl

    folder.mkdir()
    for k in range(SHARDS):
        random, n = np.random.default_rng(k), rows // SHARDS
        latent = random.normal(size=n)
        columns = {f"real{i}": latent + random.normal(size=n) for i in range(4)}
        columns |= {f"cents{i}": np.round(random.gamma(2, 50, n), 2) for i in range(2)}
        columns |= {f"count{i}": random.poisson(3 + np.abs(latent)).clip(max=30) for i in range(2)}
        words = np.array(["red", "green", "blue", "black", "white"])
        columns |= {f"word{i}": words[random.integers(0, 5, n)] for i in range(2)}
        pl.DataFrame(columns).write_parquet(folder / f"{k}.parquet", row_group_size=50_000)


def make_images(folder: Path, count: int) -> None:
    """32x32 RGB, with a class."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for k in range(SHARDS):
        random = np.random.default_rng(k)
        with tarfile.open(folder / f"{k}.tar", "w") as tar:
            for i in range(count // SHARDS):
                small = random.integers(0, 256, (4, 4, 3), np.uint8)
                file = io.BytesIO()
                Image.fromarray(small).resize((32, 32), Image.Resampling.BILINEAR).save(
                    file, "PNG"
                )
                content = {"png": file.getvalue(), "cls": str(i % 10).encode()}
                for suffix, value in content.items():
                    about = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    about.size = len(value)
                    tar.addfile(about, io.BytesIO(value))


def measure(source: Path, steps: int) -> dict[str, float]:
    """Load and train; in this process, which does nothing else."""
    import torch

    from nelbo import data
    from nelbo.data.readers import encoded
    from nelbo.data.rows import WINDOW, Ahead
    from nelbo.runs.config import hashes
    from nelbo.training.presets import configure
    from nelbo.training.trainer import Trainer

    torch.set_num_threads(1)
    encoded.IN_MEMORY = 0
    begun = time.perf_counter()
    dataset = data.load(source)
    hashes(dataset)
    loaded = time.perf_counter() - begun
    examples = len(dataset.splits["train"])
    learner = Trainer(*configure(dataset.schema, examples), dataset)
    if learner.blocks is not None:  # where one window of blocks ends and another begins
        turn = learner.blocks.size * WINDOW // learner.config.batch
        learner.at.step = max(0, turn - WARM_UP - steps // 2)
    for _ in range(WARM_UP):
        learner.step()
    assert isinstance(learner.read, Ahead)
    before, begun = learner.read.waited, time.perf_counter()
    for _ in range(steps):
        learner.step()
    seconds = time.perf_counter() - begun
    return {
        "examples": examples,
        "batch": learner.config.batch,
        "load_seconds": loaded,
        "step_ms": 1000 * seconds / steps,
        "waiting": (learner.read.waited - before) / seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def apart(*arguments: str) -> dict[str, float]:
    """Return what another process of this program prints."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout or "{}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        kind, folder, count = options.make
        {"table": make_table, "images": make_images}[kind](Path(folder), int(count))
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps)))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = {"table": options.rows, "images": options.images}
        for kind, count in ((kind, count) for kind, count in asked.items() if count):
            for times in (1, 10):
                source = f"{folder}/{kind}{times}"
                apart("--make", kind, source, str(times * count))
                one = apart("--measure", source, "--steps", str(options.steps))
                found[f"{kind} x{times}"] = one
                print(
                    f"{kind:7} {one['examples']:10.0f} training examples: peak"
                    f" {one['peak_mib']:7.1f} MiB, step {one['step_ms']:6.2f} ms, waiting"
                    f" {100 * one['waiting']:.2f} %, loaded in {one['load_seconds']:.1f} s",
                    flush=True,
                )
            growth = found[f"{kind} x10"]["peak_mib"] / found[f"{kind} x1"]["peak_mib"] - 1
            print(f"{kind:7} peak memory of ten times as many: {100 * growth:+.1f} % (goal 5 %)")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
