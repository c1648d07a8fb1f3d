"""The best grid of few steps, its table, and the Gaussian step with the best variance."""

import itertools
import math

import pytest
import torch
from support.closed_forms import Formula
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import Categorical, GaussianDensity, LevelDecoder
from nelbo.diffusion.elbo import diffusion_term, reconstruction_term
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits, SymbolLogits, XPrediction
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.reverse import Beta, Mixture, Optimal, Posterior
from nelbo.diffusion.schedules import Betas, Linear, PowerAlpha, even_times
from nelbo.diffusion.times import TimeGrid, times_of
from nelbo.evaluation import grid_search
from nelbo.evaluation.grid_search import Table, best_grid, measure, measure_errors

LEVELS, SHAPE = 3, (2, 3)
VALUES = Levels(LEVELS).values
STEPS = {
    "mixture": Mixture(VALUES),
    "posterior": Posterior(),
    "beta": Beta(),
    "optimal": Optimal(torch.linspace(0.02, 0.5, 5)),
}


@pytest.fixture(autouse=True)
def _seed():
    with seeded(21):
        yield


@pytest.fixture(autouse=True)
def _many_examples(monkeypatch):
    """As many as users have, where other tests measure on few."""
    monkeypatch.setattr(grid_search, "EXAMPLES", 192)


def level_model(step=None, schedule=None):
    """Levels of which the network says something, and not the truth."""

    def network(z, level):
        k = torch.arange(LEVELS, dtype=torch.float64)
        return 0.3 * z[..., None].roll(1, 1) * k - 0.1 * k**2

    process = GaussianDiffusion(schedule or Linear(-5.0, 4.0), Levels(LEVELS))
    step = step or STEPS["mixture"]
    return Model(Formula(network), process, LevelLogits(VALUES), step, LevelDecoder(), SHAPE)


def symbol_model():
    def network(z, level):
        shown = z.unflatten(1, (SHAPE[0], LEVELS + 1)).movedim(2, -1)
        return 0.5 * shown.roll(1, 1)[..., :-1]

    process, head = MaskedDiffusion(PowerAlpha(2.0), LEVELS), SymbolLogits(LEVELS)
    return Model(Formula(network), process, head, Posterior(), Categorical(), SHAPE)


MODELS = {name: lambda step=step: level_model(step) for name, step in STEPS.items()}
MODELS["absorbing"] = symbol_model


def examples(n):
    return torch.randint(LEVELS, (n, *SHAPE))


def test_a_number_of_steps_is_even_in_time():
    """Also where α is not: a masked model is trained with its schedule."""
    for model in (level_model(), symbol_model()):
        assert times_of(model, None, 4).times.tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_the_shortest_path_is_the_best_of_all_grids(steps):
    """Dynamic programming against enumeration, on a table of 7 times with gaps."""
    times = torch.linspace(0, 1, 8, dtype=torch.float64)[1:]
    step = torch.rand(7, 7, dtype=torch.float64).triu(1)
    step[torch.ones(7, 7).tril() == 1] = math.inf
    step[0, 6] = math.inf
    table = Table(times, torch.rand(7, dtype=torch.float64), step)
    every = [
        torch.cat([times[list(c)], times[-1:]])
        for c in itertools.combinations(range(6), steps - 1)
    ]
    best = min(every, key=table.bound)
    assert torch.equal(table.best(steps), best)
    assert table.bound(best) < math.inf


@pytest.mark.parametrize("name", MODELS)
def test_the_best_grid_is_no_worse_than_the_uniform_one(name):
    """In the measure of the table; and on these models it is better, by more than a thousandth."""
    model = MODELS[name]()
    times = even_times(model.process.schedule, 4, 12)
    table = measure(model, examples(200), times, longest=12)
    best, uniform = table.best(4), TimeGrid.uniform(4).times
    assert table.bound(best) < table.bound(uniform) - 1e-3
    assert len(best) == 4 and best[-1] == 1


@pytest.mark.parametrize("dims", [6, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_terms_of_the_bound(name, dims, monkeypatch):
    """D(s, t) and R(t) are the means of `diffusion_term` and `reconstruction_term`, measured on
    all dimensions or on a part of them."""
    n, model = 4000, MODELS[name]()
    x = examples(n)
    times = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    monkeypatch.setattr(grid_search, "NUMBERS", n * 4 * 4 * LEVELS * dims)
    table = measure(model, x, times, longest=4)
    with torch.no_grad():
        for i, j in ((0, 1), (0, 3), (2, 3)):
            s, t = (times[k].expand(n) for k in (i, j))
            # the table is as uncertain as the draws, and draws of some dimensions more so
            each = diffusion_term(model, x, s, t).cost
            error = each.std().item() / math.sqrt(n) * math.sqrt(1 + 6 / dims)
            assert error < 0.1 * each.mean()
            # and float32 is there
            assert abs(table.step[i, j] - each.mean()) < 4 * error + 1e-5
        each = reconstruction_term(model, x, times[1].expand(n)).cost
        error = each.std().item() * math.sqrt(2 / n)
        assert abs(table.decode[1] - each.mean()) < 4 * error


def test_one_call_of_the_network_for_each_time_and_example():
    model, rows = level_model(), []
    model.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    best_grid(model, examples(50), 3)
    assert sum(rows) == 50 * (16 + 2 * 3)


def test_long_steps_are_left_out():
    times = even_times(Linear(-5.0, 4.0), 4, 8)
    step = measure(level_model(), examples(5), times, longest=2).step
    near = torch.ones(8, 8).triu(1).tril(2).bool()
    assert step[near].isfinite().all() and (step[~near] == math.inf).all()


def test_the_same_grid_whoever_asks():
    model, x = level_model(Posterior()), examples(300)
    first = best_grid(model, x, 3).times
    torch.rand(3)
    assert torch.equal(best_grid(model, x, 3).times, first)
    assert (first.diff() > 0).all() and first[-1] == 1 and len(first) == 3


def test_a_schedule_of_betas_is_asked_at_its_own_times():
    schedule = Betas(torch.linspace(0.02, 0.5, 20))
    model = level_model(schedule=schedule)
    for steps in (1, 4, 19, 20):
        places = best_grid(model, examples(3), steps).times * 20
        torch.testing.assert_close(places, places.round(), rtol=0, atol=1e-12)
        assert len(places) == steps
    with pytest.raises(ValueError, match=r"steps must be at most 20, .*; got 21"):
        best_grid(model, examples(20), 21)


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=rf"steps must be at least 1; got {steps}"):
        best_grid(level_model(), examples(5), steps)


def test_more_steps_than_candidates():
    with pytest.raises(ValueError, match=r"steps must be 1 to 3, .*; got 4"):
        times = torch.tensor([0.3, 0.6, 1.0])
        best_grid(level_model(), examples(5), 4, candidates=times)


# ---- the best variance


def normal_model(step):
    """x ~ N(0, 1) in each dimension, and its ideal denoiser ê = √α z."""

    def network(z, level):
        return torch.sigmoid(-level).sqrt()[:, None] * z

    process = GaussianDiffusion(Linear(-5.0, 4.0), Affine())
    return Model(Formula(network), process, XPrediction(), step, GaussianDensity(Affine()), (5,))


def test_the_measured_error_of_a_gaussian(monkeypatch):
    """For x ~ N(0, 1) and its ideal denoiser, v(t) = Var(x|z_t) = 1 - α_t."""
    monkeypatch.setattr(grid_search, "EXAMPLES", 40_000)
    monkeypatch.setattr(grid_search, "_some", lambda model, x, seed: torch.arange(len(x)))
    step = Optimal(torch.zeros(4, dtype=torch.float64))
    x = torch.randn(40_000, 5, dtype=torch.float64)
    measure_errors(normal_model(step), x)
    truth = torch.sigmoid(-5 + 9 * torch.linspace(0, 1, 4, dtype=torch.float64))
    # the square of a normal has a relative standard deviation of √2
    assert ((step.errors / truth - 1).abs() < 4 * math.sqrt(2 / 200_000)).all()


def test_the_best_variance_of_a_gaussian_is_beta():
    """z_t of unit data is stationary, its reverse is its forward kernel: σ² = β exactly."""
    places = torch.linspace(0, 1, 5, dtype=torch.float64)
    step = Optimal(torch.sigmoid(-5 + 9 * places))
    process = normal_model(step).process
    z, t = torch.randn(2, 5, dtype=torch.float64), places[[2, 4]]
    s = t - torch.tensor([0.3, 0.9])
    got, beta = (p(Prediction(z), z, s, t, process).base_dist for p in (step, Beta()))
    torch.testing.assert_close(got.scale, beta.scale, rtol=1e-12, atol=0)
    assert torch.equal(got.loc, beta.loc)


def test_the_best_variance_is_the_least_kl():
    """With v the mean squared error of these very predictions, every other v costs more."""
    process = GaussianDiffusion(Linear(-5.0, 4.0), Affine())
    z, e, e_hat = torch.randn(3, 40, 7, dtype=torch.float64)
    s, t = (torch.full((40,), v, dtype=torch.float64) for v in (0.4, 0.7))
    q, v = process.posterior(z, e, s, t), (e - e_hat).square().mean()

    def cost(v):
        return kl_divergence(q, Optimal(v.expand(2))(Prediction(e_hat), z, s, t, process)).mean()

    assert cost(v) < min(cost(0.98 * v), cost(1.02 * v), cost(0 * v))


def test_the_error_is_a_line_between_its_points():
    step = Optimal(torch.tensor([1.0, 3.0, 2.0]))
    t = torch.tensor([0.0, 0.125, 0.5, 0.75, 1.0], dtype=torch.float64)
    torch.testing.assert_close(step.error(t), torch.tensor([1.0, 1.5, 3.0, 2.5, 2.0]).double())


def test_the_best_grid_in_earnest():
    """By fresh draws: the best grid of 4 times has a lower bound than the uniform one."""
    model, x = level_model(Posterior()), examples(20_000)
    best, uniform = best_grid(model, x, 4).times, TimeGrid.uniform(4).times

    def cost(times):
        with torch.no_grad():
            total = reconstruction_term(model, x, times[0].expand(len(x))).cost
            for s, t in itertools.pairwise(times):
                total += diffusion_term(model, x, s.expand(len(x)), t.expand(len(x))).cost
        return total

    difference = cost(uniform) - cost(best)
    assert difference.mean() > 4 * difference.std() / math.sqrt(len(x)) > 0
