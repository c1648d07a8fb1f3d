"""Images, with their labels, and texts of `datasets`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nelbo._utils import limits
from nelbo.data.found import Found
from nelbo.data.labels import as_text
from nelbo.data.readers import text
from nelbo.data.readers.encoded import Form, read_images
from nelbo.data.readers.hub import TEXT, Opened, check_inside, find, rows_of, type_of
from nelbo.data.schema import Schema
from nelbo.data.splits import Declared

if TYPE_CHECKING:
    from datasets.features.features import FeatureType

    from nelbo.data.readers.hub import Split


def read(
    source: "str | Opened",
    form: Form,
    schema: Schema | None,
    declared: Declared | None = None,
    seed: int = 0,
) -> tuple[str, Found]:
    """Read the images or the text of a data set, for a model of `schema` if given.

    Raises:
        ValueError: it is a stream of images, or the options do not apply.
    """
    found = find(source, declared)
    if found.image:
        return found.name, _images(found, found.image, form)
    parts = {split: _join(each) for split, each in found.splits.items()}
    others = [name for name in found.features if name != TEXT]
    notes = [*found.notes, *([f"columns left out: {', '.join(others)}"] if others else [])]
    if schema is not None:
        return found.name, text.of_bytes_like(found.name, parts, notes, schema)
    return found.name, text.of_bytes(
        found.name, parts, notes, form.size, form.levels, seed, form.tokenizer
    )


def _join(rows: "Split") -> bytes:
    return "\n".join(each or "" for (each,) in rows_of(rows, [TEXT])).encode()


def _images(found: Opened, column: str, form: Form) -> Found:
    if found.streaming:
        raise ValueError(
            f"{found.name} has images, which are not streamed; hub: keeps them on disk and reads"
            " them from there"
        )
    import datasets

    cells = {
        split: Cells(
            found.name,
            rows.cast_column(column, datasets.Image(decode=False)),
            column,
            homes=found.homes,
        )
        for split, rows in found.splits.items()
    }
    labels = {
        name: {split: _labels(rows, name, feature) for split, rows in found.splits.items()}
        for name, feature in found.features.items()
        if type_of(feature) in ("ClassLabel", "Value")
    }
    others = [name for name in found.features if name != column and name not in labels]
    notes = [*found.notes, *([f"columns left out: {', '.join(others)}"] if others else [])]
    return replace(read_images(found.name, cells, form, notes), labels=labels)


def _labels(rows: "Split", name: str, feature: "FeatureType") -> np.ndarray:
    """Return the labels of rows; "" or NaN if missing; for classes the code -1 means missing
    too."""
    values = rows.with_format("arrow")[name][:].to_pylist()
    if type_of(feature) == "ClassLabel":
        names = dict(enumerate(feature.names)) | {None: "", -1: ""}
        odd = next((i for i, value in enumerate(values) if value not in names), None)
        if odd is not None:
            raise ValueError(
                f"the label {name} of row {odd + 1} is {values[odd]}; it has {len(feature.names)}"
                " classes, and -1 for none"
            )
        return np.array([names[value] for value in values], str)
    some = [value for value in values if value is not None]
    if any(isinstance(value, float) for value in some):
        return np.array([math.nan if value is None else value for value in values], float)
    if len(some) == len(values) and not any(isinstance(value, str) for value in some):
        return np.array(values)
    texts = {value: as_text(np.array([value]))[0] for value in set(some)}
    return np.array([texts.get(value, "") for value in values], str)


class Cells:
    """The encoded images in a column, as `encoded.Encoded` holds those in files.

    Args:
        source: for messages.
        rows: a data set of `datasets` that does not decode them.
        column: name of the column.
        chosen: row numbers; by default all.
        homes: the folders in which a cell may name a file.
    """

    def __init__(
        self,
        source: str,
        rows: "Split",
        column: str,
        chosen: np.ndarray | None = None,
        homes: tuple[Path, ...] = (),
    ) -> None:
        self.source, self.rows, self.column, self.homes = source, rows, column, homes
        self.chosen = np.arange(len(rows)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def at(self, rows: np.ndarray) -> "Cells":
        """Return a selection of the images."""
        return Cells(self.source, self.rows, self.column, self.chosen[rows], self.homes)

    def join(self, others: "Sequence[Cells]") -> "Cells":
        """Return these images followed by others."""
        import datasets

        each = [cells.rows.select(cells.chosen) for cells in (self, *others)]
        joined = datasets.concatenate_datasets(each)
        return Cells(self.source, joined, self.column, homes=self.homes)

    def content(self, i: int) -> bytes:
        """Return the bytes of the i-th image."""
        cell = self.rows[int(self.chosen[i])][self.column]
        if cell is None:
            raise ValueError(f"{self.name(i)} has no image; remove it")
        if cell["bytes"]:
            return bytes(cell["bytes"])
        if not cell["path"]:
            raise ValueError(f"{self.name(i)} has no image; remove it")
        check_inside([cell["path"]], self.homes, self.name(i))
        limits.regular(Path(cell["path"]))
        return Path(cell["path"]).read_bytes()

    def name(self, i: int) -> str:
        """Return the place of the i-th image, for messages."""
        return f"row {self.chosen[i] + 1} of {self.source}"
