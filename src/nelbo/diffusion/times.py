r"""Estimates of the bound, on a grid of times and in continuous time.

Both write the diffusion term as an integral over u ∈ [0, 1), so the same draws of u serve both
and every estimate is unbiased:

    TimeGrid(times)   Σ_{i=1..T-1} KL_i   = E_u[ (T-1) KL_⌈(T-1)u⌉ ]
    ContinuousTime()   ∫_start^1 rate(t) dt = E_u[ (1-start) rate(start + (1-start) u) ]

u is drawn by `iid`, or by `stratified`, which with T-1 draws per example takes each term once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.checks import check_examples
from nelbo.diffusion.elbo import Bound, prior_term, reconstruction_term
from nelbo.diffusion.model import Model
from nelbo.diffusion.terms import DiffusionRate, DiffusionTerm, Term


def iid(examples: int, draws: int = 1) -> Tensor:
    """Draw independent uniform u, shape (examples, draws), float64."""
    return torch.rand(examples, draws, dtype=torch.float64)


def stratified(examples: int, draws: int = 1) -> Tensor:
    """Draw u uniform on [0, 1), one in each of examples·draws strata.

    Example i gets u_ij = (j + v_i)/draws, j = 0..draws-1, where v has one value in each of
    `examples` strata, in random order, so that no example is tied to a time. Shape (examples,
    draws), float64.

    >>> u = stratified(3, 2)
    >>> (u.flatten().sort().values * 6).floor()
    tensor([0., 1., 2., 3., 4., 5.], dtype=torch.float64)
    """
    v = (torch.randperm(examples) + torch.rand(examples, dtype=torch.float64)) / examples
    return (torch.arange(draws) + v[:, None]) / draws


class TimeDiscretization(ABC):
    """The times of z_1 .. z_T: a grid or continuous time."""

    #: time of z_1, from which P(x|z_1) decodes; z_T is at time 1
    first: float
    #: number of terms in the diffusion term; 1 for the integral
    terms: int
    #: T, or None in continuous time
    steps: int | None

    @abstractmethod
    def at(self, u: Tensor) -> Tensor:
        """Return the time at u ∈ [0, 1], shape of u; on a grid, the nearest one."""

    @abstractmethod
    def term(self, u: Tensor) -> tuple[Term, float]:
        """Return the term at uniform u, shape (B,), and the factor of its cost."""

    def diffusion(self, model: Model, batch: Batch, u: Tensor) -> Tensor:
        """Return an unbiased draw of the diffusion term for uniform u, shape (B,), nats."""
        if self.terms == 0:
            return torch.zeros_like(u)
        term, factor = self.term(u)
        return factor * term.draw(model, batch).cost


class TimeGrid(TimeDiscretization):
    """A grid of T times t_1 < ... < t_T = 1, with T - 1 KL terms.

    The whole bound takes T network calls.

    Args:
        times: increasing, in (0, 1], the last 1. The usual T steps are `TimeGrid.uniform(T)`.

    Raises:
        ValueError: if the times are not like that.
    """

    @checked
    def __init__(self, times: Tensor | Sequence[float]) -> None:
        times = torch.as_tensor(times, dtype=torch.float64)
        if (
            times.ndim != 1
            or len(times) < 1
            or not times[0] > 0
            or times[-1] != 1
            or not (times.diff() > 0).all()
        ):
            raise ValueError(
                f"times must increase within (0, 1] and end at 1.0; got {times.tolist()};"
                " try torch.linspace(0, 1, T + 1)[1:]"
            )
        self.times = times
        self.first = times[0].item()
        self.steps = len(times)
        self.terms = len(times) - 1

    def __repr__(self) -> str:
        first = ", ".join(f"{t:.4g}" for t in self.times[:2].tolist())
        return f"TimeGrid of {self.steps} times: {first}{', .., 1' if self.terms > 1 else ''}"

    @staticmethod
    @checked
    def uniform(steps: int) -> "TimeGrid":
        """Return the grid 1/T, 2/T, ..., 1.

        >>> TimeGrid.uniform(4).times
        tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        return TimeGrid(torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:])

    @override
    def at(self, u: Tensor) -> Tensor:
        return self.times.to(u.device)[(u * self.terms).round().long()]

    @override
    def term(self, u: Tensor) -> tuple[Term, float]:
        times = self.times.to(u.device)
        i = (u * self.terms).long().clamp(max=self.terms - 1)
        return DiffusionTerm(t=times[i + 1], s=times[i]), float(self.terms)


class ContinuousTime(TimeDiscretization):
    """Infinitely many steps between the time of z_1 and 1.

    Args:
        start: time of z_1; at least 1/T for a schedule of T betas.
    """

    steps = None
    terms = 1

    @checked
    def __init__(self, start: float = 0.0) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1); got {start}")
        self.first = start

    def __repr__(self) -> str:
        return f"ContinuousTime(start={self.first:g})"

    @override
    def at(self, u: Tensor) -> Tensor:
        return self.first + (1 - self.first) * u

    @override
    def term(self, u: Tensor) -> tuple[Term, float]:
        return DiffusionRate(self.at(u)), 1 - self.first


def times_of(
    model: Model, times: TimeDiscretization | int | None, steps: int | None = None
) -> TimeDiscretization:
    """Return the times; where left out, continuous time from the start of the model's schedule.

    Args:
        model: the model.
        times: the times, or a number of steps, as `steps`.
        steps: number of steps of the model's even grid, in place of `times`.

    Raises:
        ValueError: if they are something else, or both are given.
    """
    if steps is not None:
        if times is not None:
            raise ValueError(f"give steps or times, not both; got steps={steps} and times={times}")
        times = integer("steps", steps, 1)
    if times is None:
        return ContinuousTime(model.process.schedule.start)
    if isinstance(times, int) and not isinstance(times, bool):
        return grid_of(model, times)
    if not isinstance(times, TimeDiscretization):
        raise ValueError(
            f"times must be a number of steps, TimeGrid(times) or ContinuousTime(); got {times!r}"
        )
    return times


def grid_of(model: Model, times: TimeGrid | int) -> TimeGrid:
    """Return a grid as it is, and a number of steps as the model's even grid.

    Raises:
        ValueError: if it is neither, or the model has fewer times.
    """
    if isinstance(times, int) and not isinstance(times, bool):
        return TimeGrid(model.even_times(times))
    if not isinstance(times, TimeGrid):
        raise ValueError(f"a grid is a number of steps or TimeGrid(times); got {times!r}")
    return times


def elbo(
    model: Model,
    x: Tensor | Batch,
    times: TimeDiscretization | int | None = None,
    u: Tensor | None = None,
) -> Bound:
    """Return one unbiased, differentiable draw of the three terms of −ELBO per example, in nats.

    Args:
        model: the model; its `dtype` is the precision of the arithmetic around the network.
        x: examples, shape (B, ...), or a `Batch` of examples and conditions.
        times: TimeGrid(times), a number of even steps, or ContinuousTime(start); where left out,
            ContinuousTime from the start of the schedule.
        u: uniform draws in [0, 1), shape (B,) or (B, n), averaged over n. Where left out, they are
            stratified, with n the number of terms, which gives the full sum over a grid.

    Returns:
        Bound(prior, reconstruction, diffusion), shape (B,) each; `.elbo` is minus their sum.

    Raises:
        ValueError: if the examples are not of the model, or a model of P(x|c) lacks conditions.
    """
    batch = model.batch(x)
    model.check_condition(batch.condition, len(batch))
    check_examples(model, batch.x)
    return draw_terms(model, batch.to(model.device), times_of(model, times), u)


def draw_terms(
    model: Model, batch: Batch, times: TimeDiscretization, u: Tensor | None = None
) -> Bound:
    """Return the draw of `elbo` for examples that were checked, on the device of the model.

    They may be some of many: their shape, on which a grid may depend, is that of all.
    """
    x = batch.x
    if u is None:
        u = stratified(len(x), max(times.terms, 1))
    u = u.reshape(len(x), -1).to(x.device)
    first = torch.full((len(x),), times.first, dtype=torch.float64, device=x.device)
    prior = prior_term(model, x, torch.ones_like(first))
    reconstruction = reconstruction_term(model, x, first, batch.condition).cost
    draws = u.shape[1]
    row = torch.arange(len(x), device=x.device).repeat_interleave(draws)
    each = times.diffusion(model, batch[row], u.flatten())
    return Bound(prior, reconstruction, each.reshape(len(x), draws).mean(1))
