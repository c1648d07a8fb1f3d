r"""Schedules: increasing functions γ(t) = -log SNR(t) of time t ∈ [0, 1].

    SNR(t) = α_t / (1 - α_t) = exp(-γ(t)),   α_t = sigmoid(-γ(t)),   1 - α_t = sigmoid(γ(t)).

Time 0 is the end of the data, time 1 the end of the noise. The form α_t = Π_{s<=t} (1-β_s) of the
derivation, t = 1..T, has the times t/T: `Schedule.from_betas`. Everything is float64, because the
β of a step is a small difference of neighbouring γ. Sources: Kingma et al. 2021 (VDM), section 3
and appendix H; Nichol & Dhariwal 2021 (cosine).

To add a schedule: one class with `forward(t) -> gamma`, see CONTRIBUTING.md.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from typing_extensions import override


class Schedule(nn.Module, ABC):
    """γ(t) = -log SNR(t), increasing in t."""

    #: earliest time at which γ is defined, and at which a grid or continuous time may start
    start: float = 0.0
    #: T of a schedule that is a table of T times; None for a formula
    steps: int | None = None
    #: the last times with their γ, if they are remembered
    recent: deque[tuple[Tensor, int, Tensor]] | None = None

    def interior(self) -> list[nn.Parameter]:
        """Return the learned parameters that do not change γ(0) and γ(1).

        In continuous time they affect the variance of a draw of the bound, not its mean. All other
        learned parameters change the endpoints.
        """
        return []

    @override
    def __call__(self, t: Tensor | float) -> Tensor:
        """Return γ(t) for times t, or a number for one time; float64."""
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        if self.recent is None or t.is_inference():
            return self._of(t)
        for times, version, gamma in self.recent:
            if times is t and version == t._version:
                return gamma
        gamma = self._of(t)
        self.recent.appendleft((t, t._version, gamma))
        return gamma

    def _of(self, t: Tensor) -> Tensor:
        gamma: Tensor = super().__call__(t)
        return gamma

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, compute γ once for the tensors of times of a draw, not for each formula.

        The parameters must not change there.
        """
        before, self.recent = self.recent, deque(maxlen=REMEMBERED)
        try:
            yield
        finally:
            self.recent = before

    @abstractmethod
    @override
    def forward(self, t: Tensor) -> Tensor:
        """Return γ(t) = -log SNR(t), float64, for times t in [start, 1], elementwise."""

    def inverse(self, gamma: Tensor) -> Tensor | None:
        """Return t with γ(t) = gamma by a formula, shape of gamma; None where there is none."""
        return None

    @staticmethod
    def from_betas(betas: Tensor | Sequence[float]) -> "Betas":
        """Return the schedule α_t = Π_{s<=t} (1 - β_s) at the times t/T, t = 1..T (equation 2)."""
        return Betas(betas)


#: earliest time that is not 0, where γ may be infinite
LEAST = 2.0**-54
REMEMBERED = 4  # tensors of times: a draw has those of a step, and a pair of draws four
#: largest |γ|: beyond it, e^γ or e^-γ times a number of the data overflows float64
FURTHEST = 300


def _check_range(gamma_min: float, gamma_max: float) -> None:
    if not -FURTHEST <= gamma_min < gamma_max <= FURTHEST:
        raise ValueError(
            f"gamma_min must be less than gamma_max, both within -{FURTHEST}..{FURTHEST}; got"
            f" {gamma_min} and {gamma_max}; try gamma_min=-7, gamma_max=6"
        )


class Linear(Schedule):
    """Linear schedule: γ(t) = γ_min + (γ_max - γ_min) t.

    Args:
        gamma_min: γ(0).
        gamma_max: γ(1).

    >>> Linear(-7.0, 6.0)(torch.tensor([0.0, 0.5, 1.0]).double())
    tensor([-7.0000, -0.5000,  6.0000], dtype=torch.float64)
    """

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        _check_range(gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    @override
    def forward(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t.double()

    @override
    def inverse(self, gamma: Tensor) -> Tensor:
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)


class Cosine(Schedule):
    """Cosine schedule: √α_t = cos(φ) with φ linear in t, so γ = 2 log tan φ.

    Args:
        gamma_min: γ(0), which sets φ(0).
        gamma_max: γ(1), which sets φ(1).
    """

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        _check_range(gamma_min, gamma_max)
        self.first = math.atan(math.exp(gamma_min / 2))
        self.last = math.atan(math.exp(gamma_max / 2))

    @override
    def forward(self, t: Tensor) -> Tensor:
        return 2 * (self.first + (self.last - self.first) * t.double()).tan().log()

    @override
    def inverse(self, gamma: Tensor) -> Tensor:
        return ((gamma / 2).exp().atan() - self.first) / (self.last - self.first)


class Betas(Schedule):
    """Discrete schedule: γ at t/T from β_1..β_T, linear in between, γ(0) = -inf (α_0 = 1).

    Args:
        betas: β_1..β_T, each in (0, 1).
    """

    gamma: Tensor
    steps: int

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas must be one row of numbers in (0, 1); got {betas.tolist()};"
                " try torch.linspace(1e-4, 0.02, 1000)"
            )
        log_alpha = torch.log1p(-betas).cumsum(0)
        gamma = (-torch.expm1(log_alpha)).log() - log_alpha
        self.register_buffer("gamma", gamma, persistent=False)
        self.steps = len(betas)
        self.start = 1 / self.steps

    @override
    def forward(self, t: Tensor) -> Tensor:
        place = t.double() * self.steps - 1
        # (i/T)·T may differ from the integer i by an ulp; detached, as rounding has no gradient
        miss = (place - place.round()).detach()
        place = torch.where(miss.abs() < 1e-9, place - miss, place)
        if ((place < 0) & (place != -1)).any():
            raise ValueError(
                f"a schedule of {self.steps} betas has no time between 0 and 1/{self.steps};"
                f" got {t.min().item():.6g}; try ContinuousTime(start=1/{self.steps})"
            )
        if self.steps == 1:
            gamma = self.gamma[0].expand_as(place)
        else:
            below = place.clamp(0, self.steps - 2).floor().long()
            low, high = self.gamma[below], self.gamma[below + 1]
            gamma = low + (high - low) * (place - below)
        return torch.where(place < 0, -torch.inf, gamma)

    @override
    def inverse(self, gamma: Tensor) -> Tensor:
        if self.steps == 1:
            return torch.ones_like(gamma)
        below = torch.searchsorted(self.gamma, gamma.contiguous()).clamp(1, self.steps - 1) - 1
        low, high = self.gamma[below], self.gamma[below + 1]
        return (below + 1 + (gamma - low) / (high - low)) / self.steps


class LearnedMonotone(Schedule):
    r"""Learned schedule: γ(t) = γ_0 + (γ_1 - γ_0) (g(t) - g(0)) / (g(1) - g(0)).

    g increases, as its weights are positive. The endpoints are exact, and fixed or learned; the
    width γ_1 - γ_0 stays positive. Weight decay must not apply to a schedule
    (`nelbo.training.optim.parameter_groups` sees to it).

    Args:
        gamma_min: γ_0, or its initial value if it is learned.
        gamma_max: γ_1, or its initial value if it is learned.
        width: hidden units of g.
        learn_endpoints: whether γ_0 and γ_1 are learned.
    """

    def __init__(
        self,
        gamma_min: float,
        gamma_max: float,
        width: int = 16,
        learn_endpoints: bool = False,
    ) -> None:
        super().__init__()
        _check_range(gamma_min, gamma_max)
        ends = torch.tensor([gamma_min, math.log(gamma_max - gamma_min)], dtype=torch.float64)
        self.ends = nn.Parameter(ends, requires_grad=learn_endpoints)
        # g(t) = softplus(linear) t + Σ softplus(up) sigmoid(softplus(down) t + shift): sigmoids
        # spread over the range of t, and wide enough that their sum is nearly t at first
        self.linear = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
        up, steep = math.log(math.expm1(1 / width)), math.log(math.expm1(1.25 * width))
        self.up = nn.Parameter(torch.full((width,), up, dtype=torch.float64))
        self.down = nn.Parameter(torch.full((width,), steep, dtype=torch.float64))
        places = torch.linspace(-0.1, 1.1, width, dtype=torch.float64)
        self.shift = nn.Parameter(-1.25 * width * places)

    @override
    def interior(self) -> list[nn.Parameter]:
        return [self.linear, self.up, self.down, self.shift]

    def _g(self, t: Tensor) -> Tensor:
        hidden = torch.sigmoid(softplus(self.down) * t[..., None] + self.shift)
        return softplus(self.linear) * t + (softplus(self.up) * hidden).sum(-1)

    @override
    def forward(self, t: Tensor) -> Tensor:
        first, last = self._g(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device))
        share = (self._g(t.double()) - first) / (last - first)
        return self.ends[0] + self.ends[1].exp() * share


class PowerAlpha(Schedule):
    """Schedule of masked diffusion: α_t = 1 - t^p, so γ = log t^p - log(1 - t^p), -inf to inf.

    The bound in continuous time is the same for all p. The variance of a draw is infinite for
    p = 1, the usual schedule, where rate² grows like 1/t, and finite for p > 1. For p = 3 what the
    rare early changes of a symbol add to it vanishes at 0, so that few draws do not miss it.

    Args:
        power: p, positive.

    >>> PowerAlpha(2.0)(torch.tensor([0.5]).double()).sigmoid()
    tensor([0.2500], dtype=torch.float64)
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"power must be positive; got {power}")
        self.power = power

    @override
    def forward(self, t: Tensor) -> Tensor:
        masked = t.double() ** self.power
        return masked.log() - torch.log1p(-masked)

    @override
    def inverse(self, gamma: Tensor) -> Tensor:
        return gamma.sigmoid() ** (1 / self.power)


@torch.no_grad()
def time_of(schedule: Schedule, gamma: Tensor, first: float) -> Tensor:
    """Return t in [first, 1] with γ(t) = gamma, by bisection if need be; shape of gamma."""
    if (t := schedule.inverse(gamma)) is not None:
        return t.clamp(first or LEAST, 1.0)
    low, high = torch.full_like(gamma, first), torch.ones_like(gamma)
    for _ in range(53):
        middle = (low + high) / 2
        above = schedule(middle) > gamma
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


# ---- schedules by name, of (gamma_min, gamma_max), where the class takes other arguments


def ddpm_betas(gamma_min: float, gamma_max: float) -> Betas:
    """Return the schedule of 1000 betas from 1e-4 to 0.02 (Ho et al. 2020); ignores the ends."""
    return Betas(torch.linspace(1e-4, 0.02, 1000))


def learned_endpoints(gamma_min: float, gamma_max: float) -> LearnedMonotone:
    """Return a learned schedule whose endpoints are learned too, with these initial values."""
    return LearnedMonotone(gamma_min, gamma_max, learn_endpoints=True)


def linear_alpha(gamma_min: float, gamma_max: float) -> PowerAlpha:
    """Return the schedule α_t = 1 - t; ignores the ends, as its own are infinite."""
    return PowerAlpha(1.0)


def quadratic_alpha(gamma_min: float, gamma_max: float) -> PowerAlpha:
    """Return the schedule α_t = 1 - t²; ignores the ends, as its own are infinite."""
    return PowerAlpha(2.0)


def cubic_alpha(gamma_min: float, gamma_max: float) -> PowerAlpha:
    """Return the schedule α_t = 1 - t³; ignores the ends, as its own are infinite."""
    return PowerAlpha(3.0)


def log_density(schedule: Schedule, t: Tensor) -> Tensor:
    r"""Return log p(γ) at γ = γ(t), where p = 1/γ'(t) is the density of γ for uniform t.

    The result has the shape of t. Its gradient with respect to the parameters φ of the schedule is
    the one at fixed γ, so t moves with φ:

        d log p(γ)/dφ = −∂ log γ'(t)/∂φ + (∂ log γ'(t)/∂t / γ'(t)) ∂γ(t)/∂φ.
    """
    t = t.detach().requires_grad_()
    gamma = schedule(t)
    (slope,) = torch.autograd.grad(gamma.sum(), t, create_graph=True)
    (bend,) = torch.autograd.grad(slope.log().sum(), t, retain_graph=True)
    return -slope.log() + (bend / slope).detach() * (gamma - gamma.detach())


def even_times(schedule: Schedule, steps: int, count: int) -> Tensor:
    """Return about `count` evenly spaced times of a schedule, at least `steps`, the last 1.

    Raises:
        ValueError: if `steps` is below 1, or above the number of times of the schedule.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if schedule.steps is None:
        return torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:]
    if steps > schedule.steps:
        raise ValueError(
            f"steps must be at most {schedule.steps}, the number of times in the schedule;"
            f" got {steps}"
        )
    count = min(count, schedule.steps)
    i = torch.linspace(0, schedule.steps, count + 1, dtype=torch.float64)[1:].round()
    return i / schedule.steps
