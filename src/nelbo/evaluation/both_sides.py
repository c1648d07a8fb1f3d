r"""log P(x) from both sides, for x that the model itself samples (Grosse et al. 2015).

The importance-weighted bound of K paths is a lower end for any x: E_q 1/K Σ w_k = P(x). An upper
end needs a path from the posterior P(z|x), which nobody has for given data; but the path by which
the model sampled x is one. With w_0 its weight and K - 1 others from q(z|x),

    E [ (1/K (w_0 + Σ_{k=1..K-1} w_k))^-1 ] = 1/P(x),   w = P(x,z)/q(z|x),

since the density of these K paths, averaged over the place of the exact one among them, is
Π_k q(z^k|x) · 1/K Σ_k w_k / P(x). By Jensen, for each x,

    E log 1/K Σ_{k=1..K} w_k  <=  log P(x)  <=  E log 1/K (w_0 + Σ_{k=1..K-1} w_k),

and by Markov one draw of either end passes log P(x) by more than a nats with probability e^-a at
most. Their distance says how loose the importance-weighted bound of this model is on its own
samples. Of real x there is no such upper end.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, counting, measuring
from nelbo.diffusion.times import TimeDiscretization, TimeGrid
from nelbo.evaluation.blocks import joined, map_blocks, measurement
from nelbo.evaluation.importance_bound import check_grid, importance_weights
from nelbo.evaluation.intervals import beside_size, error_of_mean
from nelbo.evaluation.replicates import BLOCK, check_samples, log_mean
from nelbo.evaluation.result import BothSides, StandardError


def sample_with_weight(model: Model, start: Batch, times: TimeGrid) -> tuple[Tensor, Tensor]:
    """Draw x and its path from the model; return x and log P(x,z)/q(z|x) of the path, (B,), nats.

    Args:
        model: the model.
        start: of the shape of the samples, (B, ...), with their conditions.
        times: the grid; it takes T network calls.
    """
    process, condition = model.process, start.condition
    every = [t.expand(len(start)) for t in times.times.to(start.x.device)]
    prior = process.prior(start.x.shape[1:], every[-1])
    path = [prior.sample()]
    log_p = prior.log_prob(path[0])
    steps = list(reversed(list(pairwise(every))))
    for s, t in steps:
        p = model.reverse(path[-1], s, t, condition)
        path.append(p.sample())
        log_p = log_p + p.log_prob(path[-1])
    last = model.likelihood(path[-1], every[0], condition)
    x = last.sample()
    e = model.embed(x)
    log_q = process.marginal(e, every[-1]).log_prob(path[0])
    for (s, t), (z_t, z_s) in zip(steps, pairwise(path), strict=True):
        log_q = log_q + process.posterior(z_t, e, s, t).log_prob(z_s)
    return x, log_p + last.log_prob(x) - log_q


def both_sides(
    model: Model,
    count: int,
    *,
    times: TimeDiscretization,
    samples: int,
    condition: Tensor | None = None,
    seed: int = 0,
    weights: str = "as given",
    track: Track = iter,
) -> BothSides:
    """Measure log P(x|φ) from both sides, for examples that the model draws itself.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        count: number of examples to draw.
        times: TimeGrid(times), of the model that samples.
        samples: K; each example takes (K + 1) T network calls.
        condition: c of each example, (count, F), for a model of P(x|c); for a model of tokens what
            shows, as in the `condition` of its batches.
        seed: of everything random.
        weights: name of the weights, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: if the times are not a grid, K or `count` is below 1, or the model needs
            conditions.
    """
    check_samples(samples)
    grid, count = check_grid(times), integer("count", count, 1)
    model.check_condition(condition, count)
    start = Batch(model.blank(count, condition), condition)

    def one(some: Batch, g: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(some)).split(model.rows)
        parts = [sample_with_weight(model, some[own], grid) for own in rows]
        x, exact = (torch.cat(each) for each in zip(*parts, strict=True))
        log_w = importance_weights(model, Batch(x, some.condition), grid, samples)
        with_exact = torch.cat([exact[:, None], log_w[:, :-1]], 1)
        return x.cpu(), torch.stack([log_mean(log_w), log_mean(with_exact)]).cpu()

    blocks = start.order.split(BLOCK)
    with measuring(model), counting(model.network) as calls:
        found = map_blocks(model, start, blocks, (seed,), one, track)
    x = joined(start, (part for part, _ in found))
    lower, upper = joined(start, (ends for _, ends in found), 1)
    gap, drawn = upper - lower, Batch(x, condition)
    error = error_of_mean(beside_size(lower, model.scored_counts(drawn)))
    record = measurement(
        model,
        drawn,
        -lower.mean().item(),
        StandardError(error, math.nan, math.nan),
        sum(gather(calls.forward)),
        seed=seed,
        weights=weights,
        split="samples of the model itself",
    )
    return BothSides(
        **vars(record),
        at_least=-upper.mean().item(),
        gap=gap.mean().item(),
        gap_error=error_of_mean(gap),
        samples=samples,
        steps=len(grid.times),
        x=x,
        lower=lower,
        upper=upper,
    )
