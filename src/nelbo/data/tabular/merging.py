"""Infer the columns of a table that comes in chunks: each chunk's columns, merged."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nelbo.data.columns import SIZES, Column
from nelbo.data.tabular.cells import LEAVE_OUT, missing_words, texts, words_note
from nelbo.data.tabular.identifiers import Evidence
from nelbo.data.tabular.inference import complete, infer, lattice, listed
from nelbo.data.tabular.spelling import TRUTH, canonical, codes, is_number, spellings

if TYPE_CHECKING:
    from polars import DataFrame, Series


def infer_merged(
    chunks: Iterable["DataFrame"], stored: Collection[str] = ()
) -> tuple[list[Column], list[str]]:
    """Return the columns of a table that comes in chunks, as for `inference.infer_columns`.

    Raises:
        ValueError: as for `infer_columns`; also numbers in one chunk and texts in another.
    """
    found: dict[str, Column | None] = {}
    notes: dict[str, str] = {}
    words: dict[str, set[str]] = {}
    seen: dict[str, Evidence] = {}
    wrong: dict[str, ValueError] = {}
    for frame in chunks:
        for name in frame.columns:
            seen.setdefault(name, Evidence(name, name in stored)).add(frame[name])
            if seen[name].stored or name in wrong:
                continue
            try:
                column, note = _infer_some(frame[name])
                found[name] = _merge_some(found[name], column) if name in found else column
            except ValueError as error:  # raised below, unless the column identifies rows
                wrong[name] = error
                continue
            notes.setdefault(name, note)
            words.setdefault(name, set()).update(missing_words(frame[name]))
    left = {name: each.reason for name, each in seen.items() if each.reason}
    for name, reason in wrong.items():
        if name not in left:
            raise reason
    for kept in (found, notes, words):
        for name in left:
            kept.pop(name, None)
    for name, column in found.items():
        if column is None:
            raise ValueError(f"the column {name!r} has no value in any row; {LEAVE_OUT}")
        if len(column.categories) == 1:
            notes[name] = f"{name} is always {column.categories[0]}"
    of_words = [words_note(name, sorted(some)) for name, some in words.items() if some]
    own = [seen[name].note for name in found]
    all_notes = [*left.values(), *filter(None, own), *filter(None, notes.values()), *of_words]
    return [column for column in found.values() if column], all_notes


def complete_columns(
    chunks: Iterable["DataFrame"], declared: object
) -> tuple[list[Column], list[str]]:
    """Return the declared columns of a table that comes in chunks, as for `inference.complete`."""
    found: list[Column] = []
    notes_found: dict[str, None] = {}
    for frame in chunks:
        kinds = ["kind" in each for each in listed(declared, frame.columns)]
        some, notes = complete(frame, declared)
        notes_found |= dict.fromkeys(notes)
        found = [*map(merge, found, some, kinds)] if found else some
    return found, list(notes_found)


def _infer_some(series: "Series") -> tuple[Column | None, str]:
    """Return the column of some rows and a note; no column if all cells are missing."""
    if texts(series).is_null().all():
        return None, ""
    column, note = infer(series)
    return column, "" if len(column.categories) == 1 else note


def _merge_some(a: Column | None, b: Column | None) -> Column | None:
    if a is None or b is None:
        column = a or b
        return None if column is None else replace(column, missing=True)
    return merge(a, b)


def merge(a: Column, b: Column, declared: bool = False) -> Column:
    """Return the column that is `a` in some rows and `b` in the others.

    Args:
        a: the column in some rows.
        b: the column in the others.
        declared: whether a user declared the kind, which both share then.

    Raises:
        ValueError: one has numbers and the other texts.
    """
    kept = replace(a, missing=a.missing or b.missing)
    if a.categories and b.categories:
        distinct = spellings({*a.categories, *b.categories})
        numeric = all(map(is_number, distinct)) and not codes(distinct)
        if a.kind == b.kind == "category" and (declared or not (numeric and len(distinct) > 1)):
            return _few(replace(kept, categories=tuple(distinct)))
        if {canonical(value) for value in distinct} in TRUTH:
            return replace(kept, kind="boolean", categories=tuple(distinct))
        if not numeric:
            return _few(replace(kept, kind="category", categories=tuple(distinct)))
    values = [value for column in (a, b) for value in column.categories]
    words = [v for v in values if not is_number(v)] or codes(values)
    if words:
        raise ValueError(
            f"the column {a.name!r} holds numbers in some rows and texts such as {words[0]!r} in"
            " others; fix it, or declare it a category with --schema"
        )
    real = replace(
        kept,
        kind="real",
        precision=None,
        low=None,
        high=None,
        categories=(),
        rounds=False,
        range=_hull(a, b),
    )
    if "real" in (a.kind, b.kind):
        return real
    points = np.unique(np.concatenate([_points(a), _points(b)]))
    precision = lattice(points)
    if precision is None:
        return real
    low, high = float(points[0]), float(points[-1])
    rounded = replace(real, precision=precision, low=low, high=high, range=None, kind="rounded")
    return replace(rounded, rounds=a.rounds or b.rounds)


def _hull(a: Column, b: Column) -> tuple[float, float] | None:
    """Return the range of the numbers of both; None if one is unknown."""
    ends = []
    for column in (a, b):
        values = [float(value) for value in column.categories] or column.ends
        if values is None:
            return None
        ends += [min(values), max(values)]
    return min(ends), max(ends)


def _points(column: Column) -> np.ndarray:
    """Return points that span the lattice of numbers."""
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
