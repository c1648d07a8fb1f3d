"""Conditions of examples: labels beside arrays, and columns of a table, whose words and whole
numbers become classes as those of arrays do."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo.data.conform import split
from nelbo.data.found import Found
from nelbo.data.labels import codes, infer_label, missing, of_examples, standardised
from nelbo.data.schema import Label, Schema
from nelbo.data.tabular.cells import numbers, texts
from nelbo.data.tabular.frames import column_of
from nelbo.data.tabular.inference import complete, listed

if TYPE_CHECKING:
    from polars import DataFrame, Series

MISSING = ""  # class of an empty cell


def taken_from(
    frame: "DataFrame", names: Sequence[str], declared: object, where: str
) -> tuple[dict[str, np.ndarray], object, list[str]]:
    """Return the cells of the columns to condition on, the schema of the other columns, and notes.

    Args:
        frame: the table.
        names: names of the columns, which the schema may describe too.
        declared: the schema as parsed JSON, or None.
        where: name of the table for messages.

    Raises:
        ValueError: as for `cells_of`, or it is not a schema of the table.
    """
    every = [] if declared is None else listed(declared, frame.columns)
    of_each = {each["name"]: each for each in every if each["name"] in names}
    found = {name: cells_of(frame, name, of_each.get(name, {}), where) for name in names}
    rest = [each for each in every if each["name"] not in names]
    notes = [note for _, some in found.values() for note in some]
    return {k: v for k, (v, _) in found.items()}, None if declared is None else rest, notes


def cells_of(
    frame: "DataFrame", name: str, declared: dict, where: str
) -> tuple[np.ndarray, list[str]]:
    """Return the cells of a column to condition on, (N,), as words or as numbers, and notes.

    Args:
        frame: the table.
        name: name of the column.
        declared: its entry in the schema; its kind and its missing words are used.
        where: name of the table for messages.

    Raises:
        ValueError: there is no such column, or it cannot be a condition.
    """
    series = column_of(frame, name, where)
    (column,), notes = complete(frame, [{**declared, "name": name}])
    if column.missing_words:
        raise ValueError(
            f"the condition {name!r} has missing_words {list(column.missing_words)!r}, which are"
            " for the columns that are modelled; empty those cells in the data instead"
        )
    words = texts(series, column.missing_words, column.categories)
    if column.kind in ("category", "boolean"):
        return _filled(words), notes
    if "kind" in declared:
        return numbers(series), notes
    if not _are_integers(series, words):
        if column.precision is not None and column.precision.is_integer():
            reason = (
                "whole numbers of a real type are taken as a number; if they are classes, declare"
            )
            notes = [*notes, f'{name}: {reason} "kind": "category" for the column with --schema']
        return numbers(series), notes
    count = words.drop_nulls().n_unique()
    if count > max(len(words) // 2, 2):
        reason = f"has {count} different whole numbers in {len(words)} rows: taken as a number"
        return numbers(series), [*notes, f"{name} {reason}"]
    reason = f"whole numbers are taken as {count} classes; if they are measurements, declare"
    return _filled(words), [
        *notes,
        f'{name}: {reason} "kind": "real" for the column with --schema',
    ]


def cells_like(frame: "DataFrame", label: Label) -> np.ndarray:
    """Return the cells of a column on which a model is conditioned, as for `cells_of`."""
    series = column_of(frame, label.name, "the table")
    return _filled(texts(series, keep=label.classes)) if label.classes else numbers(series)


def _filled(words: "Series") -> np.ndarray:
    return np.array(words.fill_null(MISSING).to_list(), str)


def _are_integers(series: "Series", words: "Series") -> bool:
    """Return whether numbers are whole by their type, or by the way they are written."""
    if series.dtype.is_numeric():
        return series.dtype.is_integer()
    return bool(words.drop_nulls().str.contains(r"^[+-]?[0-9]+$").all())


def infer_labels(
    found: Found, names: Sequence[str], seed: int
) -> tuple[tuple[Label, ...], dict[str, Tensor], list[str]]:
    """Return the labels of these names, their values in each split, and notes on them."""
    labels = [infer_label(each, _labelled(found, each), found.source) for each in names]
    if not labels:
        return (), {}, []
    stored, _ = split(store_labels(found, labels), found.source, seed)
    train = stored["train"]
    labels = [standardised(label, train[:, i]) for i, label in enumerate(labels)]
    return tuple(labels), stored, [*_unseen(labels, train), *missing(labels, stored)]


def _labelled(found: Found, name: str) -> Mapping[str, np.ndarray]:
    """Return the values of one label, (N,) for each part."""
    if name not in found.labels:
        has = f"it has {', '.join(found.labels)}" if found.labels else "it has no labels"
        raise ValueError(f"{found.source} has no label {name!r} to condition on; {has}")
    return {
        part: of_examples(found.labels[name][part], len(x), name, found.label(part))
        for part, x in found.parts.items()
    }


def store_labels(found: Found, labels: Sequence[Label]) -> dict[str, Tensor]:
    """Return the labels of each part, (N, len(labels)), float64; {} without labels."""
    columns = {
        part: [
            codes(_labelled(found, each.name)[part], each, found.label(part)) for each in labels
        ]
        for part in found.parts
    }
    return {part: torch.stack(values, 1) for part, values in columns.items() if values}


def _unseen(labels: Sequence[Label], train: Tensor) -> list[str]:
    """Return a note for each label that has classes without a training example."""
    notes = []
    for label, values in zip(labels, train.unbind(1), strict=True):
        seen = set(values[~values.isnan()].long().tolist()) if label.classes else set()
        unseen = [name for i, name in enumerate(label.classes) if i not in seen]
        if unseen:
            notes.append(f"no training example has the {label.name} {', '.join(unseen)}")
    return notes


def labels_of(frame: "DataFrame", schema: Schema, name: str) -> Tensor | None:
    """Return the labels in the rows of a table, (N, len(schema.condition)); None without
    labels."""
    of_cells = {label.name: {"all": cells_like(frame, label)} for label in schema.condition}
    found = Found(name, {"all": np.empty((frame.height, 0))}, labels=of_cells)
    return store_labels(found, schema.condition).get("all")
