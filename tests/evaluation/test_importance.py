"""K paths: unbiased for P(x), a bound that rises with K, and the price of it."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusion.test_categorical import arbitrary, table_model
from diffusion.test_derivation import BETAS, EYE, D, LinearGaussian, T
from support.closed_forms import Formula, MaskChain
from torch import Tensor

from nelbo import evaluate
from nelbo._utils.numerics import seeded
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.gaussian import GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits
from nelbo.diffusion.reverse import Beta, Mixture, Posterior, ReverseKernel
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.times import ContinuousTime, TimeGrid, elbo
from nelbo.evaluation.importance_bound import (
    evaluate_importance,
    importance_bound,
    importance_weights,
    log_mean,
    log_weights,
)
from nelbo.evaluation.replicates import BLOCK
from nelbo.testing import assert_mean

X = torch.tensor([0.9, -1.6, 1.1], dtype=torch.float64)
STEPS = pytest.mark.parametrize("step", [Beta(), Posterior()], ids=["beta", "beta_tilde"])


@pytest.fixture(autouse=True)
def _seed():
    with seeded(31), torch.no_grad():
        yield


def mild(step: ReverseKernel) -> LinearGaussian:
    """Near √(1-β) z with variance β, which turns the chain round exactly where x is unit normal
    and all weights are P(x): so the weights here vary little."""
    matrix = (1 - torch.tensor(BETAS, dtype=torch.float64)).sqrt()[:, None, None] * EYE
    matrix = matrix + 0.1 * torch.randn(T, D, D, dtype=torch.float64)
    offset = 0.1 * torch.randn(T, D, dtype=torch.float64)
    return LinearGaussian(step, matrix, offset, spread=0.6)


def symbols() -> tuple[Model, TimeGrid, MaskChain]:
    shown = arbitrary()
    model, times = table_model(shown, PowerAlpha()), TimeGrid([0.3, 0.6, 1.0])
    return model, times, MaskChain(model.process.alpha(times.times).tolist(), shown)


def levels_model() -> Model:
    levels = Levels(4)
    head = LevelLogits(levels.values)

    def lean(z: Tensor, level: Tensor) -> Tensor:
        """Logits of each pixel that follow its neighbours'."""
        mean = (z + z.flatten(1).mean(1)[:, None, None, None])[..., None]
        return (mean + 0.05 * level[:, None, None, None, None]) * torch.linspace(-1, 1, 4).double()

    process, step = GaussianDiffusion(Linear(-6.0, 5.0), levels), Mixture(levels.values)
    return Model(Formula(lean), process, head, step, LevelDecoder(), (3, 1, 2))


@STEPS
def test_one_path_is_the_elbo_of_gaussians(step):
    """E log w = ELBO, in closed form."""
    case = mild(step)
    draws = log_weights(case.model, Batch(X.expand(20_000, D)), case.times)
    assert_mean(draws, case.elbo(X), error=0.015)


@STEPS
@pytest.mark.parametrize("samples", [1, 3])
def test_the_mean_weight_of_gaussians_is_the_evidence(step, samples):
    """E exp L_K = P(x) for every K: with −log K left out it is K P(x)."""
    case = mild(step)
    draws = importance_bound(case.model, X.expand(30_000, D), case.times, samples)
    assert_mean((draws - case.log_evidence(X)).exp(), 1.0, error=0.02)


def test_examples_keep_their_own_paths():
    """The weights in row i are those of example i."""
    case, x = mild(Beta()), torch.stack([X, -X, 0 * X])
    log_w = importance_weights(case.model, Batch(x), case.times, 10_000)
    assert_mean(log_w.T, torch.stack([case.elbo(v) for v in x]), error=0.06)


def test_symbols_by_enumeration():
    """E L_1 and E L_2 over all paths and all pairs of paths of a mask chain, and E exp L_4."""
    model, times, chain = symbols()
    for x in [(0, 2), (1, 1)]:
        p, q = (v.ravel() for v in chain.log_terms(x))
        paths = q > 0
        w, q = p[paths] / q[paths], q[paths]
        first = (q * np.log(w)).sum()
        second = q @ np.log((w[:, None] + w) / 2) @ q
        log_p = math.log(p.sum())
        assert first + 0.01 < second < log_p
        rows = torch.tensor(x).expand(20_000, 2)
        assert_mean(importance_bound(model, rows, times, 1), first, error=0.02)
        assert_mean(importance_bound(model, rows, times, 2), second, error=0.02)
        fourth = importance_bound(model, rows, times, 4)
        assert_mean((fourth - log_p).exp(), 1.0, error=0.02)


def test_the_mixture_step_agrees_with_the_elbo():
    """E log w by paths is the bound by its three terms, estimated apart."""
    model, times = levels_model(), TimeGrid.uniform(4)
    x = torch.tensor([0, 3, 1, 1, 2, 0]).reshape(3, 1, 2).expand(20_000, 3, 1, 2)
    paths, terms = log_weights(model, Batch(x), times), elbo(model, x, times).elbo
    assert_mean(paths - terms, 0.0, error=0.03)


@STEPS
def test_more_paths_are_tighter(step):
    """L_1 < L_2 < L_4 < .. < log P(x), the gap of 64 paths a small part of that of one.

    Of the same paths, by Jensen: the mean of two halves is at most the whole's."""
    case = mild(step)
    log_w = importance_weights(case.model, Batch(X.expand(2000, D)), case.times, 64)
    bounds = [log_mean(log_w.reshape(2000, 64 // k, k)).mean(1) for k in (1, 2, 4, 8, 16, 32, 64)]
    for loose, tight in itertools.pairwise(bounds):
        assert (loose < tight).all()
    gaps = [(case.log_evidence(X) - bound).mean().item() for bound in bounds]
    assert all(gap > 0 for gap in gaps)
    assert gaps[-1] < 0.1 * gaps[0]


def test_the_pass_visits_each_example_once():
    """Calls are T K R per example; the mean is over examples; all follows from the seed; small
    chunks draw from the same law."""
    model, times = levels_model(), TimeGrid.uniform(3)
    x = torch.randint(0, 4, (BLOCK + 3, 3, 1, 2), dtype=torch.uint8)

    def measure(seed: int, rows: int = BLOCK):
        parts = []
        handle = model.network.register_forward_pre_hook(lambda _, i: parts.append(len(i[0])))
        result = evaluate_importance(
            model, x[:rows], times=times, samples=5, replicates=2, seed=seed
        )
        handle.remove()
        assert sum(parts) == 3 * 5 * 2 * rows
        return result

    a = measure(0, BLOCK + 3)
    assert a.calls_per_example == 3 * 5 * 2 and a.backward_calls_per_example == 0
    assert a.per_example.shape == (BLOCK + 3,)
    assert a.nats == pytest.approx(-a.per_example.mean().item(), rel=1e-12)
    assert a.bits_per_dim == pytest.approx(a.nats / (6 * math.log(2)), rel=1e-12)
    assert 1 / 5 < a.how.weight_share < 1
    plain = json.loads(json.dumps(a.to_dict(), allow_nan=False))
    assert plain["how"] == {"samples": 5, "steps": 3, "weight_share": a.how.weight_share}
    b = measure(0)
    assert torch.equal(measure(0).per_example, b.per_example)
    assert not torch.equal(measure(1).per_example, b.per_example)


def test_one_step_has_one_latent():
    """The path of a grid of one time is z alone: one sample is the ELBO, more are tighter, and no
    diffusion term is met."""
    model, x = levels_model(), torch.randint(0, 4, (24, 3, 1, 2))
    found = [
        evaluate_importance(model, x, times=TimeGrid.uniform(1), samples=samples, replicates=8)
        for samples in (1, 4, 64)
    ]
    plain = evaluate(model, x, times=TimeGrid.uniform(1), calls=64)
    error = math.hypot(plain.standard_error.monte_carlo, found[0].standard_error.monte_carlo)
    assert abs(plain.bits_per_dim - found[0].bits_per_dim) < 4 * error
    assert found[2].nats < found[1].nats < found[0].nats
    assert [f.calls_per_example for f in found] == [8, 32, 512]


def test_the_error_is_that_of_other_seeds():
    """The Monte Carlo part is the spread of the mean over seeds, the total adds the data's."""
    model, times = levels_model(), TimeGrid.uniform(2)
    x = torch.randint(0, 4, (24, 3, 1, 2))
    results = [
        evaluate_importance(model, x, times=times, samples=2, replicates=2, seed=seed)
        for seed in range(120)
    ]
    spread = torch.tensor([r.bits_per_dim for r in results]).std().item()
    stated = np.sqrt(np.mean([r.standard_error.monte_carlo**2 for r in results]))
    assert spread == pytest.approx(stated, rel=0.2)  # 3 standard errors of a spread of 120
    one = evaluate_importance(model, x, times=times, samples=2)
    assert math.isnan(one.standard_error.monte_carlo) and one.standard_error.total > 0
    assert one.to_dict()["standard_error"]["monte_carlo"] is None


def test_small_chunks_keep_the_law(monkeypatch):
    """E exp L_K stays P(x) where memory allows a few rows only."""
    case = mild(Beta())
    monkeypatch.setattr(Model, "rows", property(lambda self: 777))
    draws = importance_bound(case.model, X.expand(10_000, D), case.times, 2)
    assert_mean((draws - case.log_evidence(X)).exp(), 1.0, error=0.03)


def test_refusals():
    model, x = levels_model(), torch.zeros(2, 3, 1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        evaluate_importance(model, x, times=TimeGrid.uniform(2), samples=0)
    with pytest.raises(ValueError, match=r"got ContinuousTime.*--steps 64"):
        evaluate_importance(model, x, times=ContinuousTime(), samples=2)
    with pytest.raises(ValueError, match="replicates must be at least 1; got 0"):
        evaluate_importance(model, x, times=TimeGrid.uniform(2), samples=2, replicates=0)
    with pytest.raises(ValueError, match="got none"):
        evaluate_importance(model, x[:0], times=TimeGrid.uniform(2), samples=2)
