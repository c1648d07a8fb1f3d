r"""The exact -log P(x) of a masked model that is sampled in an order of its own.

`diffusion.unmasking` has the orders and the formula. Another order of unmasking is another sampler
of the same network, with another P(x): it may lie above or below the any-order bound.
"""

from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.progress import Track
from nelbo.diffusion import unmasking
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, counting, measuring
from nelbo.diffusion.symbols import Predicted
from nelbo.diffusion.unmasking import RANDOM, UnmaskingOrder, unmask
from nelbo.evaluation import any_order
from nelbo.evaluation.blocks import check_not_empty, map_blocks, measurement
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.intervals import beside_size, error_of_mean
from nelbo.evaluation.kept import Tasks, keeping
from nelbo.evaluation.replicates import BLOCK
from nelbo.evaluation.result import Evaluation, OrderLikelihood, StandardError


def log_prob(model: Model, batch: Batch, order: UnmaskingOrder) -> Tensor:
    """Return log P(x|φ) of the sampler that shows symbols in this order; (B,), nats, exact.

    Args:
        model: a masked model; its `dtype` is the precision of the arithmetic around the network.
        batch: examples, of a model of tokens with what shows.
        order: the order; of L symbols it takes L/k network calls; in random order 2^L - 1.
    """
    if order.name == RANDOM:
        return any_order.log_prob(model, batch)
    x = batch.x.long()
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def show(symbols: Predicted, chosen: Tensor, rows: Tensor) -> Tensor:
        each = symbols.log_prob(x[rows], chosen).double()
        total[rows] += torch.where(chosen, each, 0.0).flatten(1).sum(1)
        return x[rows]

    places = model.scored_places(batch)
    unmask(model, model.blank(len(x), batch.condition), batch.condition, order, show, places)
    return total


def evaluate_order(
    model: Model,
    x: Tensor | Batch,
    order: UnmaskingOrder,
    *,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
    resume: str | PathLike[str] | None = None,
) -> OrderLikelihood:
    """Measure the mean of -log P(x|φ) of the sampler that shows symbols in this order, exactly.

    Args:
        model: a masked model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, (N, *model.shape), or a `Batch`.
        order: the order.
        seed: for the record; nothing is random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the blocks of examples, for a progress bar.
        resume: a file for what was measured so far, as for `evaluate`.

    Raises:
        ValueError: if the model masks no symbols, or the examples are not of the model, or too
            long for the random order.
    """
    batch = batch_of(model, x)
    check_not_empty(batch)
    order_for(model, batch, order.name, order.tokens_per_step)

    def one(some: Batch, g: int) -> Tensor:
        parts = torch.arange(len(some)).split(model.rows)
        return torch.cat([log_prob(model, some[rows], order) for rows in parts]).cpu()

    blocks = torch.arange(len(batch)).split(min(BLOCK, model.rows))
    path = None if resume is None else Path(resume)
    with (
        measuring(model, batch),
        counting(model.network) as calls,
        keeping(path, model, batch, seed, {}) as kept,
    ):
        tasks = None if kept is None else Tasks(kept, str(order), calls)
        found = torch.cat(map_blocks(model, batch, blocks, (seed,), one, track, tasks))
    error = error_of_mean(beside_size(found, model.scored_counts(batch)))
    record = measurement(
        model,
        batch,
        -found.mean().item(),
        StandardError(error, error, 0.0),
        sum(gather(calls.forward)),
        seed=seed,
        weights=weights,
        split=split,
    )
    return OrderLikelihood(
        **vars(record),
        sampler=order.name,
        tokens_per_step=order.tokens_per_step,
        per_example=found,
    )


def order_for(
    model: Model, batch: Batch, sampler: str | None, tokens_per_step: int | None = None
) -> UnmaskingOrder | None:
    """Return the order of that name in which to measure examples of a model; None for none.

    Raises:
        ValueError: as `unmasking.order_for`, or the examples are too long for the random order.
    """
    order = unmasking.order_for(model, sampler, tokens_per_step)
    if order is not None and order.name == RANDOM:
        any_order.check_length(model, batch)
    return order


def beside(
    bound: Evaluation,
    model: Model,
    x: Tensor | Batch,
    order: UnmaskingOrder | None,
    track: Track = iter,
    resume: str | PathLike[str] | None = None,
) -> Evaluation:
    """Return a bound of these examples with the exact -log P(x) in this order, if any, beside it.

    Args:
        bound: of the same model and examples.
        model: a masked model.
        x: the examples.
        order: the order; None for none.
        track: wraps the blocks of examples, for a progress bar.
        resume: as for `evaluate_order`.
    """
    if order is None:
        return bound
    exact = evaluate_order(
        model,
        x,
        order,
        seed=bound.seed,
        weights=bound.weights,
        split=bound.split,
        track=track,
        resume=resume,
    )
    return replace(bound, in_order=exact)
