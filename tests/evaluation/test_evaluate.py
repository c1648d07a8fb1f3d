"""One number, its error and its price."""

import json
import math

import numpy as np
import pytest
import torch
from support import known_models
from torch import nn

from nelbo._utils.numerics import seeded
from nelbo.cli import display
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import GaussianDensity, LevelDecoder
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.model import Model, measuring, model_hash
from nelbo.diffusion.parametrization import LevelLogits, XPrediction
from nelbo.diffusion.reverse import Mixture, Posterior
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import ContinuousTime, TimeGrid, elbo
from nelbo.evaluation import time_estimator
from nelbo.evaluation.allocation import pilot
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.survey import FREEDOMS, plan
from nelbo.evaluation.time_estimator import CALLS, _divided


class Tilt(nn.Module):
    """Logits that lean with z, so that the terms depend on the example and the time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, z, level):
        return (z[..., None] + 0.05 * level[:, None, None]) * self.weight


class Shrink(nn.Module):
    """The ideal denoiser of unit normal data: ê = √α z."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, level):
        return self.one * torch.sigmoid(-level)[:, None].sqrt() * z


@pytest.fixture
def model():
    levels = Levels(4)
    process, head = GaussianDiffusion(Linear(-6.0, 5.0), levels), LevelLogits(levels.values)
    return Model(Tilt(), process, head, Mixture(levels.values), LevelDecoder(), (3,))


@pytest.fixture
def x():
    with seeded(1):
        return torch.randint(0, 4, (2 * FREEDOMS + 5, 3), dtype=torch.uint8)


@pytest.mark.parametrize("spent", [{"calls": 4}, {"target_error": 0.01}], ids=["calls", "target"])
def test_a_network_that_says_nothing_finite_is_measured_so(model, x, spent):
    """No number where there is none, nor an error; and it ends."""
    model.network.register_forward_hook(lambda network, inputs, output: math.nan * output)
    result = evaluate(model, x, **spent)
    error = result.standard_error
    assert all(map(math.isnan, (result.nats, error.total, error.data, error.monte_carlo)))


def test_variates_change_the_error_only(model, x):
    """Without what is known of the costs the estimate is of the same bound, and less exact."""
    whole, plain = (evaluate(model, x, calls=64, variates=used) for used in (True, False))
    errors = [r.standard_error.monte_carlo for r in (whole, plain)]
    assert abs(whole.bits_per_dim - plain.bits_per_dim) < 4 * math.hypot(*errors)
    assert 0 < errors[0] < errors[1]


def test_every_example_counts_once_and_alike(model, x):
    """The mean of a set of unequal blocks is the mean over its examples, not over its blocks."""
    result = evaluate(model, x, calls=64, variates=True)
    each = -result.per_example.elbo
    assert each.shape == (len(x),)
    assert result.examples == len(x)
    assert result.nats == pytest.approx(each.mean().item(), rel=1e-12)
    assert result.bits_per_dim == pytest.approx(result.nats / (3 * math.log(2)), rel=1e-12)
    with seeded(0):
        alone = -elbo(model, x[-1:].long().expand(20000, 3)).elbo
    error = math.hypot(alone.std().item() / math.sqrt(20000), 3 * result.standard_error.total)
    assert abs(alone.mean().item() - each[-1].item()) < 4 * max(error, 0.2)


@pytest.mark.parametrize(
    "times", [ContinuousTime(), TimeGrid.uniform(5)], ids=["continuum", "grid"]
)
def test_the_terms_add_up(model, x, times):
    result = evaluate(model, x, times=times, calls=240)
    total = result.terms.prior + result.terms.reconstruction + result.terms.diffusion
    assert total == pytest.approx(result.bits_per_dim, rel=1e-12)
    curve = sum(point.value for point in result.curve)
    assert curve == pytest.approx(result.terms.diffusion, rel=0.02)
    error = result.standard_error
    assert error.total == pytest.approx(math.hypot(error.data, error.monte_carlo), rel=1e-12)
    assert error.data > 0 and error.monte_carlo > 0


@pytest.mark.parametrize("calls", [None, 2, 3, 4, 9, 21, 64])
@pytest.mark.parametrize(
    "times",
    [ContinuousTime(), TimeGrid.uniform(8), TimeGrid.uniform(1000), TimeGrid.uniform(1)],
    ids=["continuum", "8", "1000", "1"],
)
def test_the_calls_are_those_of_the_network(model, x, times, calls):
    """Counted at the network, the pilot's included; never more than was asked for."""
    rows = []
    model.network.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    result = evaluate(model, x, times=times, calls=calls)
    assert result.calls_per_example == sum(rows) / len(x)
    assert (calls or CALLS) / 2 <= result.calls_per_example <= (calls or CALLS)


def test_a_pilot_leaves_the_rest_of_the_calls_to_the_draws(model, x):
    """Its calls are subtracted once."""
    many = x.repeat(30, 1)
    result = evaluate(model, many, calls=64, variates=True)
    assert 0.99 * 64 < result.calls_per_example <= 64


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("examples", [1, 5, 69])
def test_the_call_that_counts_operations_is_one_of_them(model, x, examples, scored, monkeypatch):
    """Where every control variate has to be beside the network, whose price a call tells."""
    monkeypatch.setattr(time_estimator, "BRIEF", 0.0)
    rows = []
    model.network.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    for calls in (2, 3, 4, 9, 24):
        rows.clear()
        found = evaluate(model, x[:examples], calls=calls, per_example=scored)
        assert found.calls_per_example == sum(rows) / examples <= calls
        assert calls < 9 or found.standard_error.monte_carlo > 0


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_the_calls_are_divided(scored, kept):
    """Between a pilot, if none is kept, and the draws, which get half of them or more."""
    for examples in (1, 5, 69, 447, 10_000):
        for calls in (2, 3, 4, 7, 24, 1000):
            for strata in (1, 9, 33):
                rows, left = _divided(examples, calls, strata, scored, kept)
                assert rows * strata + left * examples <= calls * examples * (1 + 1e-12)
                assert left >= max(2, calls / 2)
                assert not (kept and rows)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("examples", [64, 69, 447, 10_000])
def test_the_plan_spends_what_it_may(many, examples):
    """All are visited, and all or some of them twice, for an error bar; or most of a sample."""
    for draws in (0.3, 1, 1.5, 2, 3, 4, 5, 7, 12, 13, 24, 1000):
        if draws * examples < 64:
            continue
        p = plan(examples, draws, many)
        spent = sum(p.sizes[g] * n * p.draws_of(g) for g, n in p.counts.items())
        assert sum(p.sizes) == examples and 1 <= max(p.sizes) <= FREEDOMS
        assert p.sampled <= len(p.sizes)
        assert 0.7 * draws < spent / examples <= draws
        if p.replicates == 1:
            assert p.repeated and (draws < 2 or not many)
        else:
            assert p.sampled == len(p.sizes) and p.replicates >= min(draws, 8 if many else 2)
            assert draws * examples - spent < p.draws * max(p.sizes)


@pytest.mark.parametrize("examples", [16, 24, 32, 48, 128])
def test_blocks_without_a_pilot_are_of_one_size(examples):
    """Else more draws of some replicates than of others fall into a heavy term."""
    for draws in (8, 12, 24):
        p = plan(examples, draws, True, level=True)
        assert len(set(p.sizes)) == 1 and p.sizes[0] <= FREEDOMS


def test_four_calls_leave_no_example_out(model, x):
    """The examples that show the noise share their draws between two replicates; where further
    rounds may follow, all replicates have as many."""
    for draws in (2, 3):
        halves, wholes = (plan(400, draws, False, rounds=rounds) for rounds in (False, True))
        assert halves.sampled == len(halves.sizes) and halves.again == 1
        assert halves.counts[0] == draws and wholes.sampled < len(wholes.sizes)
        assert wholes.again == draws
    result = evaluate(model, x.repeat(6, 1), calls=4)
    assert result.visited == 6 * len(x) and result.calls_per_example <= 4
    error = result.to_arrays()["standard_error"]
    assert np.isfinite(error).all() and error.max() < 2 * error.min()


@pytest.mark.slow
def test_two_calls_of_each_are_one_draw_of_most(model, x):
    """The two calls of a draw are context to each other; the second visits, for an error bar, are
    paid for by examples left out."""
    many = x.repeat(10, 1)

    def kept(strata, controls):
        with measuring(model), seeded(8):
            return pilot(strata, controls, Batch(many), 64)

    result = evaluate(model, many, calls=2, pilots=kept)
    assert 0.9 * len(many) < result.visited < len(many)
    assert 1.9 < result.calls_per_example <= 2
    whole = evaluate(model, many, calls=64)
    assert abs(result.nats - whole.nats) < 4 * result.standard_error.monte_carlo * 3 * math.log(2)
    assert 0.9 * len(many) < evaluate(model, many, calls=2, variates=True).visited < len(many)
    each = evaluate(model, many, calls=2, pilots=kept, per_example=True)
    assert each.visited == len(many)


@pytest.mark.slow
def test_fewer_calls_than_examples_visit_a_sample(model, x):
    """At random, nearly all of it once, by two calls that are context to each other, and some
    twice; the error knows of those left out."""
    many = x.repeat(3, 1)
    result = evaluate(model, many, calls=1, variates=True)
    found = result.per_example.elbo.isfinite()
    assert found.sum() == result.visited and 0.4 * len(many) < result.visited < len(many) / 2
    assert 0.9 < result.calls_per_example <= 1
    assert result.calls_per_example > 2 * result.visited / len(many)
    assert not torch.equal(
        found, evaluate(model, many, calls=1, seed=1, variates=True).per_example.elbo.isfinite()
    )
    whole = evaluate(model, many, calls=64)
    assert abs(result.nats - whole.nats) < 4 * result.standard_error.monte_carlo * 3 * math.log(2)
    assert result.to_arrays()["nats"].shape == (len(many),)


def test_too_few_calls_for_an_error_bar():
    for calls in (math.nan, math.inf, 0, -1):
        with pytest.raises(ValueError, match=r"calls must be at least 0\.01 per"):
            _divided(12_800, calls, 33, False, False)
    with pytest.raises(ValueError, match=r"at least 0\.29 per.*got 0\.28;"):  # 0.2844
        _divided(450, 0.28, 33, False, False)
    with pytest.raises(ValueError, match=r"calls must be at least 2.*got 1"):
        _divided(10, 1, 33, False, False)


@pytest.mark.slow
def test_the_data_error_is_that_of_other_data(model):
    """Over 40 data sets: the total error is their spread."""
    results = []
    for seed in range(40):
        with seeded(7, seed):
            x = torch.distributions.Binomial(3, torch.tensor(0.3)).sample((70, 3)).long()
        # with half of the calls one block may have most of the noise, of one degree of freedom
        results.append(evaluate(model, x, seed=seed, calls=32))
    values = torch.tensor([r.bits_per_dim for r in results], dtype=torch.float64)
    stated = torch.tensor([r.standard_error.total for r in results], dtype=torch.float64)
    assert 0.65 < values.std() / stated.square().mean().sqrt() < 1.45


def test_seeds_and_settings_are_the_callers(model, x):
    model.train()
    model.dtype = torch.float32
    state = torch.get_rng_state()
    first, again, other = (evaluate(model, x, seed=s, variates=True) for s in (3, 3, 4))
    assert first == again and first.nats != other.nats
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.dtype == torch.float32


def test_a_density_is_in_nats_of_the_data_s_units(drawn_by_places):
    """The bound of unit normal data is the entropy; in other units log|scale| is added."""
    with seeded(2):
        x = torch.randn(3000, 2, dtype=torch.float64)
    bounds = []
    # a power of two: the same e to the last bit, so the same draws of the last two
    for scale, some, calls in ((1.0, x, 600), (1.0, x[:200], 24), (8.0, x[:200], 24)):
        affine = Affine(torch.zeros(2), torch.full((2,), scale))
        decoder = GaussianDensity(affine, math.exp(-5))
        process = GaussianDiffusion(Linear(-10.0, 8.0), affine)
        model = Model(Shrink(), process, XPrediction(), Posterior(), decoder, (2,))
        result = evaluate(model, scale * some, calls=calls)
        assert result.bits_per_dim is None and result.unit == "nats"
        bounds.append(result)
    entropy = math.log(2 * math.pi) + x.square().sum(1).mean().item() / 2
    assert bounds[0].standard_error.monte_carlo < 0.015
    assert bounds[0].nats == pytest.approx(entropy, abs=4 * 0.015)
    assert bounds[2].nats - bounds[1].nats == pytest.approx(2 * math.log(8), abs=1e-6)


def test_json_keys(model, x):
    result = evaluate(model, x[:1], seed=5).to_dict()
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text)["standard_error"]["data"] is None  # one example has no spread
    keys = "bits_per_dim nats standard_error terms examples dims calls_per_example steps seed"
    for key in [*keys.split(), "weights", "split", "model_hash", "data_hash"]:
        assert key in result
    assert set(result["terms"]) == {"prior", "reconstruction", "diffusion"}
    assert set(result["standard_error"]) == {"total", "data", "monte_carlo"}
    assert result["steps"] is None


def test_hashes_follow_what_they_stand_for(model, x):
    before = model_hash(model)
    assert before == model_hash(model)
    with torch.no_grad():
        model.network.weight[0] += 1e-6
    assert model_hash(model) != before
    model.network.weight.data[0] -= 1e-6
    model.step = Posterior()
    assert model_hash(model) != before
    assert evaluate(model, x).data_hash == evaluate(model, x.long()).data_hash


def test_no_examples(model, x):
    with pytest.raises(ValueError, match="at least one example"):
        evaluate(model, x[:0])


def test_another_shape(model):
    with pytest.raises(ValueError, match=r"shape \(5,\) where \(3,\) is needed"):
        evaluate(model, torch.zeros(4, 5, dtype=torch.int64))


def test_two_draws_state_no_error(model, x, capsys):
    """Two calls of one example say nothing of what they missed: no error is stated, in words."""
    result = evaluate(model, x[:1], calls=2)
    assert math.isnan(result.standard_error.monte_carlo) and math.isfinite(result.nats)
    assert result.to_dict()["standard_error"]["monte_carlo"] is None
    assert result.per_example_error.isnan().all()
    display.result(result)
    assert "too similar" in capsys.readouterr().out
    display.result(evaluate(model, x, calls=8))
    assert "similar" not in capsys.readouterr().out


def test_a_sample_of_what_has_no_noise_has_the_error_of_the_sample():
    """Of one step of masks, in which nothing shows, from half a call per example."""
    known, times = known_models.symbols(), TimeGrid.uniform(1)
    x = known.examples(1000)
    truth = known.bound(x, times).sum(1).mean()
    found = [evaluate(known.model, x, times=times, calls=0.5, seed=seed) for seed in range(5)]
    for each in found:
        error = each.standard_error.monte_carlo * known.model.dims * math.log(2)
        assert 200 < each.visited < 250 and 0 < error < 0.1
        assert abs(each.nats - truth) < 4 * error


def test_a_single_example_of_symbols_is_drawn_in_pairs():
    """Four pairs of calls have less noise than eight calls, as each of two examples takes for an
    error of its own; rare early changes cost much."""
    known = known_models.replaced()
    x = known.examples(2)[1:]
    wanted = known.bound(x, ContinuousTime()).sum()
    one, both = (
        torch.stack(
            [
                evaluate(known.model, x, calls=8, per_example=True, seed=seed).per_example.elbo
                for seed in range(seeds)
            ]
        )
        for x, seeds in ((x, 100), (x.repeat(2, 1), 50))
    )
    pairs, alone = ((each + wanted).square().mean().sqrt() for each in (one, both))
    assert pairs < 0.9 * alone
