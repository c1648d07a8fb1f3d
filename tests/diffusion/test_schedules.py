"""Schedules: increasing, finite, end points met, the slope is the slope."""

import math

import numpy as np
import pytest
import torch

from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.schedules import Cosine, LearnedMonotone, Linear, PowerAlpha, Schedule
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.testing import ScheduleContract


@pytest.fixture(autouse=True)
def _seed():
    with seeded(3):
        yield


class TestLinear(ScheduleContract):
    ends = (-7.0, 6.0)

    @pytest.fixture
    def schedule(self):
        return Linear(-7.0, 6.0)


class TestCosine(ScheduleContract):
    ends = (-9.0, 8.0)

    @pytest.fixture
    def schedule(self):
        return Cosine(-9.0, 8.0)


class TestPowerAlpha(ScheduleContract):
    ends = (None, None)

    @pytest.fixture
    def schedule(self):
        return PowerAlpha()


class TestQuadraticAlpha(ScheduleContract):
    ends = (None, None)

    @pytest.fixture
    def schedule(self):
        return PowerAlpha(2.0)


class TestBetas(ScheduleContract):
    betas = (0.1, 0.2, 0.05, 0.4, 0.3, 0.25, 0.6)
    ends = (
        math.log(0.1 / 0.9),
        math.log(1 / np.prod([1 - b for b in betas]) - 1),
    )

    @pytest.fixture
    def schedule(self):
        return Schedule.from_betas(self.betas)


class TestOneBeta(ScheduleContract):
    """T = 1 has a single time, so there is nothing to increase and nothing to differentiate."""

    ends = (0.0, 0.0)
    test_increases = test_slope = test_is_elementwise = None

    @pytest.fixture
    def schedule(self):
        return Schedule.from_betas([0.5])


class TestLearnedPinned(ScheduleContract):
    ends = (-7.0, 6.0)

    @pytest.fixture(params=[0.0, 1.0, 3.0], ids=["new", "moved", "far"])
    def schedule(self, request):
        schedule = LearnedMonotone(-7.0, 6.0, width=8)
        with torch.no_grad():
            for p in schedule.parameters():
                if p.requires_grad:
                    p += request.param * torch.randn_like(p)
        return schedule.requires_grad_(False)

    def test_increases_with_weights_of_either_sign(self, schedule):
        """Hidden units rise with t and enter with positive weights, whatever their parameters."""
        with torch.no_grad():
            schedule.up.copy_(torch.linspace(-6, 6, 8))
            schedule.down.copy_(torch.linspace(3, -3, 8))
        self.test_increases(schedule)


class TestLearnedEnds(ScheduleContract):
    @pytest.fixture(params=[0.0, 1.0], ids=["new", "moved"])
    def schedule(self, request):
        schedule = LearnedMonotone(-7.0, 6.0, width=8, learn_endpoints=True)
        with torch.no_grad():
            for p in schedule.parameters():
                p += request.param * torch.randn_like(p)
        low, log_width = schedule.ends.tolist()
        self.ends = (low, low + math.exp(log_width))
        return schedule.requires_grad_(False)


def test_cosine_is_cosine():
    """Nichol & Dhariwal 2021: √α_t = cos of an angle linear in t, here cut at γ's ends."""
    schedule = Cosine(-9.0, 8.0)
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    angle = torch.sigmoid(-schedule(t)).sqrt().acos()
    torch.testing.assert_close(
        angle.diff(), (angle[-1] - angle[0]).expand(32) / 32, rtol=1e-9, atol=0
    )


def test_linear_alpha_is_linear():
    """Equation 9: α_t = 1 - t, its ends exactly 1 and 0."""
    process = GaussianDiffusion(PowerAlpha(), Affine())
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t), 1 - t, rtol=1e-14, atol=0)
    assert process.log_alpha(t[-1:]).item() == -math.inf
    assert process.log_one_minus_alpha(t[:1]).item() == -math.inf


@pytest.mark.parametrize("learn", [True, False], ids=["learned", "pinned"])
def test_gradients_reach_what_is_learned(learn):
    """Learned γ: its value and its slope have gradients in every learned
    parameter, and pinned end points have none."""
    schedule = LearnedMonotone(-7.0, 6.0, width=8, learn_endpoints=learn)
    process = GaussianDiffusion(schedule, Affine())
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    z = torch.ones(2, 3, dtype=torch.float64)
    process.rate(z, z, 0 * z, t).sum().backward()
    assert (schedule.ends.grad is not None) == learn
    for name, p in schedule.named_parameters():
        if p.requires_grad:
            assert p.grad.isfinite().all() and (p.grad != 0).all(), name


def test_slope_of_a_learned_schedule_is_differentiable():
    """Equation 8: ∂γ'/∂φ by autograd is the difference quotient of γ' in φ."""
    schedule = LearnedMonotone(-7.0, 6.0, width=4)
    process = GaussianDiffusion(schedule, Affine())
    t, z = torch.tensor([0.37], dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(process.rate(z, z, 0 * z, t).sum(), schedule.shift)
    want = torch.empty_like(got)
    for i in range(4):
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                schedule.shift[i] += h
                values.append(process.rate(z, z, 0 * z, t).item())
                schedule.shift[i] -= h
        want[i] = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


# ---- betas: equation 2

BETAS = {
    "classic": np.linspace(1e-4, 0.02, 1000),
    "tiny": np.full(50, 1e-9),
    "huge": np.array([0.999, 0.5, 0.999, 0.9999]),
    "mixed": np.array([1e-8, 0.9, 1e-6, 0.3]),
    "one": np.array([0.37]),
    "cosine, capped": np.minimum(
        1
        - np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        / np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2,
        0.999,
    ),
}


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS.keys())
def test_betas_come_back(betas):
    """Equation 2: α_t = Π_{s<=t}(1-β_s) at t/T, and the step from (t-1)/T has β_t again,
    to the digits that γ holds: rounding γ by |γ| 2^-52 moves log α by (1-α) |γ| 2^-52."""
    schedule = Schedule.from_betas(betas.tolist())
    process = GaussianDiffusion(schedule, Affine())
    steps = len(betas)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    s = torch.arange(steps, dtype=torch.float64) / steps
    log_alpha = torch.tensor(np.cumsum(np.log1p(-betas)))
    torch.testing.assert_close(process.log_alpha(t), log_alpha, rtol=1e-13, atol=0)
    got, want = process.beta(s, t), torch.tensor(betas)
    digits = -torch.expm1(log_alpha) * schedule(t).abs() + log_alpha.abs()
    allowed = 1e-15 * want + 4 * 2**-52 * digits * (1 - want)
    assert ((got - want).abs() <= allowed).all()
    tilde = process.beta_tilde(s, t)
    assert tilde.isfinite().all()
    assert tilde[0] == 0 and (tilde[1:] > 0).all() and (tilde < got).all()
    grid = TimeGrid.uniform(steps).times
    torch.testing.assert_close(schedule(grid), schedule(t), rtol=0, atol=1e-12)


def test_times_between_betas_interpolate():
    """Between neighbouring times γ is linear; `Betas` is a continuous schedule from 1/T on."""
    schedule = Schedule.from_betas([0.1, 0.2, 0.3, 0.4])
    a, b, c = schedule(torch.tensor([0.5, 0.6, 0.75], dtype=torch.float64))
    torch.testing.assert_close(b, a + (c - a) * 0.4, rtol=1e-12, atol=0)


def test_slope_at_a_time_of_a_beta():
    """The slope at i/T is that of a neighbouring interval, not the zero of a rounded time."""
    schedule = Schedule.from_betas([0.1, 0.2, 0.3, 0.4])
    process = GaussianDiffusion(schedule, Affine())
    t = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    z = torch.ones(4, 1, dtype=torch.float64)
    assert (process.rate(z, z, 0 * z, t) > 0).all()


# ---- refusals: name, value, fix


@pytest.mark.parametrize(
    "betas", [[0.0, 0.1], [0.1, 1.0], [-0.1], [], [[0.1, 0.2]], [float("nan")]], ids=str
)
def test_betas_outside_their_range_are_refused(betas):
    """Each β in (0, 1), one row."""
    with pytest.raises(ValueError, match=r"betas must be .* \(0, 1\); got .*; try torch.linspace"):
        Schedule.from_betas(betas)


@pytest.mark.parametrize("make", [Linear, Cosine, LearnedMonotone])
@pytest.mark.parametrize("ends", [(1.0, 1.0), (6.0, -7.0), (-math.inf, 6.0), (-7.0, math.nan)])
def test_empty_ranges_of_gamma_are_refused(make, ends):
    """γ_min < γ_max, both finite."""
    with pytest.raises(ValueError, match=r"gamma_min must be less than gamma_max.*try gamma_min"):
        make(*ends)


@pytest.mark.parametrize(
    "times",
    [[0.5, 0.9], [0.0, 1.0], [0.5, 0.5, 1.0], [0.6, 0.4, 1.0], [], [-0.1, 1.0]],
)
def test_grids_that_do_not_end_at_one_are_refused(times):
    """Times increase within (0, 1] and end at 1."""
    with pytest.raises(ValueError, match=r"times must increase .*end at 1.0; got .*try torch"):
        TimeGrid(times)


def test_other_times_are_refused():
    """Steps >= 1, a start in [0, 1), and no time before the first β."""
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        TimeGrid.uniform(0)
    for start in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"start must be .*; got"):
            ContinuousTime(start)
    schedule = Schedule.from_betas([0.1, 0.2, 0.3])
    with pytest.raises(
        ValueError, match=r"no time between 0 and 1/3; got 0.1.*ContinuousTime\(start=1/3\)"
    ):
        schedule(torch.tensor([0.1, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("ends", [(-3000.0, 6.0), (-7.0, 1e6), (float("-inf"), 6.0)])
@pytest.mark.parametrize("kind", [Linear, Cosine, LearnedMonotone])
def test_ends_beyond_numbers_are_refused_with_the_range(kind, ends):
    with pytest.raises(ValueError, match=r"both within -300..300; got .* try gamma_min"):
        kind(*ends)


def test_it_is_computed_once_for_the_times_of_a_draw():
    """Only while it is asked to remember, and anew for other times, or those that have changed."""
    calls = []

    class Counted(Linear):
        def forward(self, t):
            calls.append(1)
            return super().forward(t)

    schedule, t = Counted(-4.0, 4.0), torch.rand(3).double()
    with schedule.remembering():
        first = schedule(t)
        assert schedule(t) is first and len(calls) == 1
        assert torch.equal(schedule(t.clone()), first) and len(calls) == 2
        t += 0.1
        assert torch.equal(schedule(t), Linear(-4.0, 4.0)(t)) and len(calls) == 3
        with torch.inference_mode():  # whose tensors do not know that they change
            assert len({schedule(t * 1.0).sum().item() for _ in range(2)}) == 1
    schedule(t)
    schedule(t)
    assert len(calls) == 7
