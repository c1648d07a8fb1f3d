r"""The times of a training step, and what each draw weighs.

The loss of a step is E_{u~U[0,1)}[ f(u) ], and for any density p > 0

    E_{u~U}[ f(u) ] = E_{u~p}[ f(u)/p(u) ],      E_{u~p}[ (f/p)² ] = ∫ f²/p du,

least for p ∝ √E[f²|u] (Owen 2013, chapter 9). `SecondMomentImportance` learns that p while
training, from the second moments of f in bins of u, averaged over the last steps and smoothed over
neighbouring bins, so that it is of use from the second step on; a uniform share bounds 1/p. The
mean of the loss, and so of its gradient, is the same for every p; its variance is not.

A law draws for the global batch, of which `parts` takes rows: a loss curve does not depend on the
processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

BINS = 64  # of the density over u
WIDTH = 1.5  # bins, of the smoothing
MEMORY = 0.98  # of the averages; per step
FEW = 0.01  # draws of the mean that stand in where there is none


def stratified(examples: int) -> Tensor:
    """u (examples,), one in each of so many strata, in random order: no example is tied to a time.

    The law of `estimate.stratified`, drawn from other random numbers, those of all runs so far.

    >>> (stratified(6).sort().values * 6).floor()
    tensor([0., 1., 2., 3., 4., 5.], dtype=torch.float64)
    """
    torch.rand(examples)  # of no use any more; without it every seed would train differently
    order = torch.rand(examples).argsort()
    return (order + torch.rand(examples, dtype=torch.float64)[order]) / examples


class TimestepSampler(nn.Module, ABC):
    """Which times a training step draws; what it learns is in its state."""

    @abstractmethod
    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        """Draws u in [0, 1) and their weights 1/p(u), shape (examples,) each, float64.

        Args:
            examples: of the global batch.
        """

    def learn(self, u: Tensor, value: Tensor) -> None:
        """Take note that the integrand, not weighted, was value (B,) at u (B,)."""


class Uniform(TimestepSampler):
    """Each u by itself: the classic way."""

    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        u = torch.rand(examples, dtype=torch.float64)
        return u, torch.ones_like(u)


class Stratified(TimestepSampler):
    """One u in each stratum of the global batch."""

    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        u = stratified(examples)
        return u, torch.ones_like(u)


class SecondMomentImportance(TimestepSampler):
    """Stratified, through the inverse of the distribution function of a density that is learned.

    Args:
        uniform: share of uniform draws; no weight exceeds its inverse.
    """

    count: Tensor
    moment: Tensor
    smoother: Tensor

    def __init__(self, uniform: float = 0.25) -> None:
        super().__init__()
        if not 0 < uniform <= 1:
            raise ValueError(f"uniform must be in (0, 1]; got {uniform}; try 0.25")
        self.uniform = uniform
        self.register_buffer("count", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(BINS, dtype=torch.float64))
        bins = torch.arange(BINS, dtype=torch.float64)
        smoother = (-0.5 * ((bins - bins[:, None]) / WIDTH) ** 2).exp()
        self.register_buffer("smoother", smoother, persistent=False)

    def density(self) -> Tensor:
        """p in each bin, shape (BINS,); its mean is 1."""
        if not self.moment.sum() > 0:
            return torch.ones_like(self.moment)
        mean = self.moment.sum() / self.count.sum()
        near, draws = self.smoother @ self.moment, self.smoother @ self.count
        rms = ((near + FEW * mean) / (draws + FEW)).sqrt()
        return self.uniform + (1 - self.uniform) * rms / rms.mean()

    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        p = self.density()
        edges = torch.cat([p.new_zeros(1), p.cumsum(0) / BINS])
        v = stratified(examples)
        k = (torch.searchsorted(edges, v, right=True) - 1).clamp(0, BINS - 1)
        u = (k + ((v - edges[k]) * BINS / p[k]).clamp(0, 1)) / BINS
        return u, 1 / p[k]

    def learn(self, u: Tensor, value: Tensor) -> None:
        k = (u.cpu() * BINS).long().clamp(max=BINS - 1)
        squares = value.detach().double().cpu().square()
        self.count.mul_(MEMORY).index_add_(0, k, torch.ones_like(squares))
        self.moment.mul_(MEMORY).index_add_(0, k, squares)


TIMESTEP_SAMPLERS: Mapping[str, Callable[[], TimestepSampler]] = {
    "stratified": Stratified,
    "importance": SecondMomentImportance,
    "iid": Uniform,
}
