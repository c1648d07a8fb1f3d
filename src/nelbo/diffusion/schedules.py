r"""Schedules: one increasing function γ(t) = -log SNR(t) of time t ∈ [0, 1].

    SNR(t) = α_t / (1 - α_t) = exp(-γ(t)),   α_t = sigmoid(-γ(t)),   1 - α_t = sigmoid(γ(t)).

Time 0 is the data's end, time 1 the noise's. The derivation's own form, α_t = Π_{s<=t} (1-β_s) for
t = 1..T, lives on the times t/T: `Schedule.from_betas`. Everything is float64, because the β of a
step is a small difference of neighbouring γ's. Sources: Kingma et al. 2021 (VDM), section 3 and
appendix H; Nichol & Dhariwal 2021 (cosine).

To add a schedule: one class with `forward(t) -> gamma`, see CONTRIBUTING.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Schedule(nn.Module, ABC):
    """γ(t), increasing in t."""

    #: earliest time at which γ is defined; a grid or a continuum starts here or later
    start: float = 0.0
    #: T of a schedule that is a table of T times; None where γ is a formula
    steps: int | None = None

    def interior(self) -> list[nn.Parameter]:
        """Learned parameters that leave γ(0) and γ(1) alone: no bound in continuous time depends
        on them, only the variance of its draws. Other learned parameters move the ends."""
        return []

    @abstractmethod
    def forward(self, t: Tensor) -> Tensor:
        """γ(t) = -log SNR(t), float64, for times t in [start, 1], elementwise."""

    @staticmethod
    def from_betas(betas: Tensor | Sequence[float]) -> "Betas":
        """α_t = Π_{s<=t} (1 - β_s) at the times t/T, t = 1..T (equation 2)."""
        return Betas(betas)


#: γ beyond which e^γ or e^-γ times a number of data is none of float64
FURTHEST = 300


def _check_range(gamma_min: float, gamma_max: float) -> None:
    if not -FURTHEST <= gamma_min < gamma_max <= FURTHEST:
        raise ValueError(
            f"gamma_min must be less than gamma_max, both within -{FURTHEST}..{FURTHEST}; got"
            f" {gamma_min} and {gamma_max}; try gamma_min=-7, gamma_max=6"
        )


class Linear(Schedule):
    """γ(t) = γ_min + (γ_max - γ_min) t.

    >>> Linear(-7.0, 6.0)(torch.tensor([0.0, 0.5, 1.0]).double())
    tensor([-7.0000, -0.5000,  6.0000], dtype=torch.float64)
    """

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        _check_range(gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    def forward(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t.double()


class Cosine(Schedule):
    """√α_t = cos(φ), φ linear in t: γ = 2 log tan φ, with φ cut where γ is γ_min and γ_max."""

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        _check_range(gamma_min, gamma_max)
        self.first = math.atan(math.exp(gamma_min / 2))
        self.last = math.atan(math.exp(gamma_max / 2))

    def forward(self, t: Tensor) -> Tensor:
        return 2 * (self.first + (self.last - self.first) * t.double()).tan().log()


class Betas(Schedule):
    """The discrete form: γ at t/T from β_1..β_T, linear in between, γ(0) = -inf (α_0 = 1).

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

    def forward(self, t: Tensor) -> Tensor:
        place = t.double() * self.steps - 1
        # (i/T)·T may miss the integer i by an ulp; detached, since rounding has no slope
        miss = (place - place.round()).detach()
        place = torch.where(miss.abs() < 1e-9, place - miss, place)
        if ((place < 0) & (place != -1)).any():
            raise ValueError(
                f"a schedule of {self.steps} betas has no time between 0 and 1/{self.steps};"
                f" got {t.min().item():.6g}; try ContinuousTime(start=1/{self.steps})"
            )
        if self.steps == 1:
            gamma = self.gamma.expand_as(place)
        else:
            below = place.clamp(0, self.steps - 2).floor().long()
            low, high = self.gamma[below], self.gamma[below + 1]
            gamma = low + (high - low) * (place - below)
        return torch.where(place < 0, -torch.inf, gamma)


class LearnedMonotone(Schedule):
    r"""γ(t) = γ_0 + (γ_1 - γ_0) (g(t) - g(0)) / (g(1) - g(0)), g increasing by positive weights.

    The end points are met exactly. They are pinned, or learned (then the width γ_1 - γ_0 stays
    positive); weight decay must leave a schedule alone (`optimise` does).

    Args:
        gamma_min: γ_0, or its start where it is learned.
        gamma_max: γ_1, or its start where it is learned.
        width: hidden units of g.
        learn_endpoints: learn γ_0 and γ_1.
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
        # g(t) = softplus(linear) t + Σ softplus(up) sigmoid(softplus(down) t + shift): steps side
        # by side, wide enough to make nearly t at first, each of a part of the range of t
        self.linear = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
        up, steep = math.log(math.expm1(1 / width)), math.log(math.expm1(1.25 * width))
        self.up = nn.Parameter(torch.full((width,), up, dtype=torch.float64))
        self.down = nn.Parameter(torch.full((width,), steep, dtype=torch.float64))
        places = torch.linspace(-0.1, 1.1, width, dtype=torch.float64)
        self.shift = nn.Parameter(-1.25 * width * places)

    def interior(self) -> list[nn.Parameter]:
        return [self.linear, self.up, self.down, self.shift]

    def _g(self, t: Tensor) -> Tensor:
        hidden = torch.sigmoid(softplus(self.down) * t[..., None] + self.shift)
        return softplus(self.linear) * t + (softplus(self.up) * hidden).sum(-1)

    def forward(self, t: Tensor) -> Tensor:
        first, last = self._g(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device))
        share = (self._g(t.double()) - first) / (last - first)
        return self.ends[0] + self.ends[1].exp() * share


class PowerAlpha(Schedule):
    """α_t = 1 - t^p, for a mask process: γ = log t^p - log(1 - t^p), from -inf to inf.

    The continuous bound is the same for all p; the variance of a draw of it is infinite for
    p = 1, the usual schedule, where rate² grows like 1/t, and finite for p > 1.

    >>> PowerAlpha(2.0)(torch.tensor([0.5]).double()).sigmoid()
    tensor([0.2500], dtype=torch.float64)
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"power must be positive; got {power}")
        self.power = power

    def forward(self, t: Tensor) -> Tensor:
        masked = t.double() ** self.power
        return masked.log() - torch.log1p(-masked)


# ---- schedules by name, of (gamma_min, gamma_max), where the class takes other arguments


def ddpm_betas(gamma_min: float, gamma_max: float) -> Betas:
    """1000 β's from 1e-4 to 0.02 (Ho et al. 2020), whatever the ends."""
    return Betas(torch.linspace(1e-4, 0.02, 1000))


def learned_endpoints(gamma_min: float, gamma_max: float) -> LearnedMonotone:
    """A learned schedule whose ends are learned too, from these."""
    return LearnedMonotone(gamma_min, gamma_max, learn_endpoints=True)


def linear_alpha(gamma_min: float, gamma_max: float) -> PowerAlpha:
    """α_t = 1 - t, whose ends are infinite."""
    return PowerAlpha(1.0)


def quadratic_alpha(gamma_min: float, gamma_max: float) -> PowerAlpha:
    """α_t = 1 - t², whose ends are infinite."""
    return PowerAlpha(2.0)


def log_density(schedule: Schedule, t: Tensor) -> Tensor:
    r"""log p(γ) at γ = γ(t): p = dt/dγ = 1/γ'(t) is the density of γ for uniform t; shape of t.

    Its gradient in the schedule's parameters φ is that at fixed γ, so t moves with φ:

        d log p(γ)/dφ = −∂ log γ'(t)/∂φ + (∂ log γ'(t)/∂t / γ'(t)) ∂γ(t)/∂φ.
    """
    t = t.detach().requires_grad_()
    gamma = schedule(t)
    (slope,) = torch.autograd.grad(gamma.sum(), t, create_graph=True)
    (bend,) = torch.autograd.grad(slope.log().sum(), t, retain_graph=True)
    return -slope.log() + (bend / slope).detach() * (gamma - gamma.detach())
