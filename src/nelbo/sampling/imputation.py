"""Draws of new rows of a table, and of the missing cells of given rows.

*New rows* lie within the training data: a row with a number beyond the range of its column, or
with a category that training did not have, is drawn again as a whole. So the rows follow the
model's distribution given that a row lies there, for which the bound still holds; `as_modelled`
draws from the model's distribution itself.

*Missing cells* are drawn given the other cells of their row, and given that no cell of the row is
missing: "missing" is one more state of a column, which is excluded here, as is a category that
training did not have. Weighted particles draw the cells; as their number grows, the draws approach
the model's conditional distribution (`nelbo.sampling.smc`). Where two or more cells of a row are
drawn, the exclusion applies to each cell as it is drawn, not to all of them jointly.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.progress import Track
from nelbo.data import coerce
from nelbo.data.conditions import labels_of
from nelbo.data.schema import Schema
from nelbo.data.sources import Source
from nelbo.data.tabular import encoding, tables
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid, grid_of
from nelbo.models.conditioning import labelled
from nelbo.sampling.samplers import LowAcceptanceError, ancestral, rejection
from nelbo.sampling.smc import conditional

if TYPE_CHECKING:
    from polars import DataFrame


def sample_table(
    model: Model,
    schema: Schema,
    count: int,
    times: TimeGrid | int,
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
        count: number of rows.
        times: the grid of the reverse process, or a number of even steps.
        seed: of everything random.
        condition: c of each row, (count, F), for a model of P(x|c); see `Run.conditions`.
        as_modelled: draw from the model's distribution itself, whose rows may lie outside the
            training data; a column that then contains "(other)" becomes text.
        track: wraps the steps, for a progress bar.
        tell: called with a sentence on the rows that were drawn again.

    Raises:
        ValueError: if the schema is not one of a table, or hardly any row that the model draws
            lies within the training data.
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
    """Draw rows of a table that lie within the training data; arguments as for `rejection`."""

    def inside(x: Tensor) -> Tensor:
        outside = encoding.outside_training(x.cpu().numpy(), schema.columns)
        return torch.from_numpy(~outside.any(1))

    try:
        found = rejection(draw, count, inside, seed)
    except LowAcceptanceError as error:
        raise ValueError(
            f"{error}, the ranges and categories of the training data: train longer, or keep all"
            " rows with --as-modelled"
        ) from None
    tell(
        f"redrawn: {found.outside} of {found.drawn} rows ({found.outside / found.drawn:.1%}) had a"
        " number outside the range of the training data or a category that is not in them;"
        " --as-modelled keeps such rows"
    )
    return found.x


def impute(
    model: Model,
    schema: Schema,
    rows: Source,
    times: TimeGrid | int,
    *,
    seed: int = 0,
    particles: int = 32,
    track: Track = iter,
    tell: Callable[[str], object] = lambda line: None,
) -> "DataFrame":
    """Draw the missing cells of rows given the other cells.

    A word that is only guessed to mean a missing cell is kept; see
    `nelbo.data.tabular.encoding.holes`.

    Args:
        model: of the rows.
        schema: of the table.
        rows: a table with the columns of the schema, found by name; other columns stay as they
            are.
        times: the grid of the reverse process, or a number of even steps.
        seed: of everything random; another seed gives another draw.
        particles: candidates for each row, of which one is drawn; more of them are more exact.
        track: wraps the steps, for a progress bar.
        tell: called with a note on each column in which words mean missing cells.

    Raises:
        ValueError: if the schema is not one of a table, a column is missing, or a cell does not
            fit its column.
    """
    _check_table(schema)
    label, frame = tables.find(coerce.plain(rows))
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
        grid_of(model, times),
        particles=particles,
        seed=seed,
        track=track,
    )
    x[incomplete] = drawn.cpu()
    return encoding.filled(frame, encoding.decode(x.numpy(), schema.columns), schema.columns)


def _check_table(schema: Schema) -> None:
    if not schema.columns:
        raise ValueError(f"rows are for tables; the schema is one of {schema.kind} data")


def present(model: Model) -> Model:
    """Return a copy of a table's model in which no cell is missing and no category is new."""
    model = copy.deepcopy(model)
    model.head.exclude_missing()
    return model
