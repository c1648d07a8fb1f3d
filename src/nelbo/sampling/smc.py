r"""Draws of the unknown dimensions u of x given the known ones k, by weighted particles.

What is known takes one path z^k ~ q(z|x^k). Along it K particles go down the reverse process side
by side, z^u ~ P(z_s|z_t), each with the weight by which the model knows the path,

    w = Π_t P(z_s^k|z_t) · P(x^k|z_1).

Where few particles carry the weight they are drawn anew by it, systematically (Doucet & Johansen
2011). As K → ∞ the draws are of P(x^u|z^k, x^k), which is the model's own P(x^u|x^k) as far as its
law of the path is q's (SMCDiff, Trippe et al. 2023). A symbol that is known shows from the start
(`ForwardProcess.reveal`), as the network knows what follows from any that show.

Blocks of rows are seeded one by one, so any number of processes that share them draw the same.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from nelbo._utils.distributed import map_across_processes
from nelbo._utils.numerics import draw, seeded
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.times import TimeGrid
from nelbo.sampling.samplers import numbers_only

BLOCK = 32  # rows that are seeded together, where memory allows


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
    """x with the dimensions that are not known drawn given those that are.

    Args:
        model: the model.
        x: examples in the space of the data, shape (N, *model.shape); what is not known may be
            any value of the data; or a `Batch` of them and their conditions.
        known: which dimensions are, booleans (N, *model.shape).
        times: the grid; T network calls for each particle.
        particles: K; 1 lets what is known have no say but through the network.
        seed: everything random follows from it.
        track: wraps the blocks of rows, for a progress bar.

    Raises:
        ValueError: no particles.
    """
    if particles < 1:
        raise ValueError(f"the number of particles must be at least 1; got {particles}")
    batch = Batch.of(x)
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
    """One particle of the K of each row, that of x (N K, ...); (N, ...)."""
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
    """Which of the N K particles go on, and their log-weights, both (N K,); log_w is (N, K).

    All of them as they are where Σ w² says that half of them or more carry the weight; else
    systematic draws: particle k comes K w_k times, rounded down or up, K w_k in the mean.
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
    """The first particle of each row, for all its particles; (N K, ...)."""
    return z[::particles].repeat_interleave(particles, 0)


def _sum(known: Tensor, distribution: Distribution, value: Tensor) -> Tensor:
    """The log-probability of what is known alone: dimensions are independent given z; (N K,)."""
    assert isinstance(distribution, Independent)
    each = distribution.base_dist.log_prob(value)
    return torch.where(known, each, 0.0).flatten(1).sum(1)
