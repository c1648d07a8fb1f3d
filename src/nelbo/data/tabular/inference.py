"""Infer the columns of a table from their cells.

A column is numeric if all its cells are numbers. The numbers are rounded if they lie on a lattice:
the precision is the largest distance of which all differences are multiples, so that a density
derived from the probabilities is not higher than the data justify.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nelbo.data.columns import POINTS, SIZES, Column
from nelbo.data.tabular.cells import (
    LEAVE_OUT,
    missing_words,
    numbers,
    off_lattice,
    slack,
    texts,
    words_note,
)
from nelbo.data.tabular.dtypes import categories_of, describe
from nelbo.data.tabular.identifiers import Evidence, identifies, name_rows
from nelbo.data.tabular.spelling import (
    TRUTH,
    canonical,
    codes,
    is_number,
    number_advice,
    spellings,
    thousands_advice,
)

if TYPE_CHECKING:
    from polars import DataFrame, DataType, Series

DECIMALS = 6  # maximal decimals of a lattice
FINEST = 10**7  # maximal points of a lattice
FURTHEST = 10**10  # maximal distance of a point from 0, where float64 still resolves 1e-6
MIXED = 64  # distinct texts up to which numbers and words together make a category


def infer_columns(
    frame: "DataFrame", stored: Collection[str] = ()
) -> tuple[list[Column], list[str]]:
    """Return the columns of a table except those that identify rows (`identifiers`), and notes.

    Args:
        frame: the table.
        stored: columns that the source declares to be an index.

    Raises:
        ValueError: a column has no value, infinite numbers, or too many texts.
    """
    columns, notes = [], []
    for series in frame:
        seen = Evidence(series.name, series.name in stored).add(series)
        if seen.reason:
            notes.append(seen.reason)
            continue
        column, notes_of_column = infer_column(series)
        columns.append(column)
        notes += [*filter(None, [seen.note]), *notes_of_column]
    return columns, notes


def complete(frame: "DataFrame", declared: object) -> tuple[list[Column], list[str]]:
    """Return the columns that a user declares, completed from the cells, and notes.

    Args:
        frame: the table.
        declared: parsed JSON: a list with an object for each column to be used, or an object with
            this list as "columns": "name" and any of the other keys of a `Column`. A key
            "missing_words" of the object applies to all columns that have none; without "columns",
            all columns are used.

    Raises:
        ValueError: it has another form, names a missing column, or cannot be completed.
    """
    used = listed(declared, frame.columns)
    if not _names_columns(declared):
        used = [each for each in used if not identifies(frame[each["name"]])]
    found = [_complete(frame[each["name"]], each) for each in used]
    return [column for column, _ in found], [note for _, notes in found for note in notes]


def _names_columns(declared: object) -> bool:
    """Return whether a schema selects columns."""
    if isinstance(declared, Mapping):
        declared = declared.get("schema", declared)
    return not isinstance(declared, Mapping) or "columns" in declared


def listed(declared: object, names: Sequence[str]) -> list[dict]:
    """Return the objects of a schema for a table with columns of these names; as for
    `complete`."""
    if isinstance(declared, Mapping):
        declared = declared.get("schema", declared)
    of_all = {}
    if isinstance(declared, Mapping):
        of_all = {k: v for k, v in declared.items() if k == "missing_words"}
        declared = declared.get("columns", [{"name": name} for name in names] if of_all else None)
    if not isinstance(declared, list) or not all(isinstance(each, dict) for each in declared):
        raise ValueError(
            'a schema is a list of columns such as {"name": "age", "kind": "rounded",'
            ' "precision": 1}, or an object with it as "columns"'
        )
    for each in declared:
        if each.get("name") not in names:
            raise ValueError(
                f"the schema has the column {each.get('name')!r}; the table has"
                f" {', '.join(map(repr, names))}"
            )
    return [of_all | each for each in declared]


def _complete(series: "Series", declared: dict) -> tuple[Column, list[str]]:
    words, keep = declared.get("missing_words"), declared.get("categories", ())
    Column(series.name, "real", missing_words=words)  # raises if these are not words
    notes = [] if words is not None else _of_words(series, keep)
    if "kind" not in declared:
        column, note = infer(series, words, asked=True)
        declared = column.to_dict() | declared
        notes = [note] * bool(note) + notes
    text = texts(series, words, keep)
    found: dict[str, object] = {"missing": bool(text.is_null().any())}
    if declared["kind"] in ("category", "boolean"):
        found["categories"] = spellings(text.drop_nulls().unique().to_list())
    if declared["kind"] == "rounded":
        values = numbers(series, words=words)
        known = np.unique(values[~np.isnan(values)])
        precision = declared.get("precision", lattice(known) if len(known) > 1 else 1.0)
        if not isinstance(precision, int | float) or not 0 < precision < 1e300:
            raise ValueError(
                f"the precision of the column {series.name!r} must be positive; got {precision!r}"
            )
        found["precision"] = float(precision)
        if len(known):
            found |= _ends(series.name, known, float(precision), declared.get("low"))
        elif not {"low", "high"} <= declared.keys():
            raise ValueError(
                f"the column {series.name!r} has no value in any row; {LEAVE_OUT}, or declare its"
                " low and high"
            )
    if declared["kind"] == "real":
        found["range"] = _range(numbers(series, words=words))
    return Column.from_dict(found | declared, f"the column {series.name!r}"), notes


def _ends(name: str, known: np.ndarray, precision: float, own: object) -> dict[str, object]:
    """Return the ends of the lattice of sorted numbers, and whether any number is rounded to it.

    `own` is the lower end that the user declares.
    """
    if not np.abs(known).max() / POINTS < precision:
        raise ValueError(
            f"the precision {precision:g} of the column {name!r} is too fine for numbers such as"
            f" {known[-1]:g}; give a coarser one, or take the column as real"
        )
    points = np.rint(known[[0, -1]] / precision) * precision
    low, high = (round(float(end), 12) for end in points)
    first = own if isinstance(own, int | float) else low
    rounds = bool(off_lattice(known, precision, first)[1].any())
    return {"low": low, "high": high, "rounds": rounds}


def _range(values: np.ndarray) -> tuple[float, float] | None:
    """Return the smallest and the largest of some numbers, ignoring NaN."""
    known = values[~np.isnan(values)]
    return (float(known.min()), float(known.max())) if len(known) else None


def typed(columns: Iterable[Column], types: "Mapping[str, DataType]") -> list[Column]:
    """Return columns with the types of their source, unless their types are declared."""
    return [
        replace(c, dtype=c.dtype or describe(types[c.name])) if c.name in types else c
        for c in columns
    ]


def infer_column(series: "Series") -> tuple[Column, list[str]]:
    """Return the column inferred from its cells, and notes; as for `infer_columns`."""
    column, note = infer(series)
    return column, [note] * bool(note) + _of_words(series)


def _of_words(series: "Series", keep: Collection[str] = ()) -> list[str]:
    words = missing_words(series, keep=keep)
    return [words_note(series.name, words)] if words else []


def infer(
    series: "Series", words: Collection[str] | None = None, asked: bool = False
) -> tuple[Column, str]:
    """Return the column inferred from its cells, where `words` mean missing cells, and a note or
    "".

    Texts that identify the rows become a category only if `asked`.
    """
    name = series.name
    if (declared := categories_of(series.dtype)) is not None:
        return _declared_category(series, words, declared)
    if series.dtype.is_numeric():
        values = numbers(series, words=words)
        absent = np.isnan(values)
        if len(np.unique(values[~absent])) > 2:  # needs no conversion to text
            return _number(name, values, bool(absent.any()))
    text = texts(series, words)
    every = sorted(text.drop_nulls().unique().to_list())
    missing = bool(text.is_null().any())
    if not every:
        raise ValueError(f"the column {name!r} has no value in any row; {LEAVE_OUT}")
    few = spellings(every) if len(every) <= MIXED else every
    if len(few) == 1:
        column = Column(name, "category", categories=(few[0],), missing=missing)
        return column, f"{name} is always {few[0]}"
    if {canonical(value) for value in few[:3]} in TRUTH:
        return Column(name, "boolean", categories=tuple(few), missing=missing), ""
    odd = [value for value in every if not is_number(value)]
    if codes(every) or (odd and (len(odd) == len(every) or len(few) <= MIXED)):
        few = spellings(every)
        note = _of_texts(name, every, odd)
        column = _category(text, few, missing, note, asked)
        return column, "; ".join(filter(None, (note, _of_spellings(name, every, few))))
    if odd and (advice := number_advice(odd)):
        raise ValueError(f"the column {name!r} holds texts such as {odd[0]!r}: {advice}")
    column, note = _number(name, numbers(series, words=words), missing)
    written = str(series.dtype) == "String"
    grouped = f"{name}: {advice}" if written and (advice := thousands_advice(every)) else ""
    return column, "; ".join(filter(None, (grouped, note)))


def _declared_category(
    series: "Series", words: Collection[str] | None, declared: list[str]
) -> tuple[Column, str]:
    """Return a category if its type says so, whatever its cells look like."""
    text = texts(series, words)
    found = {*declared, *text.drop_nulls().unique()}
    if not found:
        raise ValueError(f"the column {series.name!r} has no value in any row; {LEAVE_OUT}")
    column, note = _category(text, sorted(found), bool(text.is_null().any()), "", True), ""
    if len(found) == 1:
        note = f"{series.name} is always {column.categories[0]}"
    return column, note


def _of_texts(name: str, values: list[str], odd: list[str]) -> str:
    """Return the note on a column of texts that are not all numbers; "" if there is none."""
    if odd and (advice := number_advice(odd)):
        return f"{name} holds texts such as {odd[0]!r}: taken as a category; {advice}"
    if odd and len(odd) < len(values):
        return f"{name} holds numbers and texts such as {odd[0]!r}: taken as a category"
    if like_numbers := codes(values):
        return (
            f"{name} holds codes such as {like_numbers[0]!r}: taken as a category; if they are"
            ' numbers, declare "kind": "rounded" for the column with --schema'
        )
    return ""


def _of_spellings(name: str, values: list[str], distinct: list[str]) -> str:
    """Return the note on a column that spells one value in two ways; "" if there is none."""
    known = {*distinct}
    other = next((value for value in values if value not in known), None)
    if other is None:
        return ""
    own = next(value for value in distinct if canonical(value) == canonical(other))
    return f"{name} writes one value as {own!r} and as {other!r}: treated as the same"


def _category(
    text: "Series", distinct: list[str], missing: bool, note: str, asked: bool
) -> Column:
    rows = len(text.drop_nulls())
    if len(distinct) > SIZES[4] - 2 or (not asked and name_rows(len(distinct), rows)):
        guess = note.removeprefix(text.name).strip().replace(": taken as a category", "")
        because = f"; it {guess}" if note else ""
        raise ValueError(
            f"the column {text.name!r} has {len(distinct)} different texts in {rows} rows, too"
            f" many for a category; {LEAVE_OUT}{because}"
        )
    return Column(text.name, "category", categories=tuple(distinct), missing=missing)


def _number(name: str, values: np.ndarray, missing: bool) -> tuple[Column, str]:
    known = np.unique(values[~np.isnan(values)])
    if (found := _lattice(known)) is not None:
        precision, low, high = found
        return Column(name, "rounded", precision, low, high, missing=missing), ""
    column = Column(name, "real", missing=missing, range=_range(values))
    rows = int((~np.isnan(values)).sum())
    if len(known) <= 0.9 * rows:
        return column, (
            f"{name} has {len(known)} different values in {rows} rows: a density can grow without"
            " bound at values that repeat; declare its precision with --schema"
        )
    return column, ""


def lattice(values: np.ndarray) -> float | None:
    """Return the largest distance of which all differences of the sorted values are multiples.

    Return None if it has more than 6 decimals or too many points.

    >>> lattice(np.array([0.62, 0.66, 0.76]))
    0.02
    """
    found = _lattice(values)
    return None if found is None else found[0]


def _lattice(values: np.ndarray) -> tuple[float, float, float] | None:
    """Return the distance, and the smallest and the largest value as points; or None."""
    for decimals in range(DECIMALS + 1):
        scaled = values * 10**decimals
        whole = np.rint(scaled)
        if np.abs(whole).max() > FURTHEST:
            return None
        steps = np.diff(whole)
        error = 1e-6 + 10**decimals * slack(values, 10**-decimals)
        if (np.abs(scaled - whole) < error).all() and (steps > 0).all():
            step = int(np.gcd.reduce(steps.astype(np.int64))) or 1  # 1 for a single value
            if (whole[-1] - whole[0]) / step + 1 > FINEST:
                return None
            ends = (round(float(values[i]), decimals) for i in (0, -1))
            return round(step / 10**decimals, decimals), *ends
    return None
