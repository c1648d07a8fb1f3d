"""Replicates of a draw for every example of a data set, on all processes."""

import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, counting, measuring
from nelbo.evaluation.blocks import check_not_empty, joined, map_blocks, measurement
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.intervals import beside_size, freedoms, widened
from nelbo.evaluation.kept import Tasks, keeping
from nelbo.evaluation.result import BoundEstimate, FlowDetails, ImportanceDetails, StandardError

BLOCK = 64  # examples that share a seed


Record = Callable[[Tensor, ImportanceDetails | FlowDetails, str, str], BoundEstimate]


def draw_replicates(
    model: Model,
    x: Tensor | Batch,
    replicates: int,
    seed: int,
    track: Track,
    draw: Callable[[Batch], Tensor],
    resume: str | PathLike[str] | None = None,
    about: Mapping[str, object] | None = None,
) -> tuple[Tensor, Record]:
    """Draw every example in replicates; return (M, N, R) and a function that makes the record.

    Args:
        model: to measure.
        x: examples, (N, *model.shape), or a `Batch`.
        replicates: R.
        seed: of everything random.
        track: wraps the blocks of examples, for a progress bar.
        draw: returns M numbers for each example of a batch, (M, B).
        resume: a file for what was measured so far, as for `evaluate`.
        about: options that the draws depend on, by name.

    Raises:
        ValueError: if there is no example, or `replicates` is below 1.
    """
    batch = batch_of(model, x)
    check_not_empty(batch)
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1; got {replicates}")

    def one(examples: Batch, g: int) -> Tensor:
        each = draw(examples).double().cpu()
        return each.reshape(len(each), -1, replicates)

    path = None if resume is None else Path(resume)
    options = {**(about or {}), "replicates": replicates}
    with (
        measuring(model, batch),
        counting(model.network) as calls,
        keeping(path, model, batch, seed, options) as kept,
    ):
        blocks = [rows.repeat_interleave(replicates) for rows in batch.order.split(BLOCK)]
        tasks = None if kept is None else Tasks(kept, "replicates", calls)
        parts = map_blocks(model, batch, blocks, (seed,), one, track, tasks)
    found = joined(batch, parts, 1)
    forward, backward = map(sum, zip(*gather((calls.forward, calls.backward)), strict=True))

    def record(
        each: Tensor, how: ImportanceDetails | FlowDetails, weights: str, split: str
    ) -> BoundEstimate:
        nats = -each.mean().item()
        error = standard_error_of(beside_size(each, model.scored_counts(batch)))
        common = measurement(
            model, batch, nats, error, forward, seed=seed, weights=weights, split=split
        )
        return BoundEstimate(
            **vars(common),
            how=how,
            replicates=replicates,
            backward_calls_per_example=backward / len(batch),
            per_example=each.mean(1),
            notes=model.notes(batch),
        )

    return found, record


def standard_error_of(each: Tensor) -> StandardError:
    """Return the stated error of the mean of `each`, (N, R), independent in both dimensions."""
    examples, replicates = each.shape
    total = each.mean(1).var().item() / examples if examples > 1 else math.nan
    own = each.var(1) / replicates if replicates > 1 else torch.full_like(each[:, 0], math.nan)
    noise = own.mean().item() / examples
    known = freedoms(own, torch.full_like(own, replicates - 1.0))
    data = max(0.0, total - noise) if replicates > 1 else math.nan
    width = widened(examples - 1.0)
    total, data = math.sqrt(total) * width, math.sqrt(data) * width
    monte_carlo = math.sqrt(noise) * widened(known)
    # with few examples their spread may be small by chance, but not the error of its mean
    return StandardError(max(total, monte_carlo), data, monte_carlo)


def check_samples(samples: int) -> None:
    """Raise a ValueError unless K, the number of paths, is at least 1."""
    if samples < 1:
        raise ValueError(
            f"the number of importance samples must be at least 1; got {samples}; 1 is the ELBO"
        )


def log_mean(log_weights: Tensor) -> Tensor:
    """Return log 1/K Σ_k w_k over the last dimension, of size K."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])
