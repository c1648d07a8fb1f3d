"""Where the costs are held to be before a draw: the steps' weights, their strata, and the errors
of bounds of which few steps are most."""

import math

import pytest
import torch
from support.known_models import MODELS
from torch import Tensor, nn

from nelbo import evaluate
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation.allocation import STRATA, Strata
from nelbo.evaluation.time_density import SHARE, TimeDensity, even, time_density
from nelbo.integrations import wrap

T = 1000
LINEAR = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
ANGLE = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
COSINE = (1 - (ANGLE[1:].cos() / ANGLE[:-1].cos()).square()).clamp(max=0.999)


class Zero(nn.Module):
    """A network that predicts none of whatever it is asked for."""

    def forward(self, y: Tensor, time: Tensor) -> Tensor:
        return torch.zeros_like(y)


def images(examples: int, shape: tuple[int, ...] = (1, 4, 4)) -> Tensor:
    return torch.randint(
        0, 256, (examples, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def no_noise(betas: Tensor, variance: str) -> Tensor:
    """Return the cost of each step where the network predicts no noise, nats per dim, (T - 1,)."""
    alpha = (1 - betas).cumprod(0)
    s, t = alpha[:-1], alpha[1:]
    snr = alpha / (1 - alpha)
    each = (snr[:-1] / snr[1:] - 1) / 2
    if variance == "large":
        ratio = (1 - s) / (1 - t)  # β̃/β
        each = ratio * each + (ratio - 1 - ratio.log()) / 2
    return each


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_no_step_weighs_more_than_its_share(betas, variance):
    """A network predicts no noise, so that costs have a closed form: whatever the schedule, a step
    is drawn at least SHARE as often as it deserves; and never less than evenly."""
    model = wrap(Zero(), (1, 4, 4), betas=betas, variance=variance)
    found = time_density(model, TimeGrid.uniform(T), images(40))
    exact = no_noise(betas, variance)
    assert (found.mass / (exact / exact.sum())).min() > SHARE[1] - 1e-9
    assert found.mass.min() >= SHARE[2] / (T - 1)
    assert found.mass.sum().item() == pytest.approx(1)


def test_the_reference_is_the_linear_denoiser():
    """The steps of a network that predicts the data have their shares too; the data are normal in
    16 dimensions, so that their exact denoiser is linear."""
    model = wrap(Zero(), (1, 4, 4), betas=LINEAR, predicts="data")
    x = images(4000)
    found = time_density(model, TimeGrid.uniform(T), x)
    alpha = (1 - LINEAR).cumprod(0)
    snr = alpha / (1 - alpha)
    e = x.flatten(1).double() / 127.5 - 1
    spectrum = torch.linalg.eigvalsh(e.T.cov(correction=0))
    left = (spectrum / (snr[1:, None] * spectrum + 1)).mean(1)
    exact = (snr[:-1] - snr[1:]) * left
    assert (found.mass / (exact / exact.sum())).min() > SHARE[0] - 1e-6


def test_symbols_are_shown_in_proportion():
    """A step of a mask process by what it shows, in a grid of uneven times."""
    known = MODELS["symbols"]()
    times = TimeGrid([0.05, 0.06, 0.9, 0.91, 1.0])
    found = time_density(known.model, times, known.examples(9))
    shown = -known.model.process.alpha(times.times).diff()
    expected = (SHARE[0] + SHARE[1]) * shown / shown.sum() + SHARE[2] / 4
    torch.testing.assert_close(found.mass, expected)


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_bins_of_continuous_time_are_small(start):
    """A schedule that runs through half of γ in a millionth of the time: the bins follow it."""

    class Steep(nn.Module):
        start = 0.0

        def forward(self, t: Tensor) -> Tensor:
            return -4 + 10 * t.double() + 4 * torch.tanh(1e6 * t.double())

    known = MODELS["gaussian"]()
    known.model.process.schedule = Steep()
    times = ContinuousTime(start)
    found = time_density(known.model, times, known.examples(9))
    gamma = known.model.process.schedule(times.at(found.u))
    assert gamma.diff().max() <= (gamma[-1] - gamma[0]) / 200
    assert found.u.diff().max() <= 1 / 200


@pytest.mark.parametrize("name", ["levels", "symbols"])
def test_models_of_logits_are_drawn_evenly_in_continuous_time(name):
    known, times = MODELS[name](), ContinuousTime()
    found = time_density(known.model, times, known.examples(9))
    assert torch.equal(found.mass, even(times).mass)


def test_places_are_those_of_the_distribution_function():
    """By a fine quadrature of places: each bin as often as its mass, and the mean weight one; a
    step of a grid is met in its middle."""
    found = TimeDensity(
        torch.tensor([0.0, 0.1, 0.5, 1.0]), torch.tensor([0.7, 0.1, 0.2]).double(), steps=False
    )
    n = 100_000
    place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    u, weight = found.at(place)
    assert (u.diff() > 0).all()
    inside = [((a < u) & (u < b)).double().mean().item() for a, b in found.u.unfold(0, 2, 1)]
    assert inside == pytest.approx([0.7, 0.1, 0.2], abs=2 / n)
    assert weight.mean().item() == pytest.approx(1)
    assert (weight * u).mean().item() == pytest.approx(0.5, abs=1e-4)
    steps = TimeDensity(found.u, found.mass, steps=True)
    middle = steps.at(place)[0].unique()
    torch.testing.assert_close(middle, torch.tensor([0.05, 0.3, 0.75]).to(middle))


@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_heavy_steps_are_strata_of_their_own(betas):
    model = wrap(Zero(), (1, 4, 4), betas=betas)
    found = time_density(model, TimeGrid.uniform(T), images(40))
    edges = found.groups(STRATA)
    assert edges[0] == 0 and edges[-1] == T - 1 and len(edges) <= STRATA + 1
    assert edges == sorted(set(edges))
    heavy = (found.mass >= 1 / STRATA).nonzero().flatten().tolist()
    assert heavy
    assert all({i, i + 1} <= set(edges) for i in heavy)
    of_others = found.mass.tensor_split(edges[1:-1])
    assert max(m.sum().item() for m in of_others if len(m) > 1) < 2 / STRATA


def test_without_weights_all_times_are_alike():
    grid, time = Strata(TimeGrid.uniform(100)), Strata(ContinuousTime(0.1))
    torch.testing.assert_close(even(grid.times).mass, torch.full((99,), 1 / 99).double())
    torch.testing.assert_close(time.edges, torch.linspace(0.1, 1, 33).double())


SEEDS = 50


def errors_away(model: Model, x: Tensor, exact: float, **how: object) -> Tensor:
    """By how many stated errors the diffusion term of each seed misses, bits/dim."""
    found = [
        evaluate(model, x, times=TimeGrid.uniform(T), seed=seed, **how)  # type: ignore[arg-type]
        for seed in range(SEEDS)
    ]
    errors = torch.tensor([r.standard_error.monte_carlo for r in found])
    return (torch.tensor([r.terms.diffusion for r in found]) - exact) / errors


@pytest.mark.parametrize(
    ("betas", "variance"),
    [
        pytest.param(LINEAR, "small", id="linear", marks=pytest.mark.slow),
        pytest.param(COSINE, "large", id="cosine"),
    ],
)
def test_the_error_knows_of_few_steps_that_carry_the_cost(betas, variance):
    """At the default calls 16 images are measured without a pilot, by fewer draws than there are
    steps; of even draws the linear schedule has a quarter of the seeds outside of 1.96 errors,
    and some by 9; and the cosine's last step, that is most of the cost, is hardly ever met."""
    model = wrap(Zero(), (1, 4, 4), betas=betas, variance=variance)
    exact = no_noise(betas, variance).sum().item() / math.log(2)
    away = errors_away(model, images(16), exact)
    assert (away.abs() > 1.96).sum() <= 7  # of 50, of which 2.5 are expected
    assert away.abs().max() < 5
    assert away.mean().abs() < 4 / math.sqrt(SEEDS)
