"""Encode rows of a table as examples, in the order of `columns.places`, and decode them.

Columns are matched by name, so their order does not matter.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nelbo.data.columns import Column, Place, places
from nelbo.data.tabular.cells import numbers, off_lattice, raw_texts, texts
from nelbo.data.tabular.dtypes import describe, given_back
from nelbo.data.tabular.frames import column_of, polars
from nelbo.data.tabular.spelling import places_of

if TYPE_CHECKING:
    from polars import DataFrame, Series

OTHER = "(other)"


class Unseen:
    """Counts, by column, cells that training did not have and that are replaced by something
    else."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, str]] = {}

    def add(self, column: str, count: int, cell: str, reason: str) -> None:
        """Add `count` cells of a column and what is wrong with them; `cell` shows one."""
        before, first = self._found.get((column, reason), (0, cell))
        if count:
            self._found[column, reason] = before + count, first

    def notes(self) -> list[str]:
        """Return a sentence for each column and explanation."""
        return [
            f"{count} {'cell' if count == 1 else 'cells'} of {column}, such as {cell}, {reason}"
            for (column, reason), (count, cell) in self._found.items()
        ]


def encode(
    frame: "DataFrame",
    columns: Sequence[Column],
    label: str,
    rounding: bool = False,
    first: int = 0,
    unseen: Unseen | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Encode rows as examples, (N, D) float64, with notes on cells that were changed.

    Args:
        frame: the table; other columns are left out.
        columns: the columns to encode.
        label: name of the table in messages.
        rounding: round numbers to the precision of their columns, instead of requiring it.
        first: row of the table at which the frame begins.
        unseen: counts cells that training did not have; if None, they are in the notes.

    Raises:
        ValueError: a column is missing, or a cell is not valid in its column.
    """
    known = {column.name for column in columns}
    extra = [name for name in frame.columns if name not in known]
    notes = [f"columns left out: {', '.join(extra)}"] if extra else []
    own = Unseen() if unseen is None else unseen
    parts: list[np.ndarray] = []
    for place in places(columns):
        series = column_of(frame, place.column.name, label)
        if place.column.kind in ("category", "boolean"):
            parts.append(_symbols(series, place.column, first, own))
            continue
        values, moved = _numbers(series, place.column, rounding, first)
        if place.indicator:
            parts.append(np.where(np.isnan(values), 2.0, 1.0))
            continue
        if len(moved):
            precision = f"{place.column.precision:g}"
            if rounding:
                notes.append(f"{len(moved)} values of {series.name} were rounded to {precision}")
            else:
                reason = f"are rounded to {precision}, as in training"
                own.add(series.name, len(moved), f"{moved[0]:g}", reason)
        levels = place.column.group == "levels"
        parts.append(_levels(values, place.column, own) if levels else values)
    return np.stack(parts, 1), notes if unseen is not None else notes + own.notes()


def encode_holes(
    frame: "DataFrame", columns: Sequence[Column], label: str, unseen: Unseen | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encode rows with missing cells as examples that are complete.

    Args:
        frame: the table.
        columns: the columns, whether or not they allow missing cells.
        label: name of the table in messages.
        unseen: counts cells that training did not have.

    Returns:
        Examples (N, D), with an arbitrary value for each missing cell, and a mask of the known
        dimensions, (N, D). The indicator that a cell is not missing counts as known.

    Raises:
        ValueError: as for `encode`.
    """
    whole, missing = frame, {}
    for column in columns:
        cells = texts_of(column_of(frame, column.name, label), column)
        missing[column.name] = cells.is_null().to_numpy()
        some = column.categories[0] if column.categories else str(column.low or 0.0)
        whole = whole.with_columns(cells.fill_null(some).alias(column.name))
    x, _ = encode(whole, columns, label, unseen=unseen)
    known = [place.indicator | ~missing[place.column.name] for place in places(columns)]
    return x, np.stack(known, 1)


def holes(series: "Series", column: Column) -> "Series":
    """Return a mask of the cells of a column that an imputation fills.

    They are the empty cells, and words that certainly mean a missing cell: the schema declares
    them, or the other cells are numbers. A usual word such as NA among other words may be a value,
    so that cell is not overwritten.
    """
    guessed = column.missing_words is None and column.kind in ("category", "boolean")
    return texts(series, () if guessed else column.missing_words, column.categories).is_null()


def words_in_holes(frame: "DataFrame", columns: Sequence[Column]) -> list[str]:
    """Return notes on words that mean missing cells: those kept, and those replaced."""
    notes = []
    kept = 'is kept as it is; to have it drawn, train with it among "missing_words" in --schema'
    for column in columns:
        series = frame[column.name]
        text, hole = texts(series, ()), holes(series, column)
        word = text.is_not_null() & texts_of(series, column).is_null()
        for which, reason in ((hole, "counts as a missing cell, and is drawn"), (~hole, kept)):
            some = text.filter(word & which).unique().sort().to_list()
            if some:
                notes.append(f"{column.name}: {', '.join(map(repr, some))} {reason}")
    return notes


def filled(frame: "DataFrame", drawn: "DataFrame", columns: Sequence[Column]) -> "DataFrame":
    """Fill the holes of a table with the cells of another; keep the types of columns.

    A type changes only if a cell does not fit, such as 0.5 among integers.
    """
    pl = polars()
    for column in columns:
        name = column.name
        cells, made = frame[name], drawn[name]
        hole = holes(cells, column)
        if not hole.any():
            continue
        fitting = made.filter(hole)
        if cells.dtype != pl.Null:
            fitting = given_back(fitting, describe(cells.dtype))
        if fitting.dtype != cells.dtype:
            cells = raw_texts(cells) if fitting.dtype == pl.String else cells.cast(fitting.dtype)
        frame = frame.with_columns(cells.scatter(hole.arg_true(), fitting).alias(name))
    return frame


def texts_of(series: "Series", column: Column) -> "Series":
    """Return the cells of a column as text, null if they count as missing in it."""
    return texts(series, column.missing_words, column.categories)


def _symbols(series: "Series", column: Column, first: int, unseen: Unseen) -> np.ndarray:
    text, pl = texts_of(series, column), polars()
    place = places_of(text.drop_nulls().unique(), column.categories)
    code = {value: i + 1.0 for value, i in place.items()}
    absent = float(len(column.categories) + 1) if column.missing else 0.0
    found = text.replace_strict(code, default=0.0, return_dtype=pl.Float64).to_numpy()
    none = text.is_null().to_numpy()
    codes = np.where(none, absent, found)
    if column.kind == "boolean":
        wrong = np.flatnonzero(codes == 0)
        if len(wrong):
            cell = text[int(wrong[0])]
            held = "nothing" if cell is None else repr(cell)
            raise ValueError(
                f"the column {column.name!r} is boolean, {' or '.join(column.categories)}; row"
                f" {first + wrong[0] + 1} holds {held}; fix it, or train with --schema where"
                " the column is a category"
            )
    other = np.flatnonzero((codes == 0) & ~none)
    if len(other):
        cell = repr(text[int(other[0])])
        unseen.add(
            column.name, len(other), cell, f"are not among its categories: counted as {OTHER}"
        )
    if none.any() and not column.missing:
        word = raw_texts(series)[int(none.argmax())]  # possibly a word that means missing
        reason = f"are missing, but none was in training: counted as {OTHER}"
        unseen.add(column.name, int(none.sum()), repr(word or ""), reason)
    return codes


def _numbers(
    series: "Series", column: Column, rounding: bool, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a column on its lattice, and the cells that were moved there."""
    values = numbers(series, first, column.missing_words)
    absent = np.isnan(values)
    if absent.any() and not column.missing:
        raise ValueError(
            f"the column {column.name!r} has {absent.sum()} missing values, the first in row"
            f" {first + absent.argmax() + 1}, and had none in training; fill them, or train with"
            ' --schema where the column has "missing": true'
        )
    if column.kind == "real":
        return values, values[:0]
    assert column.precision is not None and column.low is not None
    points, moved = off_lattice(values, column.precision, column.low)
    if moved.any() and not (rounding or column.rounds):
        raise ValueError(
            f"the column {column.name!r} has the precision {column.precision:g}; row"
            f" {first + moved.argmax() + 1} holds {values[moved.argmax()]:g}; round it first"
        )
    return np.round(points, column.decimals), values[moved]


def _levels(values: np.ndarray, column: Column, unseen: Unseen) -> np.ndarray:
    assert column.precision is not None and column.low is not None
    code = np.rint((values - column.low) / column.precision) + 1
    beyond = np.flatnonzero((code < 1) | (code > column.points))
    if len(beyond):
        reason = f"lie outside {column.low:g} .. {column.high:g}: counted as just outside"
        unseen.add(column.name, len(beyond), f"{values[beyond[0]]:g}", reason)
    code = np.clip(code, 0, column.points + 1)
    return np.where(np.isnan(values), column.points + 2, code)


def decode(x: np.ndarray, columns: Sequence[Column]) -> "DataFrame":
    """Decode examples (N, D) to a table with these columns, in order.

    A number beyond the levels becomes the next point outside; a category that training did not
    have becomes "(other)".
    """
    pl = polars()
    at = places(columns)
    absent = {place.index: x[:, i] == 2 for i, place in enumerate(at) if place.indicator}
    made: dict[int, Series] = {}
    for i, place in enumerate(at):
        if not place.indicator:
            made[place.index] = _decoded(x[:, i], place, absent.get(place.index))
    return pl.DataFrame([made[index] for index in range(len(columns))])


def outside_training(x: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """Return a mask of cells that training did not have, (N, len(columns)), in examples (N, D).

    They are numbers outside the range of their columns, and unknown categories.
    """
    at = places(columns)
    inside, absent = (np.full((len(x), len(columns)), known) for known in (True, False))
    for i, place in enumerate(at):
        if place.indicator:
            absent[:, place.index] = x[:, i] == 2
    for i, place in enumerate(at):
        column, value, index = place.column, x[:, i], place.index
        if place.indicator or column.group == "symbols":
            inside[:, index] &= value > 0
        elif column.group == "levels":
            inside[:, index] &= (value != 0) & (value != column.points + 1)
        elif column.ends is not None:
            low, high = column.ends
            half = (column.precision or 0.0) / 2
            inside[:, index] &= absent[:, index] | ((value >= low - half) & (value <= high + half))
    return ~inside


def _decoded(x: np.ndarray, place: Place, absent: np.ndarray | None) -> "Series":
    """Decode one column, in the type of its source."""
    series = _plain(x, place, absent)
    return given_back(series, place.column.dtype) if place.column.dtype else series


def _plain(x: np.ndarray, place: Place, absent: np.ndarray | None) -> "Series":
    pl = polars()
    column = place.column
    if column.kind in ("category", "boolean"):
        names = [OTHER, *column.categories, None]
        return pl.Series(column.name, [names[int(code)] for code in x], dtype=pl.String)
    if column.group == "levels":
        assert column.precision is not None and column.low is not None
        absent = x == column.points + 2
        x = column.low + column.precision * (x - 1)
    whole = column.kind == "rounded" and column.decimals == 0
    values = np.round(x, column.decimals) if column.kind == "rounded" else x
    none = np.zeros(len(x), bool) if absent is None else absent
    cells = [None if no else v for v, no in zip(values.tolist(), none, strict=True)]
    series = pl.Series(column.name, cells, dtype=pl.Float64)
    return series.cast(pl.Int64) if whole else series
