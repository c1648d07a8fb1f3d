"""Inspect a data set before training: its schema, its columns, and obstacles to a likelihood."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nelbo import data
from nelbo.data import coerce
from nelbo.data.columns import Column
from nelbo.data.remote import here
from nelbo.data.schema import Schema
from nelbo.data.sources import Declaration, Source, Splits
from nelbo.data.splits import declare
from nelbo.data.tabular import cells, streams, tables
from nelbo.data.tabular.datasets import declaration, is_table, stream_of
from nelbo.data.tabular.encoding import texts_of
from nelbo.data.tabular.identifiers import Evidence
from nelbo.data.tabular.inference import complete, listed
from nelbo.data.tabular.table import Table

if TYPE_CHECKING:
    from polars import DataFrame, Series


SHOWN = 3  # most frequent categories to show


@dataclass(frozen=True)
class ColumnReport:
    """Description of one column; `column` is None if it cannot be modelled.

    Args:
        name: its heading.
        kind: its kind, in words.
        values: its range or its most frequent values.
        distinct: number of distinct values; None if there are too many rows to count.
        missing: number of empty cells; None if there are too many rows to count.
        column: the column as a model uses it.
    """

    name: str
    kind: str
    values: str
    distinct: int | None
    missing: int | None
    column: Column | None


@dataclass(frozen=True)
class Inspection:
    """Description of a data set.

    Args:
        source: name of the source.
        rows: number of examples.
        columns: the columns of a table; empty for other data.
        schema: the schema of a model, with the columns that can be modelled; None if there are
            none.
        warnings: properties that make a likelihood meaningless, and surprising interpretations.
        splits: number of examples in each split of data other than a table.
    """

    source: str
    rows: int
    columns: tuple[ColumnReport, ...]
    schema: Schema | None
    warnings: tuple[str, ...]
    splits: dict[str, int]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; `--schema` accepts the value of "schema"."""
        counts = [
            {"name": c.name, "distinct": c.distinct, "missing": c.missing} for c in self.columns
        ]
        return {
            "source": self.source,
            "rows": self.rows,
            "schema": None if self.schema is None else self.schema.to_dict(),
            "counts": counts,
            "warnings": list(self.warnings),
            "splits": self.splits,
        }


def inspect(
    source: Source,
    *,
    levels: int | None = None,
    size: int | None = None,
    schema: Declaration = None,
    splits: Splits | None = None,
) -> Inspection:
    """Inspect the data at `source`; arguments as for `nelbo.data.load`.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it cannot be read.
    """
    source = coerce.plain(here(source) if isinstance(source, str) else source)
    named = declare(splits)
    streamed = stream_of(source, named)
    if streamed is not None:
        return _inspect_stream(streamed, schema)
    if not is_table(source, named):
        found = data.load(source, levels=levels, size=size, schema=schema, splits=splits)
        sizes = {name: len(x) for name, x in found.splits.items()}
        rows = sum(sizes.values())
        warnings = (*found.notes, *_repeated(found))
        return Inspection(found.source, rows, (), found.schema, warnings, sizes)
    notes: list[str] = []
    name, frame = tables.find(source, notes)
    stated = declaration(schema)
    declared = None if stated is None else listed(stated, frame.columns)
    stored = tables.stored_index(Path(source)) if isinstance(source, str | PathLike) else ()
    inspected = inspect_table(frame, name, declared, stored)
    return replace(inspected, warnings=(*notes, *inspected.warnings))


def _repeated(found: data.Dataset) -> list[str]:
    """Return notes on repeated rows and values, at which a density of reals can grow without
    bound."""
    if found.schema.kind != "real":
        return []
    x = np.concatenate([split.flatten(1).numpy() for split in found.splits.values()])
    notes = []
    copies = len(x) - len(np.unique(x, axis=0))
    if copies:
        notes.append(
            f"{copies} of {len(x)} examples are copies of others: a density can grow without bound"
            " there, and copies may fall into both training and test"
        )
    repeating = sum(len(np.unique(column)) <= 0.9 * len(x) for column in x.T)
    if repeating:
        notes.append(
            f"in {repeating} of {x.shape[1]} dimensions values repeat: a density can grow without"
            " bound there; save numbers that are counted as integers, or add noise"
        )
    return notes


def _inspect_stream(table: Table, schema: Declaration) -> Inspection:
    """Inspect a table that is read in blocks, in one pass and without counting distinct values."""
    columns, notes = streams.infer(table, declaration(schema))
    reports = []
    for column in columns:
        few = ", ".join(column.categories[:SHOWN]) + (", .." * (len(column.categories) > SHOWN))
        values = few if column.low is None else f"{column.low:g} .. {column.high:g}"
        missing = None if column.missing else 0
        reports.append(ColumnReport(column.name, _kind(column), values, None, missing, column))
    whole = "copies of rows are not looked for in a table that is read in blocks"
    sizes = {name: count for name, (_, count) in table.parts.items()}
    found = Schema.of_table(columns, table.names) if columns else None
    return Inspection(
        table.name, table.count, tuple(reports), found, (*table.notes, *notes, whole), sizes
    )


def inspect_table(
    frame: "DataFrame",
    source: str,
    declared: list[dict] | None = None,
    stored: Collection[str] = (),
) -> Inspection:
    """Inspect a table; a column that cannot be modelled becomes a warning."""
    reports, warnings = [], []
    names = [each["name"] for each in declared] if declared else frame.columns
    for each in declared or [{"name": name} for name in names]:
        column: Column | None = None
        series = frame[each["name"]]
        seen = Evidence(series.name, series.name in stored)
        if declared is None and seen.add(series).reason:
            reports.append(_report(series, None))
            warnings.append(seen.reason)
            continue
        try:
            ((column,), notes) = complete(frame, [each])
            notes += [seen.note] * bool(declared is None and seen.note)
        except ValueError as error:
            if len(each) > 1:  # a declaration must be valid
                raise
            notes = [str(error)]
        reports.append(_report(frame[each["name"]], column))
        warnings += notes
    columns = [report.column for report in reports if report.column is not None]
    copies = frame.height - frame.select(names).n_unique()
    if copies and any(column.kind == "real" for column in columns):
        warnings.append(
            f"{copies} of {frame.height} rows are copies of others: a density of real columns can"
            " grow without bound there, and copies may fall into both training and test"
        )
    schema = Schema.of_table(columns, frame.columns) if columns else None
    return Inspection(source, frame.height, tuple(reports), schema, tuple(warnings), {})


def _report(series: "Series", column: Column | None) -> ColumnReport:
    known = (series if column is None else texts_of(series, column)).drop_nulls()
    values = ""
    if column is not None and column.kind in ("real", "rounded"):
        number = cells.numbers(series, words=column.missing_words)
        number = number[number == number]
        values = f"{number.min():g} .. {number.max():g}"
    elif column is not None:
        most = known.value_counts(sort=True)
        names = [f"{v} {100 * n / len(known):.0f}%" for v, n in most.head(SHOWN).iter_rows()]
        values = ", ".join(names) + (", .." if len(most) > SHOWN else "")
    return ColumnReport(
        series.name, _kind(column), values, known.n_unique(), len(series) - len(known), column
    )


def _kind(column: Column | None) -> str:
    if column is None:
        return "not usable as it is"
    if column.kind == "rounded":
        many = f"{column.points} levels" if column.group == "levels" else f"{column.points} cells"
        return f"{_lattice(column)}, {many}{_scale(column)}"
    if column.kind == "category":
        return f"category of {len(column.categories)}"
    return column.kind + _scale(column)


def _lattice(column: Column) -> str:
    """Describe a lattice; one may be shifted from zero: 1.5, 2.5, 3.5 are not integers."""
    assert column.precision is not None and column.low is not None
    if abs(math.remainder(column.low, column.precision)) > 1e-5 * column.precision:
        return f"steps of {column.precision:g} from {column.low:g}"
    return "integer" if column.precision == 1 else f"rounded to {column.precision:g}"


def _scale(column: Column) -> str:
    return "" if column.transform == "standardise" else f", {column.transform}"
