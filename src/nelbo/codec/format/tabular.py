"""Convert tables whose columns are all discrete to rows of codes, and back.

The cells are restored: names and order of the columns, their types, and each cell as it was
written. Columns that the run leaves out are stored beside the rows, and so are cells with another
spelling: 1.50 for 1.5, NA or NaN for a missing one.
"""

import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo._utils import limits
from nelbo.codec.coding.blocks import pack, unpack
from nelbo.codec.errors import CorruptFileError
from nelbo.codec.format.beside import equal_cells, of_bytes, to_bytes
from nelbo.data.schema import Schema
from nelbo.data.tabular import dtypes, encoding, tables
from nelbo.data.tabular.cells import raw_texts
from nelbo.data.tabular.frames import polars

if TYPE_CHECKING:
    from polars import DataFrame, Series


def read(path: Path, schema: Schema) -> tuple[Tensor, dict[str, object], bytes, int, tuple]:
    """Return the rows of a table as codes, a description that restores them, size and notes.

    Raises:
        ValueError: cells or columns that the schema cannot hold, or that could not be restored.
    """
    if schema.kind != "table":
        raise ValueError(
            f"{path} is a table, but the run models examples of shape {schema.shape}; give data"
            " of that shape"
        )
    frame = tables.read(path)
    known = {column.name for column in schema.columns}
    left = [name for name in frame.columns if name not in known]
    for name in left:
        if name not in schema.left_out:
            raise ValueError(f"{path} has the column {name!r}, which the run lacks; remove it")
    rows, _ = encoding.encode(frame, schema.columns, str(path))
    _refuse_outside(rows, frame, schema, path)
    x = rows.astype(np.int64)
    types = {name: dtypes.describe(dtype) for name, dtype in frame.schema.items()}
    about: dict[str, object] = {"kind": path.suffix.lower()[1:], "types": types}
    about["rows"] = frame.height
    pieces: list[bytes] = []
    columns: list[tuple[str, int]] = []
    cells: list[tuple[str, int, int]] = []
    made = encoding.decode(rows, schema.columns)
    for name in frame.columns:
        series = frame[name]
        back = None if name in left else dtypes.given_back(made[name], types[name])
        if back is None or back.dtype != series.dtype:
            pieces.append(to_bytes(series))
            columns.append((name, len(pieces[-1])))
        elif not (same := equal_cells(series, back)).all():
            at = np.flatnonzero(~same)
            pieces += [at.astype("<u4").tobytes(), to_bytes(series.gather(at))]
            cells.append((name, len(at), len(pieces[-1])))
    about |= {"columns": columns, "cells": cells}
    extra = pack(b"".join(pieces))
    content = as_bytes(x, json.loads(json.dumps(about)), extra, schema, None)
    _check(frame, content, path)
    notes = []
    if columns:
        names = ", ".join(name or "(no name)" for name, _ in columns)
        notes.append(f"kept beside the rows: the columns {names}")
    notes += [f"kept as they are written: {n} cells of {name}" for name, n, _ in cells]
    if content != path.read_bytes():
        notes.append("the cells are kept, but not the layout of the file around them")
    return torch.from_numpy(x), about, extra, path.stat().st_size, tuple(notes)


def as_bytes(
    x: np.ndarray, about: dict, extra: bytes, schema: Schema, places: np.ndarray | None
) -> bytes:
    """Return the content of the file with rows x, or with those at `places` after a salvage.

    Raises:
        CorruptFileError: the description of the columns contradicts itself.
    """
    pl = polars()
    sizes, patches = dict(about.get("columns", ())), {n: c for n, *c in about.get("cells", ())}
    most = sum(sizes.values()) + sum(4 * count + size for count, size in patches.values())
    limits.check_memory(most, "the data beside the rows")
    rest = io.BytesIO(unpack(extra, most))
    found: dict[str, Series] = {}  # a frame made from a list would name unnamed columns
    try:
        made = encoding.decode(x.astype(np.float64), schema.columns)
        for name, kind in about["types"].items():
            if name in sizes:
                series = of_bytes(name, kind, about["rows"], rest.read(sizes[name]))
                found[name] = series if places is None else series.gather(places)
                continue
            series = dtypes.given_back(made[name], kind)
            if name in patches:
                count, size = patches[name]
                at = np.frombuffer(rest.read(4 * count), "<u4").astype(np.int64)
                cells = of_bytes(name, kind, count, rest.read(size))
                series = _patched(series, at, cells, places)
            found[name] = series
        return tables.to_bytes(pl.DataFrame(found), f".{about['kind']}")
    except pl.exceptions.PolarsError as error:
        raise CorruptFileError(
            f"the table cannot be rebuilt from the file's columns: {error}"
        ) from None


def _patched(
    series: "Series", at: np.ndarray, cells: "Series", places: np.ndarray | None
) -> "Series":
    """Replace cells of a column.

    `at` are their rows in the whole table, of which the column has those at `places`.
    """
    if places is not None:
        kept = np.isin(at, places)
        at, cells = np.searchsorted(places, at[kept]), cells.filter(kept)
    return series.scatter(at, cells)


def _refuse_outside(rows: np.ndarray, frame: "DataFrame", schema: Schema, path: Path) -> None:
    """Raise ValueError if a cell has a code that stands for several values."""
    outside = encoding.outside_training(rows, schema.columns)
    if outside.any():
        row = int(outside.any(1).argmax())
        name = schema.columns[int(outside[row].argmax())].name
        cell = raw_texts(frame[name])[row]
        raise ValueError(
            f"row {row + 1} of {path} holds {cell!r} in the column {name!r}, which the run's"
            " schema cannot hold; train with data that have it"
        )


def _check(frame: "DataFrame", content: bytes, path: Path) -> None:
    """Raise ValueError if the restored file would not have the cells of the frame."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"restored{path.suffix}"
        file.write_bytes(content)
        again = tables.read(file)
    if again.columns != frame.columns or again.height != frame.height:
        raise ValueError(f"the rows and names of {path} could not be restored exactly")
    for series in frame:
        other = again[series.name]
        if other.dtype != series.dtype or not equal_cells(series, other).all():
            raise ValueError(
                f"the column {series.name!r} of {path} could not be restored exactly as"
                f" {series.dtype}; leave it out, or write it in another way"
            )
