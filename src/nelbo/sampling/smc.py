r"""Draws of the unknown dimensions u of x given the known ones k, by sequential Monte Carlo.

The known dimensions follow one path z^k ~ q(z|x^k). Along it, K particles follow the reverse
process, z^u ~ P(z_s|z_t), each with the probability of the path under the model as its weight,

    w = Π_t P(z_s^k|z_t) · P(x^k|z_1).

When few particles carry most of the weight, they are resampled systematically (Doucet & Johansen
2011). As K → ∞ the draws follow P(x^u|z^k, x^k), which is the model's P(x^u|x^k) insofar as the
model's distribution of the path equals q (SMCDiff, Trippe et al. 2023). Known symbols are visible
from the start (`ForwardProcess.reveal`), as the network can condition on any visible symbols.

Each block of rows has a seed of its own, so the draws do not depend on the number of processes.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from nelbo._utils.distributed import map_across_processes
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.times import TimeGrid
from nelbo.sampling.samplers import numbers_only

BLOCK = 32  # rows that share a seed, if memory allows


def conditional(
    model: Model,
    x: Tensor | Batch,
    known: Tensor,
    times: TimeGrid,
    *,
    particles: int = 32,
    seed: int = 0,
    track: Track = iter,
) -> Tensor:
    """Draw the unknown dimensions of x given the known ones.

    Args:
        model: the model.
        x: examples in the space of the data, shape (N, *model.shape), or a `Batch` of examples
            and conditions; unknown dimensions may have any value of the data.
        known: mask of the known dimensions, booleans (N, *model.shape).
        times: the grid; each particle takes T network calls.
        particles: K; with 1, known dimensions act through the network only.
        seed: of everything random.
        track: wraps the blocks of rows, for a progress bar.

    Returns:
        x with the unknown dimensions drawn, shape (N, *model.shape).

    Raises:
        ValueError: if `particles` is below 1.
    """
    if particles < 1:
        raise ValueError(f"the number of particles must be at least 1; got {particles}")
    batch = model.batch(x)
    model.check_condition(batch.condition, len(batch))
    blocks = torch.arange(len(batch)).split(min(BLOCK, max(1, model.rows // particles)))

    def one(g: int) -> Tensor:
        each = blocks[g].repeat_interleave(particles)
        its, here = batch[each], known[each].to(model.device)
        with seeded(seed, g):
            return _descend(model, its, here, times, particles).cpu()

    with measuring(model), numbers_only(model.network):
        return torch.cat(map_across_processes(len(blocks), one, track)).to(model.device)


def _descend(model: Model, batch: Batch, known: Tensor, times: TimeGrid, particles: int) -> Tensor:
    """Return one of the K particles of each row; the batch has each row K times, (N K, ...)."""
    process, x = model.process, batch.x.to(model.device)
    e = model.embed(x)
    at = [t.expand(len(x)) for t in times.times.to(model.device)]
    path = _common(process.reveal(x, at[-1]), particles)
    z = torch.where(known, path, process.prior(model.shape, at[-1]).sample())
    log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(len(at) - 1, 0, -1):
        s, t = at[i - 1], at[i]
        p = model.reverse(z, s, t, batch.condition)
        path = _common(draw(process.posterior(z, e, s, t)), particles)
        z = torch.where(known, path, draw(p))
        chosen, log_w = resample((log_w + _sum(known, p, z)).reshape(-1, particles))
        z = z[chosen]
    likelihood = model.likelihood(z, at[0], batch.condition)
    log_w = (log_w + _sum(known, likelihood, x)).reshape(-1, particles)
    best = torch.multinomial(log_w.softmax(1), 1)[:, 0]
    best = best + torch.arange(len(best), device=best.device) * particles
    return torch.where(known, x, likelihood.sample())[best]


def resample(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Resample the particles of each row whose effective sample size 1/Σ w² is below K/2.

    Resampling is systematic: particle k is chosen K w_k times, rounded down or up, and K w_k
    times in expectation.

    Args:
        log_w: log-weights, shape (N, K).

    Returns:
        Indices of the N K particles that continue, and their log-weights, shape (N K,) each.
    """
    n, k = log_w.shape
    w = log_w.softmax(1)
    poor = w.square().sum(1) > 2 / k
    u = (torch.arange(k, device=w.device) + torch.rand((n, 1), device=w.device)) / k
    drawn = torch.searchsorted(w.cumsum(1), u.to(w)).clamp(max=k - 1)
    stay = torch.arange(k, device=w.device).expand(n, k)
    chosen = torch.where(poor[:, None], drawn, stay)
    first = torch.arange(n, device=w.device)[:, None] * k
    return (chosen + first).flatten(), torch.where(poor[:, None], 0.0, log_w).flatten()


def _common(z: Tensor, particles: int) -> Tensor:
    """Copy the first particle of each row to all particles of the row; (N K, ...)."""
    return z[::particles].repeat_interleave(particles, 0)


def _sum(known: Tensor, distribution: Distribution, value: Tensor) -> Tensor:
    """Return the log-probability of the known dimensions, independent given z; (N K,)."""
    assert isinstance(distribution, Independent)
    each = distribution.base_dist.log_prob(value)
    return torch.where(known, each, 0.0).flatten(1).sum(1)
