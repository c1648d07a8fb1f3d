r"""Integrals over the latents z_1..z_T of a model of one number, as sums over grids of points.

With h between the points of a grid, ∫ g(z) dz = h Σ g(z_i) (the trapezoid rule) has an error of
about exp(-2π² (w/h)²) for a g as smooth as a normal density of standard deviation w. So

    forwards    P(z_{t-1}) = ∫ P(z_{t-1}|z_t) P(z_t) dz_t,     P(x) = ∫ P(x|z_1) P(z_1) dz_1
    backwards   P(x|z_t)   = ∫ P(z_{t-1}|z_t) P(x|z_{t-1}) dz_{t-1}

The first gives log P(x). The second gives P(z|x) by Bayes' rule, and with it the gap between
log P(x) and the ELBO without either, as q and P(z|x) are both Markov chains from z_T down to z_1:

    KL[ q(z|x) ‖ P(z|x) ] = KL( q(z_T|x) ‖ P(z_T|x) )
                            + Σ_{t=2..T} E_q(z_t|x) KL( q(z_{t-1}|z_t,x) ‖ P(z_{t-1}|z_t,x) )
"""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid

REACH = 8.0  # standard deviations of a normal distribution that a grid covers
DEPTH = 36.0  # below the highest log-density, nats: what is less is outside a grid
FEWEST, MOST = 64, 1024  # intervals of a grid, before it is refined
SLOPES = 1025  # points at which the slope of f is measured


class Chain:
    """A model of one number on grids of points of z_1..z_T, which cover P(z_t) and q(z_t|x).

    The spacing of a grid is the smallest width of the densities that are summed on it: of P(z_t),
    of q(z_t|z_{t+1},x), and of P(z_{t-1}|z_t) as a function of z_t, σ_t over the slope of f.

    Args:
        model: of examples of shape (1,).
        times: the T times.
        x: examples, shape (B,).
        fineness: 1 for this spacing, 2 for half of it.
    """

    def __init__(self, model: Model, times: TimeGrid, x: Tensor, fineness: int) -> None:
        self.model, self.fineness = model, fineness
        self.x, self.e, self.steps = x, model.embed(x[:, None]), times.times
        last = len(self.steps) - 1
        self.z: list[Tensor] = [torch.empty(0)] * (last + 1)
        self.log_p: list[Tensor] = list(self.z)  # log P(z_t) at the points of z_t
        self.width = [0.0] * (last + 1)  # the spacing of fineness 1
        self.kernels: list[Distribution] = [model.process.prior(model.shape, self._at(-1))]
        low, high = -REACH, REACH
        for i in range(last, -1, -1):
            loc, sd = self._q(i)
            low = min(low, (loc - REACH * sd).min().item())
            high = max(high, (loc + REACH * sd).max().item())
            self.width[i] = self._width(i, torch.linspace(low, high, SLOPES, dtype=torch.float64))
            points = self._points((high - low) / self.width[i])
            z = torch.linspace(low, high, points, dtype=torch.float64)
            log_p = self.kernels[0].log_prob(z[:, None, None])
            if i < last:
                log_p = (log_p + self.log_p[i + 1]).logsumexp(1) + _log_spacing(self.z[i + 1])
            self.z[i], self.log_p[i] = z, log_p.reshape(-1)
            self.kernels.insert(0, self._kernel(i, z))
            reached = self.log_p[i] > self.log_p[i].max() - DEPTH
            loc, sd = (v[reached] for v in (self.kernels[0].mean, self.kernels[0].stddev))
            low, high = (loc - REACH * sd).min().item(), (loc + REACH * sd).max().item()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log P(x) = log ∫ P(x|z_1) P(z_1) dz_1, shape of x."""
        joint = self.kernels[0].log_prob(x[:, None, None]) + self.log_p[0]
        return joint.logsumexp(1) + _log_spacing(self.z[0])

    def minus_elbo(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prior (B,), reconstruction (B,) and diffusion (B, T - 1) terms."""
        model, count = self.model, len(self.x)
        prior = prior_term(model, self.x[:, None], self._at(-1).expand(count))
        means = []
        for i in range(len(self.steps)):
            loc, sd = self._q(i)
            points = self._points(2 * REACH * sd[0].item() / self.width[i])
            u = torch.linspace(-REACH, REACH, points, dtype=torch.float64)
            weight = (-u.square() / 2).softmax(0)
            x, e = (v.repeat_interleave(points, 0) for v in (self.x[:, None], self.e))
            z = (loc[:, None] + sd[:, None] * u).reshape(-1, 1)
            p = self._kernel(i, z[:, 0])
            cost = kl_divergence(self._posterior(i, z, e), p) if i else -p.log_prob(x)
            means.append(cost.reshape(count, -1) @ weight)
        return prior, means[0], torch.stack(means, 1)[:, 1:]

    def kl(self) -> Tensor:
        """Return KL[ q(z|x) ‖ P(z|x) ] from the chain of P(z_t|x), shape (B,)."""
        total = torch.zeros(len(self.x), dtype=torch.float64)
        log_v = self.kernels[0].log_prob(self.x[:, None, None])  # log P(x|z_t), (B, points)
        for i in range(1, len(self.steps)):
            below, z = self.z[i - 1], self.z[i]
            log_p = self.kernels[i].log_prob(below[:, None, None])
            before, log_v = (
                log_v,
                torch.stack(
                    [(log_p + v[:, None]).logsumexp(0) + _log_spacing(below) for v in log_v]
                ),
            )
            for b in range(len(self.x)):
                rows, columns = self._inside(i, b), self._inside(i - 1, b)
                now = z[rows, None]
                q = self._posterior(i, now, self.e[b].expand_as(now))
                log_q = q.log_prob(below[columns, None, None])
                log_ratio = log_q - log_p[columns][:, rows] - before[b, columns, None]
                weight = self._log_q(i, b)[rows] + log_q + _log_spacing(z) + _log_spacing(below)
                total[b] += (weight.exp() * (log_ratio + log_v[b, rows])).sum()
        for b, joint in enumerate(self.log_p[-1] + log_v):
            log_p = joint - joint.logsumexp(0) - _log_spacing(self.z[-1])  # P(z_T|x)
            log_q = self._log_q(-1, b)
            total[b] += ((log_q + _log_spacing(self.z[-1])).exp() * (log_q - log_p)).sum()
        return total

    def _kernel(self, i: int, z: Tensor) -> Distribution:
        """Return P(z_{t-1}|z_t), or P(x|z_1), at latents z of shape (N,)."""
        t = self._at(i)
        if i == 0:
            return self.model.likelihood(z[:, None], t)
        return self.model.reverse(z[:, None], self._at(i - 1), t)

    def _posterior(self, i: int, z: Tensor, e: Tensor) -> Distribution:
        return self.model.process.posterior(z, e, self._at(i - 1), self._at(i))

    def _points(self, intervals: float) -> int:
        """Return the number of points of a grid, from the intervals it needs at fineness 1."""
        return self.fineness * math.ceil(min(max(intervals, FEWEST), MOST)) + 1

    def _width(self, i: int, z: Tensor) -> float:
        kernel = self._kernel(i, z)
        loc, sd = kernel.mean[:, 0], kernel.stddev[:, 0]
        slope = (loc.diff() / z.diff()).abs()
        widths = [1.0, (sd[1:] / slope).min().item(), self._q(i)[1][0].item()]
        if i + 1 < len(self.steps):
            widths += [self.kernels[0].stddev.min().item()]
            zero = torch.zeros(1, 1, dtype=torch.float64)
            widths += [self._posterior(i + 1, zero, zero).stddev.item()]
        return min(widths)

    def _q(self, i: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z_t|x), shape (B,) each."""
        q = self.model.process.marginal(self.e, self._at(i))
        return q.mean[:, 0], q.stddev[:, 0]

    def _log_q(self, i: int, b: int) -> Tensor:
        """Return log q(z_t|x_b) at the points of z_t."""
        q = self.model.process.marginal(self.e[b : b + 1], self._at(i))
        return q.log_prob(self.z[i][:, None])

    def _inside(self, i: int, b: int) -> Tensor:
        """Mark the points of z_t where q(z_t|x_b) is not negligible."""
        loc, sd = self._q(i)
        return (self.z[i] - loc[b]).abs() < REACH * sd[b]

    def _at(self, i: int) -> Tensor:
        """Return the i-th time once, shape (1,), for all rows of a call."""
        return self.steps[i : i + 1] if i >= 0 else self.steps[i:]


def _log_spacing(z: Tensor) -> float:
    return math.log((z[-1] - z[0]).item() / (len(z) - 1))
