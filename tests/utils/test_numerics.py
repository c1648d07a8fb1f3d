"""The stable forms: log(1 - exp), slopes, seeds, categorical divergences, discretised tails."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from support.closed_forms import normal_nodes
from torch.distributions import Normal, kl_divergence

from nelbo._utils.numerics import derive_seed, log1mexp, over, seeded, slope
from nelbo.diffusion.distributions import (
    Discrete,
    DiscretisedNormal,
    LevelMixture,
    draw,
    kl,
    kl_noise,
)
from nelbo.testing import assert_mean

INF = math.inf


def f64(values):
    """A float64 tensor of Python numbers, unrounded."""
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(8):
        yield


def test_log1mexp_has_all_its_digits():
    """log(1 - e^a) against 400-digit decimals, from a = -1e-15 to -700; derivative
    -e^a/(1 - e^a); limits -inf and 0."""
    getcontext().prec = 400
    a = f64([-1e-15, -1e-8, -1e-3, -0.1, -0.6931, -0.6932, -1, -5, -40, -700])
    a.requires_grad_()
    value = log1mexp(a)
    truth = [float((1 - Decimal(v).exp()).ln()) for v in a.tolist()]
    torch.testing.assert_close(value, f64(truth), rtol=4e-16, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    truth = [float(-1 / (Decimal(-v).exp() - 1)) for v in a.tolist()]
    torch.testing.assert_close(gradient, f64(truth), rtol=1e-14, atol=0)
    ends = log1mexp(torch.tensor([0.0, -INF]))
    assert ends.tolist() == [-INF, 0.0]


def test_slope_is_the_derivative_with_and_without_gradients():
    """df/dt elementwise, the same inside `no_grad`, differentiable in f's parameters outside."""
    a = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    df = slope(lambda t: (a * t).sin(), t)
    torch.testing.assert_close(df, a * (a * t).cos(), rtol=1e-14, atol=0)
    (got,) = torch.autograd.grad(df.sum(), a)
    want = ((a * t).cos() - a * t * (a * t).sin()).sum()
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    with torch.no_grad():
        quiet = slope(lambda t: (a * t).sin(), t)
    assert not quiet.requires_grad
    assert torch.equal(quiet, df)


def test_over_stands_over_examples():
    """v of example b multiplies all of example b and nothing else, in the dtype of x."""
    v, x = f64([2.0, 3.0]), torch.ones(2, 3, 5, 7)
    product = over(v, x) * x
    assert product.dtype == torch.float32
    assert (product[0] == 2).all() and (product[1] == 3).all()
    assert torch.equal(over(v, torch.ones(2, 3, dtype=torch.long)), v[:, None])


def test_seeds_are_places():
    """The same path gives the same draws, another path others, and outside nothing moves."""
    state = torch.get_rng_state()
    with seeded(1, 2):
        first = torch.rand(5)
    with seeded(1, 2):
        again = torch.rand(5)
    with seeded(2, 1):
        other = torch.rand(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    seeds = {derive_seed(*path) for path in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]}
    assert len(seeds) == 6
    assert all(0 <= s < 2**63 for s in seeds)


# ---- Discrete


def test_discrete_kl_with_zeros():
    """Σ p log p/q with 0 log 0/q = 0, finite, and infinite where q misses p;
    torch's own KL would be infinite or NaN."""
    p = Discrete(f64([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).log())
    q = Discrete(f64([[0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]).log())
    want = f64([0.5 * math.log(2), math.log(2)])
    torch.testing.assert_close(kl_divergence(p, q), want, rtol=1e-15, atol=0)
    assert kl_divergence(q, p).tolist() == [INF, INF]
    assert kl_divergence(p, p).tolist() == [0.0, 0.0]


def test_discrete_kl_where_probabilities_underflow():
    """Q = e^-1000 is 0 in float64, its KL is 1000 with a gradient."""
    p = Discrete(f64([-INF, 0.0]))
    logits = f64([1000.0, 0.0]).requires_grad_()
    kl = kl_divergence(p, Discrete(logits.log_softmax(-1)))
    assert kl.item() == 1000
    (gradient,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(gradient, f64([1.0, -1.0]))


def test_discrete_kl_gradients_are_finite_with_zeros_in_both():
    """The gradient of KL in q's logits is q - p, also where p and q are zero together."""
    log_p = f64([0.3, 0.7, 0.0, 0.0]).log()
    logits = f64([0.2, -0.4, 0.1, -INF]).requires_grad_()
    log_q = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad(kl_divergence(Discrete(log_p), Discrete(log_q)), logits)
    torch.testing.assert_close(
        gradient, log_q.exp().detach() - log_p.exp(), rtol=1e-14, atol=1e-16
    )


def test_discrete_never_draws_the_impossible(monkeypatch):
    """Levels of probability zero, first, middle and last, never come: not for the smallest u that
    float64 has, nor for the largest."""
    p = f64([0.0, 0.3, 0.0, 0.7, 0.0])
    distribution = Discrete(p.log())
    draws = distribution.sample((100_000,))
    frequency = torch.stack([(draws == k).double() for k in range(5)], 1)
    assert_mean(frequency, p, error=0.002)
    for u, level in ((0.0, 1), (0.3, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *a, u=u, **k: f64([u]))
        assert distribution.sample().item() == level


def test_discrete_draws_tails_that_float32_has_not(monkeypatch):
    """Float32 steps by 2^-24; a tail below that is drawn at either end."""
    tail = 1e-9
    for p, u, level in (([tail, 1 - tail], tail / 2, 0), ([1 - tail, tail], 1 - tail / 2, 1)):
        monkeypatch.setattr(torch, "rand", lambda *a, u=u, **k: f64([u]))
        assert Discrete(f64(p).log()).sample().item() == level


# ---- DiscretisedNormal


def log_mass(low: float, high: float) -> float:
    """log ∫ φ over [low, high], 0 < low: φ(low) ∫ e^{-low u - u²/2} du by Gauss-Legendre."""
    u, w = np.polynomial.legendre.leggauss(60)
    width = high - low
    # Where e^{-low u} has died out before the bin ends, integrate to there: 50 decay lengths.
    reach = min(width, 50 / low)
    u, w = (u + 1) * reach / 2, w * reach / 2
    inner = (w * np.exp(-low * u - u**2 / 2)).sum()
    return float(-0.5 * low**2 - 0.5 * math.log(2 * math.pi) + math.log(inner))


@pytest.mark.parametrize("sigmas", [1.0, 6.0, 8.0, 12.0, 25.0, 40.0])
@pytest.mark.parametrize("side", [1, -1], ids=["above", "below"])
def test_discretised_tails(sigmas, side):
    """(Ho et al. 2020, equation 13): a bin 6 to 40 σ from the mean has its exact
    log-probability, finite, and gradients that pull, in float64 and in float32."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    level = 128 + side * 40
    scale = 0.02
    middle = values[level].item()
    half = 1 / 255
    near = sigmas * scale
    mean = middle - side * (near + half)
    truth = log_mass(near / scale, (near + 2 * half) / scale)
    for dtype, digits in ((torch.float64, 2e-12), (torch.float32, 2e-5)):
        loc = torch.tensor([mean], dtype=dtype, requires_grad=True)
        spread = torch.tensor(scale, dtype=dtype, requires_grad=True)
        got = DiscretisedNormal(loc, spread, values).log_prob(torch.tensor([level]))
        assert abs(got.item() / truth - 1) < digits
        of_mean, of_scale = torch.autograd.grad(got.sum(), [loc, spread])
        # d log P/d mean ≈ z/σ in the tail: towards the bin, by about the distance
        assert sigmas * 0.9 < of_mean.item() * side * scale < sigmas * 1.1 + 1
        assert math.isfinite(of_scale.item()) and of_scale.item() != 0


@pytest.mark.parametrize("sigmas", [6.0, 40.0])
def test_discretised_open_tails(sigmas):
    """The outermost bins reach to infinity: log Φ(-6) and log Φ(-40), both sides alike."""
    values = torch.linspace(-1, 1, 16, dtype=torch.float64)
    edge, scale = 14 / 15, 0.05
    truth = log_mass(sigmas, sigmas + 200)
    for side, level in ((1, 15), (-1, 0)):
        mean = torch.tensor([side * (edge - sigmas * scale)], dtype=torch.float64)
        p = DiscretisedNormal(mean, f64(scale), values)
        assert abs(p.log_prob(torch.tensor([level])).item() / truth - 1) < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.7, 30.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.013, 0.999, 2.0])
@pytest.mark.parametrize("count", [2, 17, 256])
@pytest.mark.parametrize("centred", [False, True], ids=["edges", "centred"])
def test_discretised_sums_to_one(scale, mean, count, centred):
    """Both scalings: K levels on [-1, 1] edge-aligned or centred in their bins,
    the probabilities sum to 1 and the mode has the most."""
    k = torch.arange(count, dtype=torch.float64)
    values = 2 * (k + 0.5) / count - 1 if centred else 2 * k / (count - 1) - 1
    loc = torch.full((count,), mean, dtype=torch.float64)
    p = DiscretisedNormal(loc, f64(scale), values)
    probability = p.log_prob(torch.arange(count)).exp()
    assert abs(probability.sum().item() - 1) < 1e-12
    torch.testing.assert_close(probability[p.mode[0]], probability.max(), rtol=1e-12, atol=0)


# ---- LevelMixture and its Monte Carlo divergence


def mixture(copies: int = 1) -> tuple[Normal, LevelMixture]:
    log_probs = f64([[0.2, 0.5, 0.3]]).log().repeat(copies, 1)
    loc = f64([[-0.1, 0.04, 0.11]]).repeat(copies, 1)
    q = Normal(f64([0.11] * copies), f64([0.6] * copies))
    return q, LevelMixture(log_probs, loc, f64([[0.6]]))


def test_mixture_kl_is_unbiased():
    """The mixture step: the Monte Carlo KL has the integral as its mean, and
    at the small steps it is for the antithetic pair is far better than two independent draws."""
    q, p = mixture()
    e, w = normal_nodes()
    z = q.loc + q.scale * e[:, None]
    truth = (w[:, None] * (q.log_prob(z) - p.log_prob(z))).sum()
    many, target = mixture(100_000)
    draws = kl(many, target, kl_noise(many, target))
    assert_mean(draws, truth, error=0.01 * truth.item())
    z = many.sample((2,))
    independent = (many.log_prob(z) - target.log_prob(z)).mean(0)
    assert draws.var() < 0.1 * independent.var()


def test_mixture_kl_takes_an_antithetic_pair():
    """The pair m ± σε: a log-ratio linear in z, as between two normals of one variance, has no
    Monte Carlo error left at all."""
    q = Normal(f64([0.3, -1.0]), f64([0.6, 0.6]))
    log_probs = f64([0.2, 0.8]).log().expand(2, 2)
    p = LevelMixture(log_probs, f64([[0.9, 0.9]] * 2), f64([0.6]))
    want = (q.loc - 0.9).square() / (2 * 0.36)
    for _ in range(3):
        torch.testing.assert_close(kl(q, p, kl_noise(q, p)), want, rtol=1e-12, atol=0)


def test_mixture_kl_has_gradients():
    """The divergence is differentiable in the probabilities and, through the draw, in q."""
    q, p = mixture()
    loc = q.loc.requires_grad_()
    logits = p.mixture_distribution.logits.clone().requires_grad_()
    target = LevelMixture(logits.log_softmax(-1), p.component_distribution.loc, torch.tensor(0.6))
    q = Normal(loc, q.scale)
    gradients = torch.autograd.grad(kl(q, target, kl_noise(q, target)).sum(), [loc, logits])
    assert all(g.isfinite().all() and (g != 0).all() for g in gradients)


def test_draw_is_reparametrised_where_it_can_be():
    """A learned schedule needs the gradient of z in its parameters; integers have none."""
    loc = torch.zeros(3, requires_grad=True)
    assert draw(Normal(loc, 1.0)).requires_grad
    assert not draw(Discrete(loc.log_softmax(-1))).requires_grad
