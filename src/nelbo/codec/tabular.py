"""Tables whose columns are all discrete as rows of codes, and back.

What is restored are the cells: names and order of the columns, their types, numbers as numbers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo.codec.errors import Damaged
from nelbo.data import Schema, cells, examples, tables

if TYPE_CHECKING:
    from polars import DataFrame


def read(path: Path, schema: Schema) -> tuple[Tensor, dict[str, object], bytes, int, tuple]:
    """The rows of a table as codes, what restores them, and the bytes of its file.

    Raises:
        ValueError: cells or columns that the schema cannot hold.
    """
    if schema.kind != "table":
        raise ValueError(f"{path} is a table; the run is of examples of shape {schema.shape}")
    frame = tables.read(path)
    extra = [name for name in frame.columns if all(name != c.name for c in schema.columns)]
    if extra:
        raise ValueError(f"{path} has the column {extra[0]!r}, which the run lacks; remove it")
    rows, _ = examples.encode(frame, schema.columns, str(path))
    types = {name: str(dtype) for name, dtype in frame.schema.items()}
    about: dict[str, object] = {"kind": path.suffix.lower()[1:], "types": types}
    x = rows.astype(np.int64)
    _compare(frame, _frame(x, about, schema), path)
    notes: tuple[str, ...] = ()
    if as_bytes(x, about, schema) != path.read_bytes():
        notes = ("the cells are kept, but not the layout of the file around them",)
    return torch.from_numpy(x), about, b"", path.stat().st_size, notes


def as_bytes(x: np.ndarray, about: dict, schema: Schema) -> bytes:
    """The content of the file with rows x."""
    return tables.to_bytes(_frame(x, about, schema), f".{about['kind']}")


def _frame(x: np.ndarray, about: dict, schema: Schema) -> "DataFrame":
    import polars as pl

    frame = examples.decode(x.astype(np.float64), schema.columns)
    text = f".{about['kind']}" in tables.SEPARATORS
    try:
        types = {n: getattr(pl, t) for n, t in about["types"].items()} if not text else {}
        return frame.select(list(about["types"])).cast(types)
    except (pl.exceptions.PolarsError, AttributeError) as error:
        raise Damaged(f"the table cannot be made of the file's columns: {error}") from None


def _compare(frame: "DataFrame", made: "DataFrame", path: Path) -> None:
    """Raise ValueError where a cell would come back as another."""
    for name in frame.columns:
        before, after = cells.texts(frame[name]), cells.texts(made[name])
        same = before.eq_missing(after)
        if made[name].dtype.is_numeric():
            a, b = cells.numbers(frame[name]), cells.numbers(made[name])
            equal = same.to_numpy() | (a == b) | (np.isnan(a) & np.isnan(b))
        else:
            equal = same.to_numpy()
        if not equal.all():
            row = int(np.flatnonzero(~equal)[0])
            raise ValueError(
                f"row {row + 1} of {path} holds {before[row]!r} in the column {name!r}, which the"
                " run's schema cannot hold; train with data that have it"
            )
