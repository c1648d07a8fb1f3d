r"""The importance-weighted bound of K paths, which lies between the ELBO and log P(x).

For any q, E_q[ P(x,z)/q(z|x) ] = P(x), so the mean over K paths z^1..z^K ~ q(z|x) is unbiased for
P(x), and by Jensen its logarithm is a bound that rises with K (Burda et al. 2016, theorem 1):

    L_K = E log 1/K Σ_k w_k,   w_k = P(x,z^k)/q(z^k|x),   ELBO = L_1 <= L_K <= L_{K+1} <= log P(x).

Without the factor 1/K it is not a bound. By equation 4 of docs/derivation.md, a path has weight

    log w = log P(z_T)/q(z_T|x) + Σ_{t=2..T} log P(z_{t-1}|z_t)/q(z_{t-1}|z_t,x) + log P(x|z_1),

and q(z|x) = q(z_T|x) Π_t q(z_{t-1}|z_t,x): the path is drawn from T down to 1, in the order of the
model, with T network calls. Nothing here depends on the process, reverse kernel or decoder.
"""

from itertools import pairwise
from os import PathLike

import torch
from torch import Tensor

from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization, TimeGrid
from nelbo.evaluation.blocks import described
from nelbo.evaluation.replicates import check_samples, draw_replicates, log_mean
from nelbo.evaluation.result import BoundEstimate, ImportanceDetails


def check_grid(times: TimeDiscretization) -> TimeGrid:
    """Return the times if they are a grid, as paths in continuous time have no weight.

    Raises:
        ValueError: if they are not a grid.
    """
    if not isinstance(times, TimeGrid):
        raise ValueError(
            f"importance samples need a grid of T times; got {type(times).__name__}, whose paths"
            " have infinitely many; try TimeGrid.uniform(64), or --steps 64"
        )
    return times


def log_weights(model: Model, batch: Batch, times: TimeGrid) -> Tensor:
    """Return log P(x,z)/q(z|x) for one path z ~ q(z|x) of each row of x; shape (B,), nats.

    Its expectation is the ELBO; it takes T network calls.
    """
    x, condition = batch.x, batch.condition
    process, e = model.process, model.embed(x)
    every = [t.expand(len(x)) for t in times.times.to(x.device)]
    first, last = every[0], every[-1]
    q = process.marginal(e, last)
    z = q.sample()
    weight = process.prior(x.shape[1:], last).log_prob(z) - q.log_prob(z)
    for s, t in reversed(list(pairwise(every))):
        p, q = model.reverse(z, s, t, condition), process.posterior(z, e, s, t)
        z = q.sample()
        weight = weight + p.log_prob(z) - q.log_prob(z)
    return weight + model.likelihood(z, first, condition).log_prob(x)


def importance_weights(
    model: Model, batch: Batch, times: TimeDiscretization, samples: int
) -> Tensor:
    """Return log P(x,z^k)/q(z^k|x) of K paths for each example, shape (B, K), nats.

    The examples were checked and may be some of many: their shape, on which a grid may depend, is
    that of all.

    Raises:
        ValueError: if the times are not a grid, or K < 1.
    """
    check_samples(samples)
    grid = check_grid(times)
    rows = torch.arange(len(batch)).repeat_interleave(samples).split(model.rows)
    weights = torch.cat([log_weights(model, batch[part], grid).double() for part in rows])
    return weights.reshape(len(batch), samples)


def importance_bound(
    model: Model, x: Tensor | Batch, times: TimeDiscretization, samples: int
) -> Tensor:
    """Return one draw of L_K, log 1/K Σ_k P(x,z^k)/q(z^k|x), per example; shape (B,), nats.

    Args:
        model: the model; its `dtype` is the precision of the arithmetic around the network.
        x: examples, shape (B, ...), or a `Batch`.
        times: TimeGrid(times), with T network calls per sample.
        samples: K, at least 1; 1 gives the ELBO of the same grid.

    Raises:
        ValueError: if the times are not a grid, or K < 1.
    """
    return log_mean(importance_weights(model, model.batch(x), times, samples))


def evaluate_importance(
    model: Model,
    x: Tensor | Batch,
    *,
    times: TimeDiscretization,
    samples: int,
    replicates: int = 1,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
    resume: str | PathLike[str] | None = None,
) -> BoundEstimate:
    """Measure the mean of −L_K, the importance-weighted bound on −log P(x|φ), over examples x.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, shape (N, *model.shape), or a `Batch`.
        times: TimeGrid(times).
        samples: K; each example and replicate takes K T network calls.
        replicates: independent draws of L_K per example; two or more give a Monte Carlo error.
        seed: of everything random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the blocks of examples, for a progress bar.
        resume: a file for what was measured so far, as for `evaluate`.

    Raises:
        ValueError: if the times are not a grid, K < 1, the examples are not of the model, or the
            file is of another evaluation.
    """
    check_samples(samples)
    grid = check_grid(times)

    def draw(batch: Batch) -> Tensor:
        log_w = importance_weights(model, batch, grid, samples)
        return torch.stack([log_mean(log_w), (2 * log_mean(log_w) - log_mean(2 * log_w)).exp()])

    about = {"importance samples": samples, "steps": described(grid)}
    (bound, share), record = draw_replicates(
        model, x, replicates, seed, track, draw, resume, about
    )
    how = ImportanceDetails(samples, len(grid.times), share.mean().item())
    return record(bound, how, weights, split)
