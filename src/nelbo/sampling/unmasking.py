"""Samples of a masked model that shows its symbols in an order of its own, k at a time.

Their distribution is the P(x) that `nelbo.evaluation.unmasking_order` gives, exactly: temperature
1, and the k symbols of a step independent given what shows.
"""

import torch
from torch import Tensor

from nelbo._utils.batch_rng import gather_rows, local_shard, rand
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.symbols import Predicted
from nelbo.diffusion.unmasking import RANDOM, UnmaskingOrder, unmask
from nelbo.sampling.samplers import numbers_only


def in_order(
    model: Model,
    count: int,
    order: UnmaskingOrder,
    seed: int = 0,
    track: Track = iter,
    condition: Tensor | None = None,
) -> Tensor:
    """Draw x ~ P(x|φ) of the sampler that shows symbols in this order.

    Args:
        model: a masked model.
        count: number of samples.
        order: the order; a sample of L symbols takes L/k network calls.
        seed: of everything random.
        track: wraps the steps, for a progress bar.
        condition: c of each sample, (count, F), for a model of P(x|c); for a model of tokens what
            shows, as in the `condition` of its batches.

    Returns:
        Samples in the space of the data, shape (count, *model.shape).

    Raises:
        ValueError: if the model masks no symbols, `count` is below 1, or an output of the network
            is not finite.
    """
    mask = order.mask_of(model)
    if order.name == RANDOM:
        raise ValueError(
            "the ancestral sampler draws in random order; use it, with as many steps as there"
            " are symbols"
        )
    if count < 1:
        raise ValueError(f"the number of samples must be at least 1; got {count}")
    model.check_condition(condition, count)
    condition = None if condition is None else condition.to(model.device)
    start = model.blank(count, condition).long()
    hidden = (start == mask).flatten(1).sum(1)
    blocks = torch.arange(count).split(model.rows)
    steps = [-(-int(hidden[rows].max()) // order.tokens_per_step) for rows in blocks]
    calls = iter(track(range(sum(steps))))  # of all blocks, for one progress bar

    def draw(rows: Tensor) -> Tensor:
        part = local_shard(len(rows))
        own = part.of(rows)

        def show(symbols: Predicted, chosen: Tensor, some: Tensor) -> Tensor:
            next(calls, None)
            shape = (len(part), *chosen.shape[1:])
            u = rand(shape, part, dtype=torch.float64, device=chosen.device)
            return symbols.inverse(u[some], chosen)

        z = unmask(model, start[own], rows_of(condition, own), order, show)
        return gather_rows(part, z)

    found = []
    with measuring(model), numbers_only(model.network):
        for g, rows in enumerate(blocks):
            with seeded(seed, g):  # of each block, as shards may take fewer steps than others
                found.append(draw(rows))
        next(calls, None)  # completes the progress bar
    return torch.cat(found)
