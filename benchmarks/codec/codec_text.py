"""Text, and single examples, as files of an absorbing model against its any-order bound.

    python benchmarks/codec/codec_text.py RUN [--chunks 16] [--steps 32 128] [--singles 8]
        [--calls 64]

RUN is a run on text (`nelbo train book.txt --out RUN`). The text is the first chunks of its test
split, as a .txt file that goes through `nelbo compress RUN text.txt` and `nelbo decompress` in
processes of their own and comes back to the byte. Each single example is a file of its own.
`payload` is what the coder wrote but for the word under its stack, the check of the data, which
counts with header and frame; `file` is all bytes. The any-order bound is that of continuous
time, a network call for each symbol; the bound of T calls is looser, for what shows at once costs
its marginals. Bounds are of the very same examples, ± their Monte Carlo error; `its order` is the
draw of the bound that the file's own order of symbols is, without that error.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor

from nelbo._utils.numerics import LOG_2
from nelbo.codec.api import compress, decompress, describe
from nelbo.codec.entropy.stack import WORD
from nelbo.codec.settings import Settings
from nelbo.data.readers.text import OTHER
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation.evaluate import evaluate
from nelbo.runs.loading import load
from nelbo.runs.run import Run


def nelbo(*arguments: object) -> None:
    """A command of its own."""
    subprocess.run([sys.executable, "-m", "nelbo", *map(str, arguments)], check=True)


def text_of(run: Run, x: Tensor) -> bytes:
    """The text of chunks x."""
    alphabet = run.config.schema.alphabet
    if not alphabet:
        return bytes(x.flatten().tolist())
    return "".join((alphabet + OTHER)[i] for i in x.flatten().tolist()).encode()


def sizes(data: bytes) -> tuple[int, float, int]:
    """Bits of the symbols, those that their order should cost, and bytes in all."""
    header, blocks = describe(data)
    payload = sum(8 * len(block.payload) - WORD * block.borrowed for block in blocks)
    return payload, header.ideal[0] / LOG_2, len(data)


def through_commands(run: Path, text: bytes, steps: int) -> bytes:
    """The file of a text, which came back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, file, out = folder / "text.txt", folder / "text.nlb", folder / "again.txt"
        source.write_bytes(text)
        options = ("--steps", steps, "--grid", "uniform", "--no-verify")
        nelbo("compress", run, source, "--out", file, *options)
        nelbo("decompress", run, file, "--out", out)
        assert out.read_bytes() == text
        return file.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--singles", type=int, default=8)
    parser.add_argument("--calls", type=int, default=64, help="of the network, for a bound")
    options = parser.parse_args()
    run = load(options.run)
    x = run.examples(split="test")[: options.chunks]
    some = x[: options.singles]
    text = text_of(run, x)
    print(f"{len(x)} chunks of {run.model.dims} symbols, {len(text)} bytes; bits per symbol")
    bounds = []
    for part in (x, some):
        found = evaluate(run.model, part, times=ContinuousTime(), calls=options.calls)
        bounds.append(found.bits_per_dim)
        error = found.standard_error.monte_carlo
        print(f"any-order bound of {len(part)} examples: {bounds[-1]:.4f} ± {error:.4f}")
    for steps in options.steps:
        grid = TimeGrid.uniform(steps)
        at_once = evaluate(run.model, x, times=grid, calls=options.calls).bits_per_dim
        bits, ideal, size = sizes(through_commands(options.run, text, steps))
        print(
            f"T={steps} text: file {size} bytes, {8 * size / x.numel():.4f}; payload"
            f" {bits / x.numel():.4f}, {bits / x.numel() / bounds[0]:.4f} times the any-order"
            f" bound, {bits / x.numel() / at_once:.4f} times that of {steps} calls,"
            f" {bits / ideal:.4f} times its order"
        )
        frames, total, should = [], 0, 0.0
        for one in some.split(1):
            data = compress(run.model, one, Settings(tuple(grid.times.tolist())), verify=False)
            assert decompress(data, run.model).x.equal(one)
            bits, ideal, size = sizes(data)
            total, should = total + bits, should + ideal
            frames.append(size - bits // 8)
        ratio = total / some.numel() / bounds[1]
        print(
            f"T={steps} {len(some)} single examples: payload {ratio:.4f} times the any-order"
            f" bound, {total / should:.4f} times its order; header, frame and check {min(frames)}"
            f" to {max(frames)} bytes each"
        )


if __name__ == "__main__":
    main()
