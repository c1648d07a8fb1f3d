"""Control variates: their mean is known, and it is zero; what they explain is explained."""

import itertools
import math

import pytest
import torch
from support.closed_forms import (
    Formula,
    chain,
    condition,
    legendre_nodes,
    normal_kl,
    normal_nodes,
    sigma_points,
    states,
)
from support.known_models import MODELS, gaussian, levels, symbols
from torch import Tensor
from torch.distributions import Categorical as Choice
from torch.distributions import MixtureSameFamily, Normal

from nelbo._utils.numerics import seeded
from nelbo.data import as_examples
from nelbo.diffusion import gaussian_mixture
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Categorical, GaussianDensity, LevelDecoder
from nelbo.diffusion.distributions import kl, kl_noise
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits, SymbolLogits, XPrediction
from nelbo.diffusion.prediction import LevelTable, Prediction
from nelbo.diffusion.reverse import Mixture, Posterior
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.terms import DiffusionRate, DiffusionTerm, ReconstructionTerm, Term, TermDraw
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation import allocation, gaussian_variates
from nelbo.evaluation.allocation import Strata, estimate, pilot
from nelbo.evaluation.control_variates import ControlVariates, GradientFeatures
from nelbo.evaluation.gaussian_variates import LevelVariates, LinearVariate
from nelbo.testing import assert_mean

EDGES = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(42), torch.no_grad():
        yield


def levels_of(controls: ControlVariates) -> LevelVariates:
    """The reference of independent levels among control variates."""
    parts = (getattr(part, "of", part) for part in controls.parts)
    return next(part for part in parts if isinstance(part, LevelVariates))


def terms(n: int) -> dict[str, Term]:
    s, t = (torch.full((n,), v, dtype=torch.float64) for v in (0.35, 0.5))
    return {
        "decode": ReconstructionTerm(t=s),
        "step": DiffusionTerm(t=t, s=s),
        "rate": DiffusionRate(t=t),
    }


@pytest.fixture
def exact_integrals(monkeypatch):
    """Integrals over ε as fine as they are told to the last digits."""
    monkeypatch.setattr(gaussian_variates, "NODES", 24)


TERMS = pytest.mark.parametrize("kind", ["decode", "step", "rate"])


# ---- linear: a quadratic in ε, so 2D points give its mean exactly


@TERMS
def test_linear_is_a_cost_without_its_mean(kind):
    """w ‖e - ê‖² of the denoiser of N(μ, Σ), written apart, and its exact mean over ε is zero."""
    known = gaussian()
    process = known.model.process
    data = known.examples(69)
    reference = LinearVariate(known.model, data, EDGES)
    e = process.embed(data)
    mean, cov = e.mean(0), torch.cov(e.T, correction=0)
    noise = sigma_points(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    for x in data[:5]:
        term = terms(4)[kind]
        rows = x.expand(4, 2)
        alpha = process.alpha(term.t[:1])
        z = alpha.sqrt() * process.embed(rows) + (1 - alpha).sqrt() * noise
        draw = TermDraw(rows, term, z, Prediction(z), None, z[:, 0])
        got = reference.within([draw])[0, :, 0]
        gain = alpha.sqrt() * cov @ torch.linalg.inv(alpha * cov + (1 - alpha) * torch.eye(2))
        e_hat = mean + (z - alpha.sqrt() * mean) @ gain.T
        cost = term.error_weight(process) * (process.embed(rows) - e_hat).square().sum(1)
        assert got.abs().max() > 0.01 * cost.abs().max()
        # the reference raises the variances by a millionth, so that none is zero
        torch.testing.assert_close(got, cost - cost.mean(), rtol=1e-4, atol=1e-5 * cost.max())
        assert abs(got.mean().item()) < 1e-12 * cost.max()


def test_a_covariance_of_axes_is_that_of_all_dimensions(monkeypatch):
    """Data whose covariance is exactly a product of one of rows and one of columns give the same
    costs with the eigenvectors of each axis; with variances alone they are others."""
    rows = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    columns = torch.cov(torch.randn(3, 9, dtype=torch.float64))
    cov = torch.kron(rows, columns)
    data = sigma_points(torch.zeros(6, dtype=torch.float64), cov).view(-1, 2, 3)
    one = Affine(torch.zeros(2, 3), torch.ones(2, 3))
    process, decoder = GaussianDiffusion(Linear(-4.0, 2.0), one), GaussianDensity(one, 0.2)
    network = Formula(lambda z, level: torch.zeros_like(z))
    model = Model(network, process, XPrediction(), Posterior(), decoder, (2, 3))
    found = {}
    for widest in (6, 3, 1):
        monkeypatch.setattr(gaussian_variates, "WIDEST", widest)
        reference = LinearVariate(model, data, EDGES)
        assert reference.columns == (widest == 6)
        found[widest] = reference.divergence(data)
    torch.testing.assert_close(found[3], found[6], rtol=1e-9, atol=1e-9)
    assert (found[1] - found[6]).abs().max() > 0.1


# ---- levels: one integral over ε


def one_level_model(count: int, gamma: float, step: str = "mixture") -> Model:
    kinds = Levels(count)
    reverse = Mixture(kinds.values) if step == "mixture" else Posterior()
    process = GaussianDiffusion(Linear(gamma, gamma + 6.0), kinds)
    head = LevelLogits(kinds.values, (1,)).double()
    network = Formula(lambda z, level: torch.zeros(*z.shape, count, dtype=torch.float64))
    return Model(network, process, head, reverse, LevelDecoder(), (1,))


def sharpness(model: Model, t: float) -> float:
    values = model.process.embedding.values
    gamma = model.process.schedule(torch.tensor(t, dtype=torch.float64)).item()
    return (values[1] - values[0]).item() * math.exp(-gamma / 2)


@pytest.mark.parametrize(
    ("count", "gamma", "least", "most"),
    [(4, -1.0, 0, 1), (4, -4.0, 1, 4), (4, -5.0, 4, 7), (3, -14.0, 100, 1000), (256, -9.0, 0, 1)],
    ids=["soft", "middle", "sharp", "far apart", "256"],
)
@pytest.mark.parametrize("kind", ["decode", "rate"])
def test_levels_have_mean_zero_by_quadrature(count, gamma, least, most, kind, monkeypatch):
    """Over ε by a fine rule and over the shift of the coarse one by sixteen evenly spaced shifts,
    which make of it a rule sixteen times finer: the mean of r - E r is zero, but for what lies
    beyond ε = ±6, 2e-9 of the largest value."""
    model = one_level_model(count, gamma)
    t = 0.1
    assert least <= sharpness(model, t) <= most
    logits = torch.randn(count, dtype=torch.float64)
    reference = LevelVariates(model, torch.arange(count)[:, None], EDGES)
    noise, weights = normal_nodes(121, 8.0)
    shifts = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    for level in (0, count // 2, count - 1):
        grid = torch.cartesian_prod(noise, shifts)
        x = torch.full((len(grid), 1), level)
        times = torch.full((len(grid),), t, dtype=torch.float64)
        term = ReconstructionTerm(t=times) if kind == "decode" else DiffusionRate(t=times)
        q = model.process.marginal(model.embed(x), times).base_dist
        z = q.loc + q.scale * grid[:, :1]
        monkeypatch.setattr(torch, "rand", lambda *_, grid=grid, **__: grid[:, 1:])
        draw = TermDraw(x, term, z, Prediction(z), None, z[:, 0])
        got = reference.centred(draw, logits.log_softmax(-1))
        mean = (got.view(len(noise), 16).mean(1) * weights).sum()
        assert abs(mean.item()) < 4e-9 * got.abs().max() + 1e-12


def test_nodes_are_unbiased_where_they_are_too_coarse():
    """A step function of ε, which no 24 nodes integrate: each element has its own error, and
    their mean over elements is zero. With one shift for all it would not be."""
    model = one_level_model(2, -12.0)
    n, t = 20_000, torch.zeros(20_000, dtype=torch.float64)
    process = model.process
    snr = math.exp(12.0)
    # the level that a context so strong favours wins from ε = 0.3 downwards
    ratio = snr / 2 * 4 - 0.3 * 2 * math.sqrt(snr)
    context = torch.tensor([ratio, 0.0], dtype=torch.float64).log_softmax(-1)
    x = torch.ones(n, 1, dtype=torch.int64)
    z = process.marginal(process.embed(x), t).sample()
    draw = TermDraw(x, DiffusionRate(t=t), z, Prediction(z), None, z[:, 0])
    reference = LevelVariates(model, torch.tensor([[0], [1]]), EDGES)
    got = reference.centred(draw, context)
    assert_mean(got / got.std(), 0.0, error=0.008)
    beyond = normal_cdf(0.3)
    jump = DiffusionRate(t=t[:1]).error_weight(process) * 4
    # by chance of z (share beyond) and of the shift, at most half a node of the widest weight
    assert 0.8 < got.std() / (jump * math.sqrt(beyond * (1 - beyond))) < 1.2


def normal_cdf(v: float) -> float:
    return 0.5 * (1 + math.erf(v / math.sqrt(2)))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "lent"])
@pytest.mark.parametrize("step", ["mixture", "posterior"])
@pytest.mark.parametrize(
    ("count", "gamma"), [(4, -3.0), (4, -6.5), (64, -9.0)], ids=["4", "4 sharp", "64"]
)
@TERMS
def test_levels_have_mean_zero_by_draws(kind, count, gamma, step, alone):
    """With its own z, its own Monte Carlo noise and the context of an independent draw."""
    n = 4_000 if count == 4 else 400
    kinds = Levels(count)
    lean = torch.linspace(-1, 1, count, dtype=torch.float64)
    network = Formula(lambda z, level: (1.5 * z.flip(1) + 0.3 * z)[..., None].tanh() * lean)
    reverse = Mixture(kinds.values) if step == "mixture" else Posterior()
    process = GaussianDiffusion(Linear(gamma, gamma + 6.0), kinds)
    model = Model(network, process, LevelLogits(kinds.values), reverse, LevelDecoder(), (2,))
    data = torch.randint(count, (69, 2))
    controls = ControlVariates(model, data, EDGES)
    x = data[:1].expand(n, 2)
    draws = [terms(n)[kind].draw(model, Batch(x)) for _ in range(1 if alone else 2)]
    v = controls.within(draws)[0]
    assert v.shape == (n, 3) == (n, controls.columns)
    assert (v.std(0) > 0).all()
    assert_mean(v / v.std(0), 0.0, error=1.01 / math.sqrt(n))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "lent"])
@TERMS
def test_symbols_have_mean_zero_by_enumeration(kind, alone):
    """Sums over all states of z, and of the other draw's z: zero."""
    known = symbols()
    every = torch.tensor(states(3, 2))
    pairs = torch.cartesian_prod(torch.arange(len(every)), torch.arange(len(every)))
    one, other = every[pairs[:, 0]], every[pairs[:, 1]]
    data = known.examples(69)
    controls = ControlVariates(known.model, data, EDGES)
    x = data[:1].expand_as(one)
    term = terms(len(x))[kind]
    q = known.model.process.marginal(known.model.embed(x), term.t)
    weights = (q.log_prob(one) + q.log_prob(other)).exp()
    draws = [
        TermDraw(x, term, z, known.model.predict(z, term.t), None, term.t) for z in (one, other)
    ]
    (v,) = controls.within(draws[:1] if alone else draws)[0].T
    assert v.abs().max() > 0.1
    assert abs((weights * v).sum().item()) < 1e-14 * v.abs().max()


# ---- the chain rule: D(s) - D(t) is what the exact denoiser costs between s and t


def mixture_of(model: Model, t: Tensor, log_p: Tensor) -> MixtureSameFamily:
    """Σ_k P_k q(z_t|v_k), written apart."""
    values = model.process.embedding.values
    alpha = model.process.alpha(t)
    return MixtureSameFamily(
        Choice(logits=log_p),
        Normal(alpha.sqrt() * values, (1 - alpha).sqrt().expand_as(values)),
    )


@pytest.mark.parametrize("gamma", [-2.0, -5.0], ids=["soft", "sharp"])
def test_divergences_of_levels_are_a_chain(gamma, monkeypatch):
    """For each level x: D is KL( q(z_t|x) ‖ Σ_k P_k q(z_t|v_k) ); D(s) - D(t) is the integral of
    the rate, and the KL of the exact mixture step, both by quadrature."""
    model = one_level_model(4, gamma)
    process, values = model.process, model.process.embedding.values
    log_p = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64).log()
    noise, weights = normal_nodes(161, 8.0)
    s, t = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    x = torch.arange(4)[:, None]
    reference = LevelVariates(model, x, EDGES)

    def divergence(time: Tensor) -> Tensor:
        # sixteen evenly spaced shifts make of the coarse rule one sixteen times finer
        shifts = (torch.arange(16, dtype=torch.float64) + 0.5).repeat_interleave(4)[:, None] / 16
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: shifts)
            got = reference._divergence(x.repeat(16, 1), log_p, time.expand(64))
        return got.view(16, 4).mean(0)

    def at(level: int, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha = process.alpha(time)
        z = alpha.sqrt() * values[level] + (1 - alpha).sqrt() * noise
        return z, (mixture_of(model, time, log_p).log_prob(z))

    for level in range(4):
        for time in (s, t):
            z, log_q = at(level, time)
            scale = (1 - process.alpha(time)).sqrt()
            log_one = -0.5 * noise.square() - scale.log() - 0.5 * math.log(2 * math.pi)
            direct = weights @ (log_one - log_q)
            assert abs(divergence(time)[level] - direct) < 1e-7
        difference = (divergence(s) - divergence(t))[level].item()

        integral = 0.0
        for time, weight in zip(*legendre_nodes(0.2, 0.6, 30), strict=True):
            z, _ = at(level, time)
            alpha = process.alpha(time)
            evidence = -0.5 * (z[:, None] - alpha.sqrt() * values).square() / (1 - alpha)
            e_hat = (log_p + evidence).softmax(-1) @ values
            snr = alpha / (1 - alpha)
            integral += weight * 3.0 * snr * (weights @ (values[level] - e_hat).square())
        assert abs(integral.item() - difference) < 1e-7

        z, _ = at(level, t)
        alpha = process.alpha(t)
        evidence = -0.5 * (z[:, None] - alpha.sqrt() * values).square() / (1 - alpha)
        log_probs = (log_p + evidence).log_softmax(-1)[:, None]
        rows = t.expand(len(z)), z[:, None]
        p = model.step(
            LevelTable(log_probs.exp() @ values, log_probs),
            rows[1],
            s.expand(len(z)),
            rows[0],
            process,
        )
        e = values[level].expand(len(z), 1)
        q = process.posterior(rows[1], e, s.expand(len(z)), rows[0])
        before = q.base_dist.loc + q.base_dist.scale * noise[:, None, None]
        ratio = q.base_dist.log_prob(before) - p.base_dist.log_prob(before)
        step = weights @ torch.tensordot(weights, ratio, 1)[:, 0]
        assert abs(step.item() - difference) < 1e-7


def test_the_table_is_of_each_dimension_s_frequencies(monkeypatch, exact_integrals):
    """D of an example sums its dimensions'; where a table of all is dear, dimensions share."""
    known = levels()
    data = known.examples(69).long()
    reference = LevelVariates(known.model, data, EDGES)
    assert reference.table.shape == (2, 4, 4)
    direct = torch.stack(
        [
            reference._divergence(data, reference.log_frequency, t.expand(len(data))).sum(1)
            for t in EDGES
        ],
        1,
    )
    torch.testing.assert_close(reference.divergence(data), direct, rtol=0, atol=5e-5)
    monkeypatch.setattr(gaussian_variates, "HELD", 1)
    shared = LevelVariates(known.model, data, EDGES)
    assert shared.table.shape == (1, 4, 4)
    together = reference.log_frequency.exp().mean(0)
    torch.testing.assert_close(shared.log_frequency[0], together.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared.log_frequency[1], together.log(), rtol=1e-12, atol=1e-12)


def test_divergences_of_a_gaussian_are_a_chain():
    """For each x: KL( N(√α e, 1-α) ‖ N(√α μ, αΣ + 1-α) ); their difference is the integral of the
    rate of the denoiser of N(μ, Σ), and the KL to the exact reverse step."""
    known = gaussian()
    process, data = known.model.process, known.examples(69)
    times = torch.tensor([0.2, 0.6], dtype=torch.float64)
    reference = LinearVariate(known.model, data, times)
    (vectors,) = reference.vectors
    cov = vectors @ reference.variance.diag() @ vectors.T
    mean, one = reference.mean, torch.eye(2, dtype=torch.float64)
    got = reference.divergence(data[:5])
    alpha_s, alpha_t = process.alpha(times)
    for i, e in enumerate(process.embed(data[:5])):
        for column, a in enumerate((alpha_s, alpha_t)):
            direct = normal_kl(
                a.sqrt() * e, (1 - a) * one, a.sqrt() * mean, a * cov + (1 - a) * one
            )
            torch.testing.assert_close(got[i, column], direct, rtol=1e-10, atol=1e-12)
        difference = got[i, 0] - got[i, 1]

        integral = torch.zeros((), dtype=torch.float64)
        for t, weight in zip(*legendre_nodes(0.2, 0.6, 30), strict=True):
            a = process.alpha(t)
            z = sigma_points(a.sqrt() * e, (1 - a) * one)
            gain = a.sqrt() * cov @ torch.linalg.inv(a * cov + (1 - a) * one)
            e_hat = mean + (z - a.sqrt() * mean) @ gain.T
            integral += weight * 3.0 * a / (1 - a) * (e - e_hat).square().sum(1).mean()
        torch.testing.assert_close(integral, difference, rtol=1e-10, atol=0)

        # z_s and z_t jointly under N(μ, Σ); Bayes' rule for z_s given z_t
        kept = alpha_t / alpha_s
        joint = chain(
            alpha_s.sqrt() * mean,
            alpha_s * cov + (1 - alpha_s) * one,
            [(kept.sqrt() * one, torch.zeros(2, dtype=torch.float64), (1 - kept) * one)],
        )
        gain, offset, spread = condition(*joint, slice(2, 4), slice(0, 2))
        z = sigma_points(alpha_t.sqrt() * e, (1 - alpha_t) * one)
        step = torch.zeros((), dtype=torch.float64)
        for point in z:
            q = process.posterior(point[None], e[None], times[:1], times[1:]).base_dist
            variance = q.scale[0].square().diag()
            step += normal_kl(q.loc[0], variance, gain @ point + offset, spread) / len(z)
        torch.testing.assert_close(step, difference, rtol=1e-9, atol=0)


# ---- a model that is its reference: nothing is left


def level_reference_model(data: Tensor, step: str = "mixture") -> Model:
    kinds = Levels(4)
    reverse = Mixture(kinds.values) if step == "mixture" else Posterior()
    head = LevelLogits(kinds.values, tuple(data.shape[1:])).double()
    head.fit_statistics(data)
    network = Formula(lambda z, level: torch.zeros(*z.shape, 4, dtype=torch.float64))
    process = GaussianDiffusion(Linear(-4.0, 2.5), kinds)
    return Model(network, process, head, reverse, LevelDecoder(), tuple(data.shape[1:]))


def symbol_reference_model(data: Tensor) -> Model:
    head = SymbolLogits(3, tuple(data.shape[1:])).double()
    head.fit_statistics(data)
    network = Formula(lambda z, level: torch.zeros(len(z), 2, 3, dtype=torch.float64))
    process = MaskedDiffusion(PowerAlpha(2.0), 3)
    return Model(network, process, head, Posterior(), Categorical(), tuple(data.shape[1:]))


def linear_reference_model(data: Tensor) -> Model:
    mean, cov = data.mean(0), torch.cov(data.T, correction=0)
    cov = cov + 1e-6 * cov.trace() / 2 * torch.eye(2)

    def network(z: Tensor, gamma: Tensor) -> Tensor:
        alpha = torch.sigmoid(-gamma)[:, None, None]
        gain = alpha.sqrt() * cov @ torch.linalg.inv(alpha * cov + (1 - alpha) * torch.eye(2))
        centred = z - alpha[:, 0].sqrt() * mean
        return mean + (gain @ centred[..., None])[..., 0]

    process = GaussianDiffusion(Linear(-4.0, 2.0), Affine())
    decoder = GaussianDensity(Affine(), 0.2).requires_grad_(False)
    return Model(Formula(network), process, XPrediction(), Posterior(), decoder, (2,))


def its_own_reference(name: str) -> tuple[Model, Tensor]:
    """A model that is the reference of the data beside it."""
    known, make = {
        "levels": (levels, level_reference_model),
        "symbols": (symbols, symbol_reference_model),
        "linear": (gaussian, linear_reference_model),
    }[name]
    data = as_examples(known().examples(69))
    return make(data), data


@pytest.mark.parametrize("name", ["levels", "symbols", "linear"])
def test_of_a_model_that_is_its_reference_nothing_is_left(name, monkeypatch, exact_integrals):
    """On a grid with a stratum for each term, cost - k v - b φ = 0: without ridge and pooling the
    pilot finds those k and b, and any draws give the one number. For levels and symbols, whose
    dimensions are independent, that is -log P(x) - D(1), in closed form."""
    monkeypatch.setattr(allocation, "DOUBT", 1e-9)
    monkeypatch.setattr(
        gaussian_mixture, "SIZES", (1,)
    )  # its features are then quadratics, all of them
    monkeypatch.setattr(allocation, "POOLED", 1e-9)
    if name == "levels":  # whose dimensions tell nothing of each other
        monkeypatch.setattr(gaussian_variates, "FEWEST", 1000)
    times = TimeGrid.uniform(4)
    strata = Strata(times)
    model, data = its_own_reference(name)
    controls = ControlVariates(model, data, strata.edges)
    found = pilot(strata, controls, Batch(data), 64 * controls.calls)
    x, draws = data[:8].repeat_interleave(3, 0), torch.rand(24, 7, dtype=torch.float64)
    total = estimate(strata, controls, found, Batch(x), draws).sum(-1).view(8, 3)
    # of the integrals over ε 24 nodes leave 1e-5, of a cost of one or two
    torch.testing.assert_close(total, total[:, :1].expand_as(total), rtol=0, atol=1e-3)
    assert found.left.max() < 2e-4
    if name == "linear":
        return
    log_p = model.head.log_prior
    surprise = -log_p.expand(8, *log_p.shape).gather(-1, data[:8, :, None])[..., 0].sum(1)
    # no symbol is left at time 1
    end = levels_of(controls).divergence(data[:8])[:, -1] if name == "levels" else 0.0
    truth = surprise - end
    torch.testing.assert_close(total[:, 0], truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["levels", "symbols", "linear"])
def test_the_pilot_finds_what_there_is(name):
    """With its ridge, and in continuous time, where a stratum holds many times: a sixteenth of the
    variance of the costs is left, at most."""
    strata = Strata(ContinuousTime())
    model, data = its_own_reference(name)
    controls = ControlVariates(model, data, strata.edges, pairs=False)
    found = pilot(strata, controls, Batch(data), 64)
    plain = pilot(strata, ControlVariates(model, None, strata.edges), Batch(data), 64)
    assert found.left.sum() < plain.left.sum() / 4


# ---- a draw keeps what its cost was made of


@pytest.mark.parametrize("name", MODELS)
@TERMS
def test_a_draw_keeps_what_its_cost_was_made_of(name, kind):
    """z and ê are those of the one network call, and z, ê and the noise give the cost again."""
    known = MODELS[name]()
    x = as_examples(known.examples(5))
    term = terms(5)[kind]
    draw, model = term.draw(known.model, Batch(x)), known.model
    assert draw.x is x and draw.term is term and draw.cost.dtype == torch.float64
    assert torch.equal(draw.prediction.e_hat, model.predict(draw.z, term.t).e_hat)
    if kind == "decode":
        cost = -model.decoder(draw.prediction, draw.z, term.t, model.process).log_prob(x)
    elif isinstance(term, DiffusionTerm):
        q = model.process.posterior(draw.z, model.embed(x), term.s, term.t)
        p = model.step(draw.prediction, draw.z, term.s, term.t, model.process)
        assert (draw.noise is None) == (not isinstance(model.step, Mixture))
        cost = kl(q, p, draw.noise)
    else:
        cost = model.process.rate(draw.z, model.embed(x), draw.prediction.e_hat, term.t)
    assert torch.equal(draw.cost, cost)


def test_the_noise_of_a_monte_carlo_kl_comes_again(exact_integrals):
    """With the reference as the model, cost - (r - E r) is D(s) - D(t): the noise of the draw's
    KL, which is most of its variance, is gone but for what 24 nodes leave of an integral."""
    data = levels().examples(69).long()
    model = level_reference_model(data)
    controls = ControlVariates(model, data, EDGES)
    x = data[:1].expand(500, 2)
    s, t = (torch.full((500,), v, dtype=torch.float64) for v in (0.2, 0.6))
    draw = DiffusionTerm(t=t, s=s).draw(model, Batch(x))
    left = draw.cost - controls.within([draw])[0, :, -1]
    q = model.process.posterior(draw.z, model.embed(x), s, t)
    p = model.step(draw.prediction, draw.z, s, t, model.process)
    again = kl(q, p, kl_noise(q, p))
    assert (again - draw.cost).std() > 0.02  # other noise, another cost
    assert left.std() < 5e-5
    low, high = (
        levels_of(controls)._divergence(x[:1], levels_of(controls).log_frequency, v[:1]).sum()
        for v in (s, t)
    )
    torch.testing.assert_close(left.mean(), low - high, rtol=0, atol=5e-5)


def test_without_features_the_level_of_a_stratum_is_between():
    """So that a pilot without control variates knows the costs of each stratum."""
    controls = ControlVariates(gaussian().model, None, EDGES)
    x = gaussian().examples(5)
    assert torch.equal(controls.between(x), torch.ones(5, len(EDGES), 1, dtype=torch.float64))
    assert controls.features == 1


def test_the_terms_of_the_reference_are_between():
    """φ of a cell of levels is D(s) - D(t) and -log P(x) - D(t_1), up to scale."""
    data = levels().examples(69).long()
    model = level_reference_model(data)
    controls = ControlVariates(model, data, EDGES)
    phi = controls._phi(data)[..., -1]
    d = levels_of(controls).divergence(data)
    surprise = -model.head.log_prior.expand(69, 2, 4).gather(-1, data[..., None]).sum((1, 2))
    torch.testing.assert_close(phi[:, 0], surprise - d[:, 0], rtol=1e-12, atol=1e-12)
    for c, (s, t) in enumerate(itertools.pairwise(range(len(EDGES))), 1):
        torch.testing.assert_close(phi[:, c], d[:, s] - d[:, t], rtol=1e-12, atol=1e-12)
    normal = controls.between(data)
    assert torch.equal(normal[..., 0], torch.ones(69, 4, dtype=torch.float64))
    torch.testing.assert_close(normal[..., 1:].mean(0), torch.zeros_like(normal[0, :, 1:]))
    spread = normal[..., 1:].std(0, correction=0)
    torch.testing.assert_close(spread, torch.ones_like(spread))


def test_the_roughness_of_images_is_between():
    """Σ log(1 + |d|/s), d the differences of neighbours, then those from left + above - corner; s
    the mean difference of neighbours: by loops."""
    process = GaussianDiffusion(Linear(-4.0, 4.0), Levels(4))
    data = torch.randint(4, (69, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    head, step = LevelLogits(process.embedding.values), Posterior()
    network = Formula(lambda z, level: z[..., None].expand(*z.shape, 4))
    controls = ControlVariates(
        Model(network, process, head, step, LevelDecoder(), (2, 3, 3)), data, EDGES
    )

    def differences(image):
        for c, i, j in itertools.product(range(2), range(3), range(3)):
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < 3 and m < 3:
                    yield abs(image[c][i][j] - image[c][k][m])

    def from_a_plane(image):
        for c, i, j in itertools.product(range(2), (1, 2), (1, 2)):
            a = image[c]
            yield abs(a[i][j] - a[i][j - 1] - a[i - 1][j] + a[i - 1][j - 1])

    images = data.tolist()
    each = [list(differences(image)) for image in images]
    mean = sum(map(sum, each)) / sum(map(len, each))
    expected = [
        [sum(math.log1p(d / mean) for d in kind) for kind in kinds]
        for kinds in zip(each, map(list, map(from_a_plane, images)), strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    found = controls._phi(data)[..., :2]
    torch.testing.assert_close(found, expected[:, None].expand(-1, 4, -1))


def test_images_without_neighbours_or_differences_have_no_roughness():
    """One pixel has none, and a single colour divides by nothing."""
    one = GaussianDiffusion(Linear(-4.0, 4.0), Levels(4))
    head, network = LevelLogits(one.embedding.values), Formula(lambda z, level: z)
    for side in (1, 2):
        model = Model(network, one, head, Posterior(), LevelDecoder(), (3, side, side))
        x = torch.full((40, 3, side, side), 2)
        controls = ControlVariates(model, x, EDGES)
        assert isinstance(controls.parts[0], GradientFeatures) == (side > 1)
        assert controls.between(x).isfinite().all()
