"""Rows of a table that are drawn: new ones, and the missing cells of given ones.

*New rows* lie in what training had: a row with a number beyond the range of its column, or with a
category that training did not have, is drawn again, whole. That is the model's law given that a
row lies there, for which its bound holds all the more; `as_modelled` is the model's own.

*Missing cells* are drawn given the others of their row. The rows are conditioned on having no
missing cell: that a cell is missing is one more state of its column, and left out of the column's
probabilities here, as is a category that training did not have. The cells are then drawn by
weighted particles, which near the model's conditional law as they become many (`particles` says
how). Where two or more cells of a row are drawn, that none is missing is imposed on each as it is
drawn, not on all at once.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.progress import Track
from nelbo.data import Schema
from nelbo.data.sources import labels_of
from nelbo.data.tabular import encoding, tables
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid
from nelbo.models.conditioning import labelled
from nelbo.sampling.samplers import LowAcceptanceError, ancestral, rejection
from nelbo.sampling.smc import conditional

if TYPE_CHECKING:
    from os import PathLike

    from polars import DataFrame

    from nelbo.data.tabular.tables import Frame


def sample_table(
    model: Model,
    schema: Schema,
    count: int,
    times: TimeGrid,
    *,
    seed: int = 0,
    condition: Tensor | None = None,
    as_modelled: bool = False,
    track: Track = iter,
    tell: Callable[[str], object] = lambda line: None,
) -> "DataFrame":
    """Draw new rows of a table.

    Args:
        model: of the rows.
        schema: of the table.
        count: of rows.
        times: the grid of the reverse process.
        seed: everything random follows from it.
        condition: c of each row, (count, F), where the model is one of P(x|c); see
            `Run.conditions`.
        as_modelled: draw from the model's own law, of which rows may lie outside what training
            had; a column that then holds "(other)" is of text.
        track: wraps the steps, for a progress bar.
        tell: called with a sentence on the rows that were drawn again.

    Raises:
        ValueError: the schema is of no table, or hardly any row of its model lies in what training
            had.
    """
    _check_table(schema)

    def draw(rows: Tensor, seed: int) -> Tensor:
        return ancestral(model, len(rows), times, seed, track, rows_of(condition, rows)).cpu()

    x = draw(torch.arange(count), seed) if as_modelled else within(draw, count, schema, seed, tell)
    return encoding.decode(x.numpy(), schema.columns)


def within(
    draw: Callable[[Tensor, int], Tensor],
    count: int,
    schema: Schema,
    seed: int,
    tell: Callable[[str], object] = lambda line: None,
) -> Tensor:
    """Samples of a table's rows in what training had; arguments as for `rejection`."""

    def inside(x: Tensor) -> Tensor:
        outside = encoding.outside_training(x.cpu().numpy(), schema.columns)
        return torch.from_numpy(~outside.any(1))

    try:
        found = rejection(draw, count, inside, seed)
    except LowAcceptanceError as error:
        raise ValueError(
            f"{error}, its ranges and categories: train longer, or take rows as the model has them"
            " with --as-modelled (as_modelled in Python)"
        ) from None
    tell(
        f"redrawn: {found.outside} of {found.drawn} rows ({found.outside / found.drawn:.1%}) had a"
        " number beyond the range of training or a category that it did not have; --as-modelled"
        " keeps them"
    )
    return found.x


def impute(
    model: Model,
    schema: Schema,
    rows: "str | PathLike[str] | Frame",
    times: TimeGrid,
    *,
    seed: int = 0,
    particles: int = 32,
    track: Track = iter,
    tell: Callable[[str], object] = lambda line: None,
) -> "DataFrame":
    """Draw the missing cells of rows given the others.

    A word that is only guessed to mean a missing cell is kept; see `examples.holes`.

    Args:
        model: of a table's rows.
        schema: of the table.
        rows: a table with the columns of the schema, found by name, and maybe others, which stay.
        times: the grid of the reverse process.
        seed: everything random follows from it; each seed is another draw.
        particles: candidates for each row, from which one is drawn; more are more exact.
        track: wraps the steps, for a progress bar.
        tell: called with a note on each column in which words mean missing cells.

    Raises:
        ValueError: the schema is of no table, a column is not there, or a cell is none of its
            column.
    """
    _check_table(schema)
    label, frame = tables.find(rows)
    unseen = encoding.Unseen()
    encoded = encoding.encode_holes(frame, schema.columns, label, unseen)
    x, known = (torch.from_numpy(v) for v in encoded)
    for note in (*encoding.words_in_holes(frame, schema.columns), *unseen.notes()):
        tell(note)
    empty = [encoding.holes(frame[c.name], c).to_numpy() for c in schema.columns]
    incomplete = torch.from_numpy(np.stack(empty, 1)).any(1)
    if not incomplete.any():
        return frame
    batch = labelled(x, labels_of(frame, schema, label), schema)
    drawn = conditional(
        present(model),
        batch[incomplete],
        known[incomplete],
        times,
        particles=particles,
        seed=seed,
        track=track,
    )
    x[incomplete] = drawn.cpu()
    return encoding.filled(frame, encoding.decode(x.numpy(), schema.columns), schema.columns)


def _check_table(schema: Schema) -> None:
    if not schema.columns:
        raise ValueError(f"rows are those of tables; the schema is of {schema.kind}")


def present(model: Model) -> Model:
    """A copy of a table's model under which no cell is missing and no category is new."""
    model = copy.deepcopy(model)
    model.head.exclude_missing()
    return model
