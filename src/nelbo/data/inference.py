"""What the columns of a table are, as far as their cells tell.

A column is numbers if all its cells are. They are rounded if they stand on a lattice: the
precision is the largest distance of which all differences are multiples, so that a density made of
the probabilities is not higher than the data warrant.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nelbo.data.layout import SIZES, Column
from nelbo.data.tables import LEAVE_OUT, is_number, numbers, texts

if TYPE_CHECKING:
    from polars import DataFrame, Series

DECIMALS = 6  # more are those of a real number
FINEST = 10**7  # points of a lattice; beyond, a real number
FURTHEST = 10**10  # of them from 0, where float64 still tells a millionth of one
ROWS = 50  # with more texts than this, and than nine tenths of the rows, they name the rows
MIXED = 64  # different texts up to which numbers and words together make a category
TRUTH = ({"false", "true"}, {"0", "1"})


def infer_columns(frame: "DataFrame") -> tuple[list[Column], list[str]]:
    """The columns of a table, and a note on each that is not what it may seem.

    Raises:
        ValueError: a column without a cell, with infinite numbers, or with too many texts.
    """
    found = [infer_column(frame[name]) for name in frame.columns]
    return [column for column, _ in found], [note for _, note in found if note]


def complete(frame: "DataFrame", declared: object) -> list[Column]:
    """The columns that a user declares, what they leave open found in the cells.

    Args:
        frame: the table.
        declared: as JSON has it, a list with an object for each column that is to be used, or an
            object with this list as "columns": "name" and any of the other keys of a `Column`.

    Raises:
        ValueError: it is not so, names a column that is not there, or cannot be completed.
    """
    if isinstance(declared, Mapping):
        declared = declared.get("schema", declared)
    if isinstance(declared, Mapping):
        declared = declared.get("columns")
    if not isinstance(declared, list) or not all(isinstance(each, dict) for each in declared):
        raise ValueError(
            'a schema is a list of columns such as {"name": "age", "kind": "rounded",'
            ' "precision": 1}, or an object with it as "columns"'
        )
    for each in declared:
        if each.get("name") not in frame.columns:
            raise ValueError(
                f"the schema has the column {each.get('name')!r}; the table has"
                f" {', '.join(map(repr, frame.columns))}"
            )
    return [_complete(frame[each["name"]], each) for each in declared]


def infer_merged(chunks: Iterable["DataFrame"]) -> tuple[list[Column], list[str]]:
    """The columns of a table that comes in chunks, as for `infer_columns`.

    Raises:
        ValueError: also numbers in one chunk and texts in another.
    """
    found: dict[str, Column | None] = {}
    notes: dict[str, str] = {}
    for frame in chunks:
        for name in frame.columns:
            column, note = _infer_some(frame[name])
            found[name] = _merge_some(found[name], column) if name in found else column
            notes.setdefault(name, note)
    for name, column in found.items():
        if column is None:
            raise ValueError(f"the column {name!r} has no value in any row; {LEAVE_OUT}")
        if len(column.categories) == 1:
            notes[name] = f"{name} is always {column.categories[0]}"
    return [column for column in found.values() if column], [n for n in notes.values() if n]


def complete_columns(chunks: Iterable["DataFrame"], declared: object) -> list[Column]:
    """The columns that a user declares of a table that comes in chunks, as for `complete`."""
    found: list[Column] = []
    for frame in chunks:
        some = complete(frame, declared)
        found = [merge(a, b) for a, b in zip(found, some, strict=True)] if found else some
    return found


def _infer_some(series: "Series") -> tuple[Column | None, str]:
    """As `infer_column`, for some rows; None where all cells are missing."""
    if texts(series).is_null().all():
        return None, ""
    column, note = infer_column(series)
    return column, "" if len(column.categories) == 1 else note


def _merge_some(a: Column | None, b: Column | None) -> Column | None:
    if a is None or b is None:
        column = a or b
        return None if column is None else replace(column, missing=True)
    return merge(a, b)


def merge(a: Column, b: Column) -> Column:
    """What a column is that is a in some rows and b in the others.

    Raises:
        ValueError: numbers and texts.
    """
    missing = a.missing or b.missing
    if a.categories and b.categories:
        distinct = sorted({*a.categories, *b.categories})
        numeric = all(map(is_number, distinct))
        if a.kind == b.kind == "category" and not (numeric and len(distinct) > 1):
            return _few(replace(a, categories=tuple(distinct), missing=missing))
        if len(distinct) == 2 and {value.lower() for value in distinct} in TRUTH:
            return Column(a.name, "boolean", categories=tuple(distinct), missing=missing)
        if not numeric:
            return _few(Column(a.name, "category", categories=tuple(distinct), missing=missing))
    words = [value for column in (a, b) for value in column.categories if not is_number(value)]
    if words:
        raise ValueError(
            f"the column {a.name!r} holds numbers in some rows and texts such as {words[0]!r} in"
            " others; mend it, or declare it a category with --schema"
        )
    if "real" in (a.kind, b.kind):
        return Column(a.name, "real", missing=missing)
    points = np.unique(np.concatenate([_points(a), _points(b)]))
    precision = lattice(points)
    if precision is None:
        return Column(a.name, "real", missing=missing)
    low, high = float(points[0]), float(points[-1])
    return Column(a.name, "rounded", precision, low, high, missing=missing)


def _points(column: Column) -> np.ndarray:
    """Points that span the lattice of numbers."""
    if column.categories:
        return np.array([float(value) for value in column.categories])
    assert column.precision is not None and column.low is not None and column.high is not None
    first = min(column.low + column.precision, column.high)
    return np.array([column.low, round(first, 12), column.high])


def _few(column: Column) -> Column:
    if len(column.categories) > SIZES[4] - 2:
        raise ValueError(
            f"the column {column.name!r} has {len(column.categories)} different texts and more,"
            f" too many for a category; {LEAVE_OUT}"
        )
    return column


def _complete(series: "Series", declared: dict[str, object]) -> Column:
    if "kind" not in declared:
        declared = infer_column(series)[0].to_dict() | declared
    text = texts(series)
    found: dict[str, object] = {"missing": bool(text.is_null().any())}
    if declared["kind"] in ("category", "boolean"):
        found["categories"] = sorted(text.drop_nulls().unique().to_list())
    if declared["kind"] == "rounded":
        values = numbers(series)
        known = np.unique(values[~np.isnan(values)])
        precision = declared.get("precision", lattice(known) if len(known) > 1 else 1.0)
        if not isinstance(precision, int | float) or not precision > 0:
            raise ValueError(
                f"the precision of the column {series.name!r} must be positive; got {precision!r}"
            )
        ends = np.rint(known[[0, -1]] / precision) * precision
        low, high = (round(float(end), 12) for end in ends)
        found |= {"precision": float(precision), "low": low, "high": high}
    return Column.from_dict(found | declared)


def infer_column(series: "Series") -> tuple[Column, str]:
    """What one column is, and a note on it or ""; as for `infer_columns`."""
    name = series.name
    if series.dtype.is_numeric():
        values = numbers(series)
        absent = np.isnan(values)
        if len(np.unique(values[~absent])) > 2:  # need not go by way of texts
            return _number(name, values, bool(absent.any()))
    text = texts(series)
    distinct = sorted(text.drop_nulls().unique().to_list())
    missing = bool(text.is_null().any())
    if not distinct:
        raise ValueError(f"the column {name!r} has no value in any row; {LEAVE_OUT}")
    if len(distinct) == 1:
        column = Column(name, "category", categories=(distinct[0],), missing=missing)
        return column, f"{name} is always {distinct[0]}"
    if {value.lower() for value in distinct} in TRUTH and len(distinct) == 2:
        return Column(name, "boolean", categories=tuple(distinct), missing=missing), ""
    words = [value for value in distinct if not is_number(value)]
    if words and (len(words) == len(distinct) or len(distinct) <= MIXED):
        note = ""
        if len(words) < len(distinct):
            note = f"{name} holds numbers and texts such as {words[0]!r}: taken as a category"
        elif all(is_number(word.replace(",", ".", 1)) for word in words):
            note = (
                f"{name} holds texts such as {words[0]!r}: taken as a category; write 1.5, not 1,5"
            )
        return _category(text, distinct, missing), note
    return _number(name, numbers(series), missing)


def _category(text: "Series", distinct: list[str], missing: bool) -> Column:
    rows = len(text.drop_nulls())
    if len(distinct) > SIZES[4] - 2 or len(distinct) > max(ROWS, 0.9 * rows):
        raise ValueError(
            f"the column {text.name!r} has {len(distinct)} different texts in {rows} rows, too"
            f" many for a category; {LEAVE_OUT}"
        )
    return Column(text.name, "category", categories=tuple(distinct), missing=missing)


def _number(name: str, values: np.ndarray, missing: bool) -> tuple[Column, str]:
    known = np.unique(values[~np.isnan(values)])
    precision = lattice(known)
    if precision is not None:
        low, high = float(known[0]), float(known[-1])
        return Column(name, "rounded", precision, low, high, missing=missing), ""
    column = Column(name, "real", missing=missing)
    rows = int((~np.isnan(values)).sum())
    if len(known) <= 0.9 * rows:
        return column, (
            f"{name} has {len(known)} different values in {rows} rows: a density can grow without"
            " bound at values that repeat; declare its precision with --schema"
        )
    return column, ""


def lattice(values: np.ndarray) -> float | None:
    """The largest distance whose multiples all differences of the sorted values are, if there is
    one with at most 6 decimals and not too many points.

    >>> lattice(np.array([0.62, 0.66, 0.76]))
    0.02
    """
    for decimals in range(DECIMALS + 1):
        scaled = values * 10**decimals
        whole = np.rint(scaled)
        if np.abs(whole).max() > FURTHEST:
            return None
        steps = np.diff(whole)
        if (np.abs(scaled - whole) < 1e-6).all() and (steps > 0).all():
            step = int(np.gcd.reduce(steps.astype(np.int64))) or 1  # of one value alone
            points = (whole[-1] - whole[0]) / step + 1
            return round(step / 10**decimals, decimals) if points <= FINEST else None
    return None
