"""The scikit-learn estimators, the bounds of rows under their scores, and the memory."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import norm
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.data import Schema
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.model import measuring
from nelbo.diffusion.times import elbo, stratified
from nelbo.evaluation.row_bounds import row_bounds
from nelbo.models.build import build
from nelbo.models.config import ModelConfig
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.memory import Memory, best_bandwidth
from nelbo.nn.mixture import Corrected, MixtureDenoiser
from nelbo.sklearn import DiffusionDensity, DiffusionOutlierDetector
from nelbo.testing import assert_mean
from nelbo.training.trainer import Trainer

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


# ---- bounds of rows


STANDARD = MixtureDenoiser.standard(3)


def two_normals():
    """0.3 N(a, A) + 0.7 N(b, B) in three dimensions, as a denoiser and as what torch knows."""
    with seeded(5):
        weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
        mean = torch.randn(2, 3, dtype=torch.float64)
        factor = 0.5 * torch.randn(2, 3, 3, dtype=torch.float64)
    covariance = factor @ factor.mT + 0.05 * torch.eye(3)
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weight),
        torch.distributions.MultivariateNormal(mean, covariance),
    )
    return MixtureDenoiser(weight, mean, *torch.linalg.eigh(covariance)), law


def test_the_mixtures_density_and_score_are_those_of_its_latents():
    """Tweedie: v = (√α z - E[e|z])/√(1-α), and E[e|z] = (z + (1-α) ∇ log p(z))/√α."""
    known, law = two_normals()
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    gamma = torch.linspace(-6, 4, 7, dtype=torch.float64)
    alpha, noise = torch.sigmoid(-gamma)[:, None], torch.sigmoid(gamma)[:, None]
    v, log_p = known.describe(z, gamma)
    (score,) = torch.autograd.grad(log_p.sum(), z)
    e_hat = alpha.sqrt() * z - noise.sqrt() * v
    torch.testing.assert_close(e_hat, (z + noise * score) / alpha.sqrt())
    clean = known.describe(z, torch.full_like(gamma, -60.0))[1]
    torch.testing.assert_close(clean, law.log_prob(z))
    standard = MixtureDenoiser.standard(3).describe(z, gamma)
    torch.testing.assert_close(standard[0], torch.zeros_like(z), rtol=0, atol=1e-15)


@pytest.mark.parametrize("reference", ["standard", "mixture"])
def test_the_bound_of_a_gaussian_is_exact_for_every_row(reference):
    """Zero velocity is the exact denoiser of N(0, I): what is left is the error that is stated."""
    affine = Affine(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 3.0, 1.0]))
    model = real_model(gamma_min=-9.0, affine=affine)
    model.decoder.log_spread.data.fill_(0.5 * math.log(torch.sigmoid(torch.tensor(-9.0)).item()))
    with seeded(1):
        e = torch.randn(7, 3, dtype=torch.float64)
    x = affine.shift + affine.scale * e
    truth = torch.distributions.Normal(affine.shift, affine.scale).log_prob(x).sum(1)
    known = STANDARD if reference == "standard" else two_normals()[0]
    found = row_bounds(model, x, 200, 3, known)
    assert ((found.elbo - truth).abs() < 4 * found.error + 1e-3).all()
    assert found.error.max() < (0.05 if reference == "standard" else 0.5)


def test_the_bound_of_a_mixture_is_its_density():
    """A network that is the mixture: the difference that is drawn is zero."""
    known, law = two_normals()
    model = real_model(gamma_min=-11.0)
    model.network = Corrected(known, model.network)
    model.decoder.log_spread.data.fill_(-5.5)
    x = law.sample((9,))
    found = row_bounds(model, x, 16, 3, known)
    torch.testing.assert_close(found.elbo, law.log_prob(x), rtol=0, atol=0.02)


def test_the_mean_over_seeds_is_the_bound_and_their_spread_the_error():
    """With any network and any reference."""
    model, known = real_model(gamma_min=-4.0, noise=0.3), two_normals()[0]
    with seeded(1):
        x = 2 * torch.randn(2, 3, dtype=torch.float64)
    each = [row_bounds(model, x, 8, seed, known) for seed in range(200)]
    draws = torch.stack([found.elbo for found in each])
    with seeded(2), measuring(model):
        many = x.repeat_interleave(2000, 0)
        truth = elbo(model, many, u=stratified(len(many), 4)).elbo.reshape(2, -1).mean(1)
    assert_mean(draws, truth, 0.2)
    stated = torch.stack([found.error for found in each]).square().mean(0).sqrt()
    ratio = stated / draws.std(0)
    assert ((ratio > 0.8) & (ratio < 1.25)).all()


def test_a_row_is_scored_by_itself_with_draws_of_its_own():
    """Neither order nor company change a score; rows that differ have errors that are independent:
    over seeds they are not correlated, as those of common draws are by nearly 1."""
    model = real_model(noise=0.3)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    all_at_once = row_bounds(model, x, 4, 0, STANDARD).elbo
    one_by_one = torch.cat([row_bounds(model, row[None], 4, 0, STANDARD).elbo for row in x])
    torch.testing.assert_close(all_at_once, one_by_one, rtol=1e-12, atol=0)
    turned = row_bounds(model, x.flip(0), 4, 0, STANDARD).elbo.flip(0)
    torch.testing.assert_close(all_at_once, turned, rtol=1e-12, atol=0)
    near = torch.stack([x[0], x[0] + 1e-9])
    draws = torch.stack([row_bounds(model, near, 4, seed, STANDARD).elbo for seed in range(100)])
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.4
    with pytest.raises(ValueError, match="draws must be at least 2"):
        row_bounds(model, x, 1, 0, STANDARD)


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
        costs.append(-row_bounds(model, x, 8, 0, STANDARD).elbo)
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
    """It learns a part of the 1.6 nats that two columns with correlation 0.98 share; rescaled
    columns change its score by log|da/dx|."""
    shared = np.random.default_rng(0).normal(size=(400, 1))
    x = np.sqrt(0.98) * shared + np.sqrt(0.02) * np.random.default_rng(1).normal(size=(400, 2))
    independent = -np.log(x.std(0) * math.sqrt(2 * math.pi * math.e)).sum()
    learned = DiffusionDensity(**{**SMALL, "steps": 200, "lr": 1e-2}).fit(x)
    assert independent + 0.2 < learned.score(x) < independent + 2
    assert density.score(X) == pytest.approx(density.score_samples(X).mean())
    scaled = DiffusionDensity(**SMALL).fit(128 * X)  # a factor that rounds nothing
    expected = density.score_samples(X) - 3 * math.log(128)
    np.testing.assert_allclose(scaled.score_samples(128 * X), expected, atol=1e-4)


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
    fit = Trainer.fit

    def narrow(learner, *others):
        model = fit(learner, *others)
        model.decoder.log_spread.data.fill_(-20.0)
        return model

    monkeypatch.setattr(Trainer, "fit", narrow)
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


def people(rows):
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    tall = rng.random(rows) < 0.5
    frame = pd.DataFrame(
        {
            "sex": np.where(tall, "m", "f"),
            "height": np.where(tall, 182, 168) + rng.integers(-5, 6, rows),
            "weight": rng.normal(70, 5, rows).round(1),
        }
    )
    frame.loc[::5, "weight"] = np.nan
    return frame


@pytest.fixture(scope="module")
def mixed():
    return DiffusionOutlierDetector(**{**SMALL, "steps": 150, "lr": 0.02}).fit(people(200))


def test_a_mixed_frame_is_a_table_of_the_core(mixed):
    """Its scores are the bounds that nelbo.elbo gives, and odd rows have low ones."""
    frame = people(200)
    few, names = frame[:6], ["sex", "height", "weight"]
    assert mixed.n_features_in_ == 3 and list(mixed.feature_names_in_) == names
    scores, error = mixed.score_samples(few, return_std=True)
    known = nelbo.elbo(mixed.model_, mixed._rows(few), calls=960, seed=1)
    np.testing.assert_array_less(np.abs(scores - known.elbo.numpy()), 4 * error)
    odd = few.assign(height=[110] * 6)
    with pytest.warns(UserWarning, match="6 cells of height, such as 110, lie outside"):
        assert (mixed.score_samples(odd) < scores - 1).all()
    assert 0.7 < (mixed.predict(frame) == 1).mean() < 1
    with pytest.raises(ValueError, match="the model is one of tables"):
        mixed.score_samples(X)
    with pytest.raises(ValueError, match="'weight'"):
        mixed.score_samples(few.drop(columns="weight"))
    again = pickle.loads(pickle.dumps(mixed))
    np.testing.assert_array_equal(again.score_samples(few), scores)


def test_the_score_of_a_mixed_row_follows_from_the_row(mixed):
    """Whatever its place and its company; equal rows have equal scores."""
    frame = people(200)
    scores = mixed.score_samples(frame)
    turned = mixed.score_samples(frame[::-1].reset_index(drop=True))[::-1]
    np.testing.assert_allclose(scores, turned, rtol=1e-5)
    alone = np.concatenate([mixed.score_samples(frame[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(scores[:5], alone, rtol=1e-5)
    twice = mixed.score_samples(frame.iloc[[3, 8, 3]])
    assert twice[0] == twice[2] != twice[1]


def test_contamination_is_the_share_of_the_rows_of_fit_that_is_flagged():
    frame = people(60)
    options = {**SMALL, "steps": 4, "contamination": 0.2}
    for rows in (frame, frame[["height"]].to_numpy(), X[:50]):
        found = DiffusionOutlierDetector(**options).fit_predict(rows)
        assert (found == -1).sum() == len(rows) / 5


def test_options_of_rows_of_numbers_are_refused_for_a_mixed_frame(monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda learner: pytest.fail("a step was made"))
    for options in ({"memory": 7}, {"resolution": 0.3}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}=.* is for rows of numbers alone"):
            DiffusionOutlierDetector(**SMALL, **options).fit(people(30))


def test_samples_of_pandas_have_the_types_of_fit():
    """Also an order of categories, one that no row has, whole numbers and truths with gaps."""
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    size = pd.Categorical(rng.choice(["low", "high"], 80), ["low", "middle", "high"], ordered=True)
    frame = pd.DataFrame(
        {
            "size": size,
            "grade": pd.Categorical(rng.integers(1, 4, 80)),
            "rooms": pd.array([None if i % 4 == 0 else i % 7 for i in range(80)], "Int64"),
            "floor": rng.integers(0, 9, 80).astype(np.int16),
            "new": pd.array([None if i % 5 == 0 else i % 2 == 0 for i in range(80)], "boolean"),
            3: rng.normal(size=80).round(2).astype(np.float32),
        }
    )
    sample = DiffusionDensity(**{**SMALL, "steps": 4}).fit(frame).sample(40, 0, steps=4)
    pd.testing.assert_series_equal(sample.dtypes, frame.dtypes)
    assert sample["rooms"].isna().any() and sample["new"].isna().any()


def test_truth_values_are_no_real_numbers():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    a = rng.random(200) < 0.9
    frame = pd.DataFrame({"a": a, "b": a ^ (rng.random(200) < 0.1)})
    model = DiffusionDensity(**{**SMALL, "steps": 60}).fit(frame)
    every = pd.DataFrame({"a": [True, True, False, False], "b": [True, False, True, False]})
    assert (model.score_samples(every) < 0).all()  # probabilities
    assert model.sample(5).dtypes.tolist() == [bool, bool]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_samples_of_a_mixed_frame_are_a_frame(library):
    import polars

    frame = people(60) if library == "pandas" else polars.from_pandas(people(60))
    model = DiffusionDensity(**{**SMALL, "steps": 4}).fit(frame)
    sample = model.sample(9, random_state=1, steps=4)
    assert type(sample) is type(frame) and list(sample.columns) == list(frame.columns)
    assert set(sample["sex"]) <= {"m", "f"} and sample["height"].min() >= 163
    assert np.isfinite(model.validation_score_) and model.validation_score_std_ > 0


def test_the_device_and_the_bar(capsys, monkeypatch):
    options = {**SMALL, "steps": 4}
    with pytest.raises(ValueError, match="no device 'nowhere'"):
        DiffusionDensity(**options, device="nowhere").fit(X)
    seen = []
    monkeypatch.setattr(
        nelbo.sklearn.base, "Trainer", lambda *a, **k: seen.append(a[3]) or Trainer(*a, **k)
    )
    DiffusionDensity(**options, device="auto").fit(X)
    assert seen == ["cuda:0" if torch.cuda.is_available() else "cpu"]
    assert capsys.readouterr().err == ""
    DiffusionDensity(**options, verbose=True).fit(X)
    assert "4/4" in (shown := capsys.readouterr().err) and "nats" in shown


@pytest.mark.parametrize("name", ["density", "detector"])
def test_what_overflows_is_the_most_anomalous(name, request):
    """At 1e160 standard deviations squares have no float64; at 1e20 those of float32 have none."""
    fitted, middle = request.getfixturevalue(name), X.mean(0)
    far = np.array(
        [middle, *(middle + np.array([0, v, 0]) for v in (1e20, -1e100, 1e160, -1.7e308))]
    )
    scores, error = fitted.score_samples(far, return_std=True)
    assert not np.isnan(scores).any() and not np.isnan(error).any()
    assert (scores[1:] < -1e10).all() and (scores[2:] <= scores[1:-1]).all()
    if name == "detector":
        assert fitted.predict(far).tolist() == [1, -1, -1, -1, -1]


def law_of_two(rows, seed):
    """N(-2, 0.3²) and N(1, 1), 3 to 7: rows (N, 1) and their mean log-density."""
    random = np.random.default_rng(seed)
    x = np.where(
        random.random(rows) < 0.3, random.normal(-2, 0.3, rows), random.normal(1, 1, rows)
    )
    density = 0.3 * norm.pdf(x, -2, 0.3) + 0.7 * norm.pdf(x, 1, 1)
    return x[:, None], np.log(density).mean()


@pytest.mark.slow
def test_a_mixture_is_told_as_well_as_it_can_be():
    (x, _), (new, truth) = law_of_two(2000, 0), law_of_two(2000, 1)
    model = DiffusionDensity(random_state=0).fit(x)
    assert model.score(new) == pytest.approx(truth, abs=0.02)
    assert model.best_iter_ <= model.n_iter_ < 1000
    assert abs(model.validation_score_ - truth) < 0.3 and model.validation_score_std_ < 0.01


def test_few_values_reach_the_floor():
    """Three values: each has its share of the greatest density at this resolution."""
    values, share = np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.3, 0.2])
    x = np.random.default_rng(0).choice(values, 600, p=share)[:, None]
    attainable = (share * np.log(share)).sum() - math.log(math.sqrt(2 * math.pi) * 0.01 * x.std())
    score = DiffusionDensity(resolution=0.01, **SMALL).fit(x).score(x)
    assert attainable - 0.1 < score < attainable + 0.1


def test_numbers_of_numpy_are_parameters():
    grid = {"width": np.arange(8, 24, 8), "resolution": np.array([0.1], np.float32)}
    search = GridSearchCV(DiffusionDensity(**QUICK), grid, cv=2).fit(X)
    assert np.isfinite(search.best_score_)
    options = {"memory": np.int16(9), "draws": np.uint8(4), "contamination": np.float32(0.1)}
    detector = DiffusionOutlierDetector(**{**QUICK, **options}).fit(X)
    assert detector.offset_ < np.median(detector.score_samples(X))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": 100.0}, "memory must be an integer"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"draws": "many"}, "draws must be an integer"),
        ({"width": 16.0}, "width must be an integer"),
        ({"resolution": None}, "resolution must be a number"),
        ({"contamination": None}, "contamination must be"),
        ({"random_state": "one"}, "seed"),
        ({"resolution": 0.0}, "resolution must be positive"),
        ({"validation": 1.0}, "validation must be less than 1"),
        ({"memory": -1}, "memory must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"contamination": 0.9}, "contamination must be"),
        ({"contamination": "most"}, "contamination must be"),
    ],
)
def test_impossible_options_are_refused_before_training(options, says, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda learner: pytest.fail("a step was made"))
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
