"""Files of one process, decoded by fresh ones with other threads, instructions and libraries.

    python benchmarks/codec/codec_processes.py RUN [--steps 8] [--folder FOLDER]

RUN is a run on images of levels. Files of 0, 1, 2, 5, 8 and all test examples, and of data unlike
those of training, are written here and must come back exactly in each of the processes below; the
file of float32 exactly or as an error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from nelbo.codec.api import compress, decompress
from nelbo.codec.errors import CodecError
from nelbo.codec.settings import Settings
from nelbo.runs.loading import load

PROCESSES = {
    "the same": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "oneDNN off": {"OMP_NUM_THREADS": "1", "ONEDNN_OFF": "1"},
    "ATEN_CPU_CAPABILITY=default": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    "oneDNN of SSE4.1": {"OMP_NUM_THREADS": "1", "DNNL_MAX_CPU_ISA": "SSE41"},
    "MKL compatible": {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
}


def examples(x: torch.Tensor, levels: int) -> dict[str, torch.Tensor]:
    """Test examples and what is unlike them, by name."""
    g = torch.Generator().manual_seed(0)
    few = x[:40]
    mixed = few.flatten(1)[:, torch.randperm(few[0].numel(), generator=g)].reshape(few.shape)
    checks = torch.arange(few[0].numel()).reshape(few.shape[1:]) % 2 * (levels - 1)
    return {
        **{f"{n} examples": x[:n] for n in (0, 1, 2, 5, 8, len(x))},
        "noise": torch.randint(levels, few.shape, generator=g),
        "inverted": levels - 1 - few.long(),
        "shuffled pixels": mixed,
        "constant": torch.full_like(few, levels - 1),
        "checkerboard": checks.expand(few.shape),
    }


def decode(run: Path, folder: Path) -> None:
    """Work of a fresh process: print one line for each file."""
    if os.environ.get("ONEDNN_OFF"):
        torch.backends.mkldnn.enabled = False
    model = load(run).model
    for file in sorted(folder.glob("*.nlb")):
        try:
            x = decompress(file.read_bytes(), model).x.numpy()
            same = np.array_equal(x, np.load(file.with_suffix(".npy")))
            print(file.stem, "exact" if same else "WRONG", sep="\t")
        except CodecError as error:
            print(file.stem, f"error {error.exit_code}", sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        decode(options.run, options.decode)
        return
    run = load(options.run)
    levels = run.config.schema.levels or 0
    times = tuple(run.grid(options.steps).times.tolist())
    with tempfile.TemporaryDirectory() as folder:
        for name, x in examples(run.examples(), levels).items():
            data = compress(run.model, x, Settings(times), verify=False)
            (Path(folder) / f"{name}.nlb").write_bytes(data)
            np.save(Path(folder) / f"{name}.npy", x.numpy())
            print(f"{name:16} {x.numel():6} numbers in {len(data):6} bytes")
        x = run.examples()[:100]
        single = compress(run.model, x, Settings(times, "float32"), verify=False)
        (Path(folder) / "float32.nlb").write_bytes(single)
        np.save(Path(folder) / "float32.npy", x.numpy())
        for name, environment in PROCESSES.items():
            found = subprocess.run(
                [sys.executable, __file__, str(options.run), "--decode", folder],
                env={**os.environ, **environment},
                check=True,
                capture_output=True,
                text=True,
            ).stdout.splitlines()
            outcome = dict(line.split("\t") for line in found)
            float32 = outcome.pop("float32")
            exact = sum(v == "exact" for v in outcome.values())
            others = {k: v for k, v in outcome.items() if v != "exact"}
            print(f"{name:28} {exact} of {len(outcome)} exact {others or ''}; float32: {float32}")


if __name__ == "__main__":
    main()
