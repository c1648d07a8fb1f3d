"""Compress data, in files or in memory, with a run, and restore them.

Data in memory are coded as a file of their kind: an array as .npy, a table as .parquet, texts as
.txt with a line for each.
"""

import tempfile
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nelbo._utils.progress import increments, tracker
from nelbo.codec.api import head_of
from nelbo.codec.coding.blocks import nothing
from nelbo.codec.coding.direct import one_by_one
from nelbo.codec.entropy.stack import constriction
from nelbo.codec.errors import naming
from nelbo.codec.files import Summary, compress_file, decompress_file
from nelbo.data import coerce
from nelbo.data.readers.arrays import load_npz
from nelbo.data.schema import Schema
from nelbo.data.sources import Source, load_like
from nelbo.data.tabular import tables
from nelbo.data.tabular.datasets import is_table
from nelbo.diffusion.times import TimeGrid, grid_of

if TYPE_CHECKING:
    from nelbo.runs.run import Run

GRIDS = ("best", "uniform")


def compress(
    run: "Run",
    data: Source,
    out: Path,
    steps: int,
    *,
    grid: str,
    effort: int,
    block: int,
    verify: bool,
    precision: str,
    show: bool,
) -> Summary:
    """Compress data into a file; see `Run.compress`."""
    constriction()  # raises before any work
    if grid not in GRIDS:
        raise ValueError(f"grid must be {' or '.join(GRIDS)}; got {grid!r}")

    def times() -> TimeGrid:
        # with one call per symbol the times do not matter, and the best take long to find
        if grid == "uniform" or one_by_one(run.model, steps):
            return grid_of(run.model, steps)
        return run.grid(steps, tracker("best times") if show else iter)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return compress_file(
            run.model,
            run.config.schema,
            _as_file(data, run.config.schema, Path(folder)),
            out,
            times,
            weights=run.weights,
            effort=effort,
            block=block,
            verify=verify,
            precision=precision,
            progress=lambda total: increments(stack, "compress", total) if show else nothing,
        )


def decompress(run: "Run", file: Path, out: Path | None) -> object:
    """Restore the data of a file; see `Run.decompress`."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}; give one that compress wrote")
    with tempfile.TemporaryDirectory() as folder:
        with naming(file):
            kind = str(head_of(file.read_bytes()).contents.get("kind"))
        folders = kind in ("images", "texts")
        place = out or Path(folder) / ("x" if folders else f"x.{kind}")
        found = decompress_file(run.model, run.config.schema, file, place)
        if out is not None:
            return out
        if kind == "npy":
            return np.load(place, allow_pickle=False)
        if kind == "npz":
            return load_npz(place)
        if place.suffix in tables.FILES:
            return tables.read(place)
        if kind == "txt":
            return place.read_text(encoding="utf-8").split("\n")
        return found.x.numpy()


def _as_file(data: Source, schema: Schema, folder: Path) -> str:
    """Return a path, or write data in memory to a file in the folder; return its path."""
    if isinstance(data, str | PathLike):
        return str(data)
    data = coerce.plain(data)
    if is_table(data):
        path = folder / "x.parquet"
        path.write_bytes(tables.to_bytes(tables.frame_of(data), path.suffix))
    elif schema.text and isinstance(data, list | tuple):
        path = folder / "x.txt"
        path.write_text("\n".join(map(str, data)), encoding="utf-8")
    else:
        path = folder / "x.npy"
        array = data.detach().cpu().numpy() if isinstance(data, Tensor) else data
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biu":
            array = load_like(data, schema).splits["all"].numpy()
        np.save(path, array)
    return str(path)
