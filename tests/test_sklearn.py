"""The scikit-learn estimators, the common noise under their scores, and the memory."""

import importlib.util
import math
import pickle

import numpy as np
import pytest
import torch
from closed_forms import assert_mean
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from nelbo._numerics import seeded
from nelbo.build import build
from nelbo.common_noise import common_bound
from nelbo.config import ModelConfig
from nelbo.data import Schema
from nelbo.estimate import elbo, stratified
from nelbo.learner import Learner
from nelbo.model import measuring
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.memory import Memory, best_bandwidth
from nelbo.process import Affine
from nelbo.sklearn import DiffusionDensity, DiffusionOutlierDetector

QUICK = {"steps": 3, "width": 8, "depth": 1, "draws": 4}
SMALL = {"steps": 60, "width": 16, "depth": 1, "batch": 32, "draws": 8, "random_state": 0}
X = load_wine().data[:59, :3]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([DiffusionDensity(**QUICK), DiffusionOutlierDetector(**QUICK)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def density():
    return DiffusionDensity(**SMALL).fit(X)


@pytest.fixture(scope="module")
def detector():
    return DiffusionOutlierDetector(**SMALL).fit(X)


def real_model(gamma_min=-6.0, noise=0.0, affine=None):
    """A model of unit data in three dimensions; without noise its network gives zero."""
    config = ModelConfig(
        head="velocity",
        step="posterior",
        decoder="gaussian",
        network="mlp",
        width=8,
        depth=1,
        gamma_min=gamma_min,
    )
    with seeded(0):
        model = build(config, Schema("real", (3,), None), affine)
        for parameter in model.network.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    return model.double().eval()


# ---- common noise


def test_the_bound_of_a_gaussian_is_exact_for_every_row():
    """Zero velocity is the exact denoiser of N(0, I): what is left is the integral over times."""
    affine = Affine(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 3.0, 1.0]))
    model = real_model(gamma_min=-6.0, affine=affine)
    model.decoder.log_spread.data.fill_(0.5 * math.log(torch.sigmoid(torch.tensor(-6.0)).item()))
    with seeded(1):
        e = torch.randn(7, 3, dtype=torch.float64)
    x = affine.shift + affine.scale * e
    truth = torch.distributions.Normal(affine.shift, affine.scale).log_prob(x).sum(1)
    torch.testing.assert_close(common_bound(model, x, 400, 3).elbo, truth, rtol=0, atol=2e-3)


def test_the_mean_over_seeds_is_the_bound():
    """With any network: what the linear denoiser takes off has mean zero."""
    model = real_model(gamma_min=-4.0, noise=0.3)
    with seeded(1):
        x = 2 * torch.randn(2, 3, dtype=torch.float64)
    draws = torch.stack([common_bound(model, x, 8, seed).elbo for seed in range(100)])
    with seeded(2), measuring(model):
        many = x.repeat_interleave(2000, 0)
        truth = elbo(model, many, u=stratified(len(many), 4)).elbo.reshape(2, -1).mean(1)
    assert_mean(draws, truth, 0.2)


def test_a_row_is_scored_by_itself():
    model = real_model(noise=0.3)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    all_at_once = common_bound(model, x, 4, 0).elbo
    one_by_one = torch.cat([common_bound(model, row[None], 4, 0).elbo for row in x])
    torch.testing.assert_close(all_at_once, one_by_one, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        common_bound(model, x, 0, 0)


# ---- memory


def test_memory_is_the_exact_denoiser():
    """Against the mean of P(x) q(z_t|x) by quadrature, one dimension."""
    known, h = torch.tensor([[-1.0], [0.4], [0.5]], dtype=torch.float64), 0.3
    model = real_model()
    model.shape, model.network = (1,), Memory(known, h)
    model.network.dtype = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    prior = (-((x[:, None] - known[:, 0]) ** 2) / (2 * h * h)).exp().sum(1)
    for t in (0.1, 0.4, 0.8):
        time = torch.tensor([t, t], dtype=torch.float64)
        alpha = model.process.alpha(time[:1])
        z = torch.tensor([[0.2], [-1.5]], dtype=torch.float64)
        weight = prior * (-((z - alpha.sqrt() * x) ** 2) / (2 * (1 - alpha))).exp()
        truth = (weight * x).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        torch.testing.assert_close(model.predict(z, time).e_hat, truth, rtol=1e-6, atol=1e-6)


def test_the_average_of_two_denoisers_costs_at_most_the_average():
    """Row by row, since the draws are common and the square is convex."""
    model, x = real_model(noise=0.3), torch.randn(40, 3, dtype=torch.float64)
    memory, network = Memory(x[:20], 0.5), model.network
    memory.dtype = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    costs = []
    for used in (network, memory, Ensemble([network, memory])):
        model.network = used.eval()
        costs.append(-common_bound(model, x, 8, 0).elbo)
    assert (costs[2] < (costs[0] + costs[1]) / 2).all()


def test_the_bandwidth_of_a_normal_sample():
    """The least risk of one dimension is near (4/3n)^(1/5); repeated rows reach the floor."""
    x = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = (4 / 3000) ** 0.2
    assert 0.5 * rule < best_bandwidth(x, 0.01) < 2 * rule
    assert best_bandwidth(x[:5].repeat(4, 1), 0.01) == pytest.approx(0.01)


# ---- estimators


@pytest.mark.parametrize("estimator", [DiffusionDensity, DiffusionOutlierDetector])
def test_the_same_seed_gives_the_same_numbers(estimator):
    first, same, other = (
        estimator(**{**SMALL, "steps": 4, "random_state": seed}).fit(X).score_samples(X)
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same) and not np.allclose(first, other)


@pytest.mark.parametrize("name", ["density", "detector"])
def test_pickle_and_clone(name, request):
    fitted = request.getfixturevalue(name)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.score_samples(X), fitted.score_samples(X))
    assert clone(fitted).get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        clone(fitted).score_samples(X)


def test_density_learns_and_is_of_the_users_units(density):
    """Of two columns with correlation 0.98 it learns a part of the 1.6 nats they share;
    log|da/dx| when rescaled."""
    shared = np.random.default_rng(0).normal(size=(400, 1))
    x = np.sqrt(0.98) * shared + np.sqrt(0.02) * np.random.default_rng(1).normal(size=(400, 2))
    independent = -np.log(x.std(0) * math.sqrt(2 * math.pi * math.e)).sum()
    learned = DiffusionDensity(**{**SMALL, "steps": 200, "lr": 1e-2}).fit(x)
    assert independent + 0.2 < learned.score(x) < independent + 2
    assert density.score(X) == pytest.approx(density.score_samples(X).mean())
    scaled = DiffusionDensity(**SMALL).fit(100 * X)
    expected = density.score_samples(X) - 3 * math.log(100)
    np.testing.assert_allclose(scaled.score_samples(100 * X), expected, atol=1e-4)


def test_samples_are_rows_like_those_of_fit(density):
    rows = density.sample(300, random_state=1)
    assert rows.shape == (300, 3)
    assert np.array_equal(rows, density.sample(300, random_state=1))
    error = np.abs(rows.mean(0) - X.mean(0)) / X.std(0)
    assert (error < 0.4).all() and (np.abs(np.log(rows.std(0) / X.std(0))) < 0.5).all()


def test_repeated_values_and_constant_columns_have_a_finite_density():
    x = np.tile([[0.0, 5.0, 1.0], [1.0, 5.0, 1.0]], (20, 1))
    for memory in (0, 100):
        model = DiffusionDensity(memory=memory, **{**SMALL, "steps": 10}).fit(x)
        assert np.isfinite(model.score_samples(x)).all()


def test_no_density_exceeds_the_floor(monkeypatch):
    """Also where training would make the decoder narrower than the resolution."""
    fit = Learner.fit

    def narrow(learner, patience):
        model = fit(learner, patience)
        model.decoder.log_spread.data.fill_(-20.0)
        return model

    monkeypatch.setattr(Learner, "fit", narrow)
    x = np.tile([[0.0, 5.0, 1.0], [1.0, 5.0, 1.0]], (20, 1))
    model = DiffusionDensity(resolution=0.05, memory=40, **{**SMALL, "steps": 1}).fit(x)
    spread = model.model_.decoder.log_spread.item()
    assert spread == pytest.approx(math.log(0.05))
    most = -np.log(math.sqrt(2 * math.pi) * 0.05 * np.array([0.5, 1, 1])).sum()
    assert (model.score_samples(x) < most).all()


def test_pipelines_and_searches():
    pipeline = make_pipeline(StandardScaler(), DiffusionDensity(**QUICK)).fit(X)
    assert pipeline.score(X) == pytest.approx(pipeline.score_samples(X).mean())
    search = GridSearchCV(DiffusionDensity(**QUICK), {"resolution": [0.5, 0.05]}, cv=2).fit(X)
    assert search.best_score_ == max(search.cv_results_["mean_test_score"])
    assert np.isfinite(cross_val_score(DiffusionDensity(**QUICK), X, cv=2)).all()


def test_outliers_are_found(detector):
    far = X.mean(0) + np.array([[8.0, 0, 0], [0, -8.0, 8.0]]) * X.std(0)
    assert (detector.predict(far) == -1).all()
    assert (detector.predict(X) == 1).mean() > 0.7
    np.testing.assert_allclose(
        detector.decision_function(far), detector.score_samples(far) - detector.offset_
    )
    half = DiffusionOutlierDetector(contamination=0.5, **{**SMALL, "steps": 4})
    assert (half.fit_predict(X) == -1).sum() in (29, 30)


@pytest.mark.skipif(importlib.util.find_spec("polars") is None, reason="needs polars")
def test_frames_keep_their_column_names():
    import polars
    from sklearn import config_context

    frame = polars.DataFrame(X, schema=["alcohol", "acid", "ash"])
    model = DiffusionDensity(**{**SMALL, "steps": 4}).fit(frame)
    assert list(model.feature_names_in_) == frame.columns
    with config_context(transform_output="polars"):
        sample = model.sample(3)
    assert isinstance(sample, polars.DataFrame) and sample.columns == frame.columns
    with pytest.raises(ValueError, match="feature names"):
        model.score_samples(frame.select("acid", "alcohol", "ash"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 0.0}, "resolution must be in"),
        ({"validation": 1.0}, "validation must be a share"),
        ({"memory": -1}, "memory must be a number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"contamination": 0.9}, "contamination must be"),
        ({"contamination": "most"}, "contamination must be"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DiffusionOutlierDetector(**{**SMALL, **options}).fit(X)


def test_impossible_data_are_refused(density):
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        DiffusionDensity(**SMALL).fit(csr_array(X))
    with pytest.raises(ValueError, match="too large for its square"):
        DiffusionDensity(**SMALL).fit(X * 1e200)
    with pytest.raises(ValueError, match="minimum of 2"):
        DiffusionDensity(**SMALL).fit(X[:1])
    with pytest.raises(ValueError, match="NaN"):
        density.score_samples(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="3 features"):
        density.score_samples(X[:, :2])
