"""Files by bits-back or direct coding against the bound, and against other codecs.

    python benchmarks/codec/codec.py RUN [--data FILE] [--steps 4 8 16 64] [--orders 3]
        [--effort 1 8 64] [--effort-steps 25] [--examples N] [--calls 64] [--grid uniform]
        [--time-steps 8] [--json out.json]

RUN is a run of discrete data (`nelbo train digits --out RUN`); the data are its test split, or
FILE, such as a folder of .png files: larger images go to the model as tiles, and to the other
codecs as they are. --crop S takes the middle S x S pixels of each. Every number is of the same
examples in the same process. The bound is that of the model as it is coded: its own reverse step,
its grid of T times, so many calls per example, ± its Monte Carlo error. `payload` is all that the
coder wrote, initial bits included; `file` adds header, checksums and frames. The model is no part
of a file. `ideal` is the draw of the bound on the very latents that the file holds, in the part
that the model coded; `coder` is what a stack grows by over the densities of its latents, without a
start, of 512 examples at most. Each first order is decoded and compared. Seconds are of this
process's CPU. --time-steps compares coding and decoding with the same network calls alone.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nelbo.codec.api import compress, decompress, describe
from nelbo.codec.coding.codec import Codec
from nelbo.codec.coding.direct import Direct
from nelbo.codec.format import contents, pictures
from nelbo.codec.settings import Settings
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.times import TimeGrid, even_times
from nelbo.evaluation.evaluate import evaluate
from nelbo.report.other_codecs import of_images, rivals
from nelbo.runs.loading import load
from nelbo.training.presets import MANY_LEVELS

HEAD = ("T", "effort", "order", "bound", "±", "file", "payload", "/bound", "ideal/bound", "coder")


def coder_over_ideal(codec: Codec, x: Tensor) -> float:
    """Bits that the stack grows by over those of the densities, without any start."""
    from nelbo.codec.entropy.stack import Bottom, Stack

    stack, code = Stack(Bottom("benchmark").words(2**16)), codec.codes.model(0)
    start = stack.bits
    with measuring(codec.model):
        for i, part in enumerate(x.split(codec.codes.batch)):
            code.push(stack, part.long().numpy(), i * codec.codes.batch)
    return (stack.bits - start) * math.log(2) / stack.ideal


def files_of(data: str) -> list[Path]:
    """A file, or the files of a folder in their order."""
    path = Path(data)
    return sorted(path.iterdir()) if path.is_dir() else [path]


def middle_of(file: Path, side: int | None) -> np.ndarray:
    """The pixels of an image, or the middle ones, (H, W) or (H, W, 3)."""
    with Image.open(file) as image:
        pixels = np.asarray(image)
    if side is None:
        return pixels
    top, left = ((n - side) // 2 for n in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def network_alone(model: Model, settings: Settings, x: Tensor) -> tuple[float, float]:
    """CPU seconds of coding and decoding x, and of the same network calls alone.

    After each batch its calls are made once more, so that both see the same load.
    """
    codec, calls = Codec(model, settings), []
    whole, network, since = 0.0, 0.0, time.process_time()

    def again(_: int) -> None:
        nonlocal whole, network, since
        middle, mine = time.process_time(), calls.copy()
        whole += middle - since
        for inputs in mine:
            codec.model.network(*inputs)
        calls.clear()
        since = time.process_time()
        network += since - middle

    hook = codec.model.network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    since = time.process_time()
    for block, _ in list(codec.encode_blocks(x, 1000, again)):
        codec.decode_block(block, again)
    hook.remove()
    return whole, network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--crop", type=int)
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, nargs="*", default=[4, 8, 16, 64])
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--effort", type=int, nargs="*", default=[8])
    parser.add_argument("--effort-steps", type=int, nargs="*", default=[])
    parser.add_argument("--time-steps", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--grid", choices=["best", "uniform"], default="best")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = load(options.run)
    images: list[np.ndarray] = []
    if not options.data:
        x = run.examples(split=options.split)
    elif pictures.SUFFIX in {file.suffix for file in files_of(options.data)}:
        images = [middle_of(file, options.crop) for file in files_of(options.data)]
        shape = run.config.schema.shape
        tiles = [pictures.cut(np.atleast_3d(image).transpose(2, 0, 1), shape) for image in images]
        x = torch.from_numpy(np.concatenate(tiles))
    else:
        x = contents.read(options.data, run.config.schema).x
    x, rows = x[: options.examples], []
    numbers = sum(image.size for image in images) or x.numel()
    print(f"{len(x)} examples of {run.model.dims} dimensions; {torch.get_num_threads()} threads")
    print(" ".join(f"{name:>9}" for name in (*HEAD, "seconds", "decoding")))
    plans = [(steps, 1) for steps in options.steps]
    plans += [(steps, effort) for effort in options.effort for steps in options.effort_steps]
    for steps, effort in plans:
        spaced = TimeGrid(even_times(run.model.process.schedule, steps, steps))
        grid = run.grid(steps) if options.grid == "best" else spaced
        few = (run.config.schema.levels or 0) <= MANY_LEVELS
        result = evaluate(run.model, x, times=grid, calls=options.calls, variates=few)
        bound, error = result.bits_per_dim, result.standard_error.monte_carlo
        settings = Settings(tuple(grid.times.tolist()), effort=effort)
        coder = coder_over_ideal(Codec(run.model, settings), x[:512])
        for order in range(options.orders if effort == 1 else 1):
            generator = torch.Generator().manual_seed(order)
            mixed = x[torch.randperm(len(x), generator=generator)] if order else x
            start = time.process_time()
            data = compress(run.model, mixed, settings, verify=False)
            middle = time.process_time()
            if not order:
                assert torch.equal(decompress(data, run.model).x.long(), mixed.long())
            seconds = middle - start, math.nan if order else time.process_time() - middle
            header, blocks = describe(data)
            payload = sum(len(block.payload) for block in blocks)
            per_dim = 8 * payload / numbers
            by_model = header.ideal[1] * run.model.dims * math.log(2)
            ideal = header.ideal[0] / by_model if by_model else math.nan
            row = (steps, effort, order, bound, error, len(data), payload)
            row += (per_dim / bound, ideal / bound, coder, *seconds)
            rows.append(dict(zip((*HEAD, "seconds", "decoding"), row, strict=True)))
            shown = [f"{v:.5f}" if isinstance(v, float) else str(v) for v in row]
            print(" ".join(f"{v[:9]:>9}" for v in shown), flush=True)
    for steps in options.time_steps:
        settings = Settings(tuple(run.grid(steps).times.tolist()))
        direct = isinstance(Codec(run.model, settings).codes.model(0), Direct)
        times = [network_alone(run.model, settings, x) for _ in range(options.repeats)]
        ratios = torch.tensor([whole / network for whole, network in times])
        print(
            f"T={steps} {'direct' if direct else 'bits-back'}: coding and decoding take"
            f" {ratios.mean():.3f} times the CPU time of the same network calls alone (standard"
            f" deviation {ratios.std():.3f} of {len(times)} runs; {times[-1][0]:.2f} s)"
        )
    others = []
    if not options.no_rivals:
        others = of_images(images) if images else rivals(x.numpy())
    for rival in others:
        coding, decoding = rival.seconds
        print(
            f"{rival.name:20} {rival.size:9} bytes {8 * rival.size / numbers:8.4f} bits/dim"
            f" {coding:8.2f} s {decoding:6.2f} s"
        )
    if options.json:
        found = {"codec": rows, "rivals": [vars(rival) for rival in others]}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
