r"""The times of a training step, and what each draw weighs.

The loss of a step is E_{u~U[0,1)}[ f(u) ], and for any density p > 0

    E_{u~U}[ f(u) ] = E_{u~p}[ f(u)/p(u) ],      E_{u~p}[ (f/p)² ] = ∫ f²/p du,

least for p ∝ √E[f²|u] (Owen 2013, chapter 9). `Importance` learns that p while training, from
the second moments of f in bins of u, averaged over the last steps and smoothed over neighbouring
bins, so that it is of use from the second step on; a uniform share bounds 1/p. The mean of the
loss, and so of its gradient, is the same for every p; its variance is not.

All laws draw once for the global batch, in n·P strata for P parts of n examples. Each part gets
one draw of every P neighbouring strata: it is stratified by itself too. `learner` draws one part
and divides it by rows (`parts`), so that a loss curve does not depend on the processes.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

BINS = 64  # of the density over u
WIDTH = 1.5  # bins, of the smoothing
MEMORY = 0.98  # of the averages; per step
FEW = 0.01  # draws of the mean that stand in where there is none


def stratified_parts(examples: int, parts: int) -> Tensor:
    """u (parts, examples), one in each of parts·examples strata; each row one in each of examples.

    Both in random order, so no example is tied to a time. A process r of a world of W that
    accumulates A parts takes the rows rA..rA+A-1 of parts = W·A, from a generator that all
    processes have in common.

    >>> u = stratified_parts(3, 2)
    >>> (u.flatten().sort().values * 6).floor()
    tensor([0., 1., 2., 3., 4., 5.], dtype=torch.float64)
    >>> (u.sort(1).values * 3).floor()
    tensor([[0., 1., 2.],
            [0., 1., 2.]], dtype=torch.float64)
    """
    dealt = torch.rand(parts, examples).argsort(0)  # who gets which of neighbouring strata
    order = torch.rand(parts, examples).argsort(1)
    within = (dealt + torch.rand(parts, examples, dtype=torch.float64)) / parts
    return (order + within.gather(1, order)) / examples


class Law(nn.Module, ABC):
    """Which times a training step draws; what it learns is in its state."""

    @abstractmethod
    def forward(self, examples: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Draws u in [0, 1) and their weights 1/p(u), shape (examples,) each, float64.

        Args:
            examples: how many.
            part: which part of the global batch this is.
            parts: of how many of the same size; all draw from equal generators.
        """

    def learn(self, u: Tensor, value: Tensor) -> None:
        """Take note that the integrand, not weighted, was value (B,) at u (B,)."""


class Iid(Law):
    """Each u by itself: the classic way."""

    def forward(self, examples: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        u = torch.rand(parts, examples, dtype=torch.float64)[part]
        return u, torch.ones_like(u)


class Stratified(Law):
    """One u in each stratum of the global batch."""

    def forward(self, examples: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        u = stratified_parts(examples, parts)[part]
        return u, torch.ones_like(u)


class Importance(Law):
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

    def forward(self, examples: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        p = self.density()
        edges = torch.cat([p.new_zeros(1), p.cumsum(0) / BINS])
        v = stratified_parts(examples, parts)[part]
        k = (torch.searchsorted(edges, v, right=True) - 1).clamp(0, BINS - 1)
        u = (k + ((v - edges[k]) * BINS / p[k]).clamp(0, 1)) / BINS
        return u, 1 / p[k]

    def learn(self, u: Tensor, value: Tensor) -> None:
        k = (u.cpu() * BINS).long().clamp(max=BINS - 1)
        squares = value.detach().double().cpu().square()
        self.count.mul_(MEMORY).index_add_(0, k, torch.ones_like(squares))
        self.moment.mul_(MEMORY).index_add_(0, k, squares)
