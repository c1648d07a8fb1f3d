"""Passes over a data set in blocks of examples, and the record that all measurements share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from nelbo._utils.distributed import map_across_processes, world
from nelbo._utils.numerics import LOG_2, seeded
from nelbo._utils.progress import Track
from nelbo.data.schema import fingerprint
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization
from nelbo.evaluation.kept import Tasks, once
from nelbo.evaluation.result import Measurement, StandardError

if TYPE_CHECKING:
    from nelbo.diffusion.latent import LatentModel

T = TypeVar("T")


def map_blocks(
    model: Model,
    batch: Batch,
    blocks: Sequence[Tensor],
    seed: Sequence[int],
    draw: Callable[[Batch, int], T],
    track: Track = iter,
    tasks: Tasks | None = None,
) -> list[T]:
    """Return draw(examples, g) for each block g, each computed on one process, on every process.

    Each block has a seed of its own, so the result does not depend on the number of processes; nor
    on the order of the examples, if the blocks are of `batch.order`.

    Args:
        model: to whose device the examples of a block are moved.
        batch: all examples.
        blocks: rows of each block; a row may be in several.
        seed: path of the seed, to which g is added.
        draw: computes a result.
        track: wraps the blocks, for a progress bar.
        tasks: keep the results, tensors or lists of them, and use those that are kept.
    """

    def one(g: int) -> T:
        with seeded(*seed, g):
            return draw(batch[blocks[g]].to(model.device), g)

    def kept(g: int) -> T:
        return once(tasks, (*seed, g), blocks[g], partial(one, g))

    return map_across_processes(len(blocks), kept, track)


def joined(batch: Batch, parts: Iterable[Tensor], dim: int = 0) -> Tensor:
    """Return the results of blocks of `batch.order`, joined, in the order of the batch.

    Args:
        batch: all examples.
        parts: of each block.
        dim: their dimension of examples.
    """
    return torch.cat(list(parts), dim).index_select(dim, batch.order.argsort())


def measurement(
    model: "Model | LatentModel",
    batch: Batch,
    nats: float,
    error: StandardError,
    calls: float,
    *,
    seed: int,
    weights: str,
    split: str,
) -> Measurement:
    """Return the record of a measurement.

    Args:
        model: that was measured.
        batch: all examples.
        nats: the mean bound on -log P(x).
        error: its standard error, nats.
        calls: number of rows that went forward through the network.
        seed: of everything random.
        weights: name of the weights.
        split: name of the data.
    """
    scale = scale_of(model, batch)
    return Measurement(
        bits_per_dim=None if model.density else nats * scale,
        nats=nats,
        unit=unit_of(model),
        standard_error=StandardError(*(scale * e for e in astuple(error))),
        examples=len(batch),
        dims=model.dims,
        calls_per_example=calls / len(batch),
        seed=seed,
        weights=weights,
        split=split,
        given=model.given(batch),
        precision=precision_of(model),
        model_hash=model.hash(),
        data_hash=fingerprint(batch.x),
        processes=world()[1],
    )


def scale_of(model: "Model | LatentModel", batch: Batch | None = None) -> float:
    """Return the factor from nats per example to the unit of a result: bits/dim, or nats."""
    if model.density:
        return 1.0
    return 1 / ((model.dims if batch is None else model.scored(batch)) * LOG_2)


def unit_of(model: "Model | LatentModel") -> str:
    """Return the unit of a result: bits per dimension, or nats for a density."""
    return "nats" if model.density else f"bits/{model.dimension}"


def precision_of(model: "Model | LatentModel") -> str:
    """Return the precision of the arithmetic of a measurement, for the record."""
    inside = str(next(model.network.parameters()).dtype)
    if model.diffusion.autocast is not None:
        inside += f" with autocast to {model.diffusion.autocast}"
    return f"float64 around {inside}".replace("torch.", "")


def described(times: TimeDiscretization) -> str:
    """Return the times of a bound for the record of what a file of results depends on."""
    ends = times.at(torch.linspace(0, 1, times.terms + 1, dtype=torch.float64))
    return f"{times.steps} ({fingerprint(ends)})"


def check_not_empty(batch: Batch) -> None:
    """Raise a ValueError if there is no example."""
    if len(batch) == 0:
        raise ValueError("there must be at least one example to evaluate; got none")
