r"""Samplers of the times of a training step, with importance weights.

The loss of a step is E_{u~U[0,1)}[ f(u) ], and for any density p > 0

    E_{u~U}[ f(u) ] = E_{u~p}[ f(u)/p(u) ],      E_{u~p}[ (f/p)² ] = ∫ f²/p du,

which is least for p ∝ √E[f²|u] (Owen 2013, chapter 9). `SecondMomentImportance` learns this p
during training from the second moments of f in bins of u, averaged over recent steps and smoothed
over neighbouring bins, so that it helps from the second step on; a uniform share bounds 1/p. The
mean of the loss and of its gradient is the same for every p; the variance is not.

A sampler draws for the global batch, and each process takes its rows (`parallel.parts_of`), so the
loss curve does not depend on the number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

BINS = 64  # bins of the density over u
WIDTH = 1.5  # standard deviation of the smoothing, in bins
MEMORY = 0.98  # decay of the averages per step
FEW = 0.01  # draws of the overall mean that each bin starts from


def stratified(examples: int) -> Tensor:
    """Draw u, (examples,), one in each of as many strata of [0, 1), in random order.

    The distribution is that of `nelbo.diffusion.times.stratified`; the random numbers differ, and
    all runs so far have used these.

    >>> (stratified(6).sort().values * 6).floor()
    tensor([0., 1., 2., 3., 4., 5.], dtype=torch.float64)
    """
    torch.rand(examples)  # unused; kept so that a seed still gives the same training
    order = torch.rand(examples).argsort()
    return (order + torch.rand(examples, dtype=torch.float64)[order]) / examples


class TimestepSampler(nn.Module, ABC):
    """Sampler of the times of a training step; it stores what it learns in its state dict."""

    @abstractmethod
    @override
    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        """Return draws u in [0, 1) and their weights 1/p(u), shape (examples,) each, float64.

        Args:
            examples: in the global batch.
        """

    def learn(self, u: Tensor, value: Tensor) -> None:
        """Learn from values (B,) of the integrand, not weighted, at u (B,); does nothing here."""


class Uniform(TimestepSampler):
    """Independent uniform draws."""

    @override
    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        u = torch.rand(examples, dtype=torch.float64)
        return u, torch.ones_like(u)


class Stratified(TimestepSampler):
    """One uniform draw in each stratum of the global batch."""

    @override
    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        u = stratified(examples)
        return u, torch.ones_like(u)


class SecondMomentImportance(TimestepSampler):
    """Stratified draws mapped through the inverse distribution function of a learned density.

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
        """Return p in each bin, shape (BINS,); its mean is 1."""
        if not self.moment.sum() > 0:
            return torch.ones_like(self.moment)
        mean = self.moment.sum() / self.count.sum()
        near, draws = self.smoother @ self.moment, self.smoother @ self.count
        rms = ((near + FEW * mean) / (draws + FEW)).sqrt()
        return self.uniform + (1 - self.uniform) * rms / rms.mean()

    @override
    def forward(self, examples: int) -> tuple[Tensor, Tensor]:
        p = self.density()
        edges = torch.cat([p.new_zeros(1), p.cumsum(0) / BINS])
        v = stratified(examples)
        k = (torch.searchsorted(edges, v, right=True) - 1).clamp(0, BINS - 1)
        u = (k + ((v - edges[k]) * BINS / p[k]).clamp(0, 1)) / BINS
        return u, 1 / p[k]

    @override
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
