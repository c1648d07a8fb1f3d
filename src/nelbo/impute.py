"""The missing cells of a table's rows, drawn given the others.

The rows are conditioned on having no missing cell: that a cell is missing is one more state of
its column, and left out of the column's probabilities here, as is a category that training did
not have. The cells are then drawn by weighted particles, which near the model's conditional law
as they become many (`particles` says how). Where two or more cells of a row are drawn, that none
is missing is imposed on each as it is drawn, not on all at once.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from nelbo._progress import Track
from nelbo.checkpoint import Run
from nelbo.columns import LevelContext, SymbolContext
from nelbo.condition import given_labels
from nelbo.data import examples, tables
from nelbo.data.sources import labels_of
from nelbo.estimate import Grid
from nelbo.model import Model
from nelbo.numbers import NumberMixture
from nelbo.particles import conditional
from nelbo.product import ProductHead

if TYPE_CHECKING:
    from os import PathLike

    from polars import DataFrame

    from nelbo.data.tables import Frame


def impute(
    run: Run,
    rows: "str | PathLike[str] | Frame",
    times: Grid,
    *,
    seed: int = 0,
    particles: int = 32,
    track: Track = iter,
    tell: Callable[[str], object] = lambda line: None,
) -> "DataFrame":
    """The rows with their missing cells drawn given the others, by the model of a run.

    A word that is only guessed to mean a missing cell is kept; see `examples.holes`.

    Args:
        run: of a table.
        rows: a table with the columns of the run, found by name, and maybe others, which stay.
        times: the grid of the reverse process.
        seed: everything random follows from it; each seed is another draw.
        particles: candidates for each row, from which one is drawn; more are more exact.
        track: wraps the steps, for a progress bar.
        tell: called with a note on each column in which words mean missing cells.

    Raises:
        ValueError: the run is of no table, a column is not there, or a cell is none of its column.
    """
    schema = run.config.schema
    if not schema.columns:
        raise ValueError(f"cells are those of tables; the run {run.path} is of none")
    label, frame = tables.find(rows)
    unseen = examples.Unseen()
    encoded = examples.encode_holes(frame, schema.columns, label, unseen)
    x, known = (torch.from_numpy(v) for v in encoded)
    for note in (*examples.words_in_holes(frame, schema.columns), *unseen.notes()):
        tell(note)
    empty = [examples.holes(frame[c.name], c).to_numpy() for c in schema.columns]
    incomplete = torch.from_numpy(np.stack(empty, 1)).any(1)
    if not incomplete.any():
        return frame
    labels = labels_of(frame, schema, label)
    model = given_labels(present(run.model), labels, schema).at(incomplete)
    drawn = conditional(
        model,
        x[incomplete],
        known[incomplete],
        times,
        particles=particles,
        seed=seed,
        track=track,
    )
    x[incomplete] = drawn.cpu()
    return examples.filled(frame, examples.decode(x.numpy(), schema.columns), schema.columns)


def present(model: Model) -> Model:
    """A copy of a table's model under which no cell is missing and no category is new."""
    model = copy.deepcopy(model)
    assert isinstance(model.head, ProductHead)
    for head in model.head.parts:
        assert isinstance(head, LevelContext | SymbolContext | NumberMixture)
        head.exclude_missing()
    return model
