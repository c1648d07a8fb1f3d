"""Data sets of tables: from files, from frames in memory, and from `datasets`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from nelbo._utils import limits
from nelbo.data import coerce, conditions
from nelbo.data.columns import Column
from nelbo.data.conform import split
from nelbo.data.found import Found
from nelbo.data.readers import hub, hub_tables
from nelbo.data.schema import Dataset, Schema
from nelbo.data.splits import Declared
from nelbo.data.tabular import encoding, files, streams, tables
from nelbo.data.tabular.inference import complete, infer_columns, typed
from nelbo.data.tabular.table import InSplits, Table

if TYPE_CHECKING:
    from nelbo.data.sources import Declaration, Source
    from nelbo.data.tabular.tables import Frame


def is_table(source: "Source", splits: Declared | None = None) -> bool:
    """Return whether a source is a table, or a folder of its shards."""
    if hub.is_hub(source):
        return hub_tables.table(cast("str | hub.Opened", source), splits) is not None
    if not isinstance(source, str | PathLike):
        return coerce.is_table(source)
    path = Path(source)
    _check_name(path)
    return path.suffix.lower() in tables.FILES or (path.is_dir() and bool(files.shards_of(path)))


def _check_name(path: Path) -> None:
    """Raise ValueError on a text that no file can be named, such as the data themselves."""
    try:
        path.exists()
    except OSError:  # longer than names can be
        raise ValueError(
            f"data is a text of {len(str(path))} characters where the name of a file is expected;"
            " if it is the data, give a list of texts, as in [text]"
        ) from None


def stream_of(source: "Source", splits: Declared | None = None) -> Table | None:
    """Return the table if it is to be read in blocks of rows, or has splits, else None."""
    if hub.is_hub(source):
        return hub_tables.table(cast("str | hub.Opened", source), splits)
    if coerce.in_splits(source):
        frames = cast("Mapping[str, Frame]", source)
        return InSplits({name: tables.frame_of(each) for name, each in frames.items()})
    path = Path(source).absolute() if isinstance(source, str | PathLike) else None
    if splits is not None and (path is None or path.is_file()):
        raise ValueError(
            f"{coerce.name_of(source)} is one table, without named parts; leave splits out"
        )
    return None if path is None else files.find(path, splits)


def read_as_text(source: "Source") -> bool:
    """Return whether a table is a text file, whose cells have no types."""
    if not isinstance(source, str | PathLike) or hub.is_hub(source):
        return False
    return Path(source).suffix.lower() in tables.SEPARATORS


def schema_of(frame: "Frame") -> tuple[Schema, list[str]]:
    """Return the schema that is inferred from all cells of a frame, and notes.

    Raises:
        ValueError: as for `load`, or no column is left to model.
    """
    notes: list[str] = []
    name, table = tables.find(frame, notes)
    columns, guesses = infer_columns(table)
    refuse_empty(columns, name, guesses)
    schema = Schema.of_table(typed(columns, table.schema), table.columns)
    return schema, [*notes, *guesses]


def refuse_empty(columns: Sequence[Column], name: str, notes: Sequence[str]) -> None:
    """Raise ValueError with the reason if no column is left to be modelled."""
    if not columns:
        raise ValueError(f"no column of {name} is left to model: {notes[0]}")


def declaration(schema: "Declaration") -> object:
    """Return the schema of a table as parsed JSON: the content of a file, or what is given."""
    if isinstance(schema, Schema):
        return schema.to_dict()["columns"]
    return limits.read_json(Path(schema)) if isinstance(schema, str | PathLike) else schema


def load(
    source: "Source",
    levels: int | None,
    size: int | None,
    seed: int,
    schema: "Declaration",
    condition: Sequence[str],
    declared: Declared | None,
) -> Dataset:
    """Load a table to train on; arguments and errors as for `sources.load`."""
    for option, value in (("levels", levels), ("size", size)):
        if value is not None:
            raise ValueError(
                f"--{option} is for arrays and images; {coerce.name_of(source)} is a table;"
                " describe its columns with --schema"
            )
    table = stream_of(source, declared)
    if table is not None and not condition:
        return _load_stream(table, schema, seed)
    notes: list[str] = []
    name, frame = tables.find(source, notes) if table is None else (table.name, table.whole())
    parts, of_cells = _parts_of(table), {}
    noted: list[str] = []  # columns left out, with a note
    if isinstance(schema, Schema):
        cells = {label.name: conditions.cells_like(frame, label) for label in schema.condition}
    else:
        stated = declaration(schema)
        cells, rest, of_labels = conditions.taken_from(frame, condition, stated, name)
        others = frame.drop(*condition)
        if rest is None:
            columns, guesses = infer_columns(others, _stored(source, table))
            refuse_empty(columns, name, guesses)
            noted = [name for name in others.columns if all(name != c.name for c in columns)]
        else:
            columns, guesses = complete(others, rest if condition else stated)
        schema = Schema.of_table(columns, frame.columns)
        notes = [*notes, *guesses, *of_labels]
    for label in condition:
        of_cells[label] = {part: cells[label][rows] for part, rows in parts.items()}
    of_examples = frame.drop(*condition, *noted)
    if not read_as_text(source):
        schema = replace(schema, columns=tuple(typed(schema.columns, frame.schema)))
    rows, taken = encoding.encode(of_examples, schema.columns, name, rounding=True)
    x = torch.from_numpy(rows)
    splits, how = split({part: x[few] for part, few in parts.items()}, name, seed)
    found = Found(name, {part: rows[few] for part, few in parts.items()}, labels=of_cells)
    labels, stored, unseen = conditions.infer_labels(found, condition, seed)
    schema = replace(schema, condition=labels)
    guessed = () if table is None else table.notes
    return Dataset(name, schema, splits, (*guessed, *notes, *taken, *how, *unseen), stored)


def _load_stream(table: Table, schema: "Declaration", seed: int) -> Dataset:
    notes: list[str] = []
    if not isinstance(schema, Schema):
        declared = declaration(schema)
        columns, notes = streams.infer(table, declared)
        refuse_empty(columns, table.name, notes)
        columns = typed(columns, table.read(0, 1, table.names).schema)
        schema = Schema.of_table(columns, table.names)
    splits, how = streams.splits(table, schema.columns, seed)
    return Dataset(table.name, schema, splits, (*notes, *how))


def load_like(source: "Source", schema: Schema, declared: Declared | None) -> Dataset:
    """Load a table to evaluate a model of a schema on; as `sources.load_like`."""
    if schema.kind != "table":
        shape = ", ".join(map(str, schema.shape))
        kind = "text" if schema.text else f"examples (N, {shape})"
        what = source if isinstance(source, str | PathLike) else coerce.NAME
        raise ValueError(f"{what} is a table, and the model takes {kind}; give it {kind}")
    rows = cast(Any, source).index if hasattr(source, "iloc") else ()  # of pandas
    if all(column.name in rows for column in schema.columns):
        raise ValueError(
            "the data is a series of the cells of one row; give a frame of one row, as in"
            " df.iloc[[0]]"
        )
    table = stream_of(source, declared)
    if table is not None and not schema.condition:
        notes = _unknown(table.names, schema)
        return Dataset(table.name, schema, streams.measured(table, schema.columns), tuple(notes))
    notes = []
    name, frame = tables.find(source, notes) if table is None else (table.name, table.whole())
    notes += _unknown(frame.columns, schema)
    unseen = encoding.Unseen()
    rows, _ = encoding.encode(frame, schema.columns, name, unseen=unseen)
    x, labels = torch.from_numpy(rows), conditions.labels_of(frame, schema, name)
    parts = _parts_of(table) | {"all": slice(None)}
    stored = {} if labels is None else {part: labels[few] for part, few in parts.items()}
    splits = {part: x[few] for part, few in parts.items()}
    return Dataset(name, schema, splits, (*notes, *unseen.notes()), stored)


def _stored(source: "Source", table: Table | None) -> Sequence[str]:
    """Return the columns that a source declares to be an index."""
    if table is not None:
        return table.stored
    return tables.stored_index(Path(source)) if isinstance(source, str | PathLike) else ()


def _unknown(names: Sequence[str], schema: Schema) -> list[str]:
    """Return a note on columns that training did not have."""
    known = {*schema.left_out, *(column.name for column in schema.columns)}
    known.update(label.name for label in schema.condition)
    new = ", ".join(repr(name) for name in names if name not in known)
    return [f"columns that training did not have are left out: {new}"] if new else []


def _parts_of(table: Table | None) -> dict[str, slice]:
    """Return the rows of each split of a table, or of "all"."""
    parts = {} if table is None else table.parts
    return {k: slice(n, n + m) for k, (n, m) in parts.items()} or {"all": slice(None)}
