"""The copy of its data that a run keeps, if they were given in memory and not as a path.

A table is data.parquet, as it was given. Anything else, and a table in splits, is data.npz: the
examples of each split and their labels, as the schema of the run reads them.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nelbo._utils import limits
from nelbo.data import coerce
from nelbo.data.readers.arrays import load_npz
from nelbo.data.readers.hub import Opened
from nelbo.data.rows import Rows
from nelbo.data.schema import Dataset, Schema
from nelbo.data.tabular import tables

if TYPE_CHECKING:
    from nelbo.data.sources import Source

LABELS = "labels of {}"  # name of the array of a split's labels
COPIES = 3  # of the data in memory while they are written


def table_of(source: "Source") -> bytes | None:
    """Return a table in memory as a Parquet file; None if the source is anything else."""
    source = coerce.plain(source)
    if isinstance(source, Opened) or coerce.in_splits(source) or not coerce.is_table(source):
        return None
    return tables.to_bytes(tables.frame_of(source), ".parquet")


def whole(dataset: Dataset) -> Dataset:
    """Return a data set with all its examples in memory.

    Raises:
        ValueError: they do not fit.
    """
    sizes = [x.shape.numel() * x.dtype.itemsize for x in dataset.splits.values()]
    limits.check_memory(COPIES * sum(sizes), "a copy of the data for the run")
    splits = {k: x[:] if isinstance(x, Rows) else x for k, x in dataset.splits.items()}
    return replace(dataset, splits=splits)


def to_bytes(dataset: Dataset) -> bytes:
    """Return the splits and labels of a data set as the content of data.npz."""
    arrays = {split: x.numpy() for split, x in dataset.splits.items()}
    arrays |= {LABELS.format(split): y.numpy() for split, y in dataset.labels.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # names are those of the arrays
    return buffer.getvalue()


def read(path: Path, schema: Schema) -> Dataset:
    """Read the data set that `to_bytes` wrote.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    arrays = load_npz(path)
    labels = {
        name: arrays.pop(key) for name in [*arrays] if (key := LABELS.format(name)) in arrays
    }
    if not arrays or any(x.shape[1:] != schema.shape for x in arrays.values()):
        raise ValueError(f"{path} holds no examples of the run's schema")
    splits, of_each = (
        {name: torch.from_numpy(x) for name, x in some.items()} for some in (arrays, labels)
    )
    return Dataset(str(path), schema, splits, labels=of_each)
