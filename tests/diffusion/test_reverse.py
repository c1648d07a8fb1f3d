"""P(z_s|z_t): what each reverse step costs, and that all of them have one limit."""

import itertools
import math

import pytest
import torch
from support.closed_forms import Formula, normal_nodes
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.distributions import kl, kl_noise
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits, XPrediction
from nelbo.diffusion.prediction import LevelPrediction, Prediction
from nelbo.diffusion.reverse import Beta, Learned, Mixture, Optimal, Posterior, ReverseKernel
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import TimeGrid, elbo
from nelbo.testing import assert_mean, orders

SHAPE = (2, 3, 5, 7)
DIMS = 105
S = torch.tensor([0.2, 0.5], dtype=torch.float64)
T = torch.tensor([0.6, 0.95], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(15):
        yield


def setup() -> tuple[GaussianDiffusion, Tensor, Tensor, Tensor]:
    """A process and z_t, e, ê of which nothing is special."""
    return GaussianDiffusion(Linear(-5.0, 4.0), Affine()), *torch.randn(
        3, *SHAPE, dtype=torch.float64
    )


def per_example(v: Tensor) -> Tensor:
    return v.square().flatten(1).sum(1)


def test_kl_with_beta_is_the_distance_and_the_constant():
    """Equation 7: with σ² = β the KL is ‖m_t − f‖²/(2β) + D/2 [β̃/β − 1 − log(β̃/β)]."""
    process, z, e, e_hat = setup()
    alpha_s, alpha_t = (1 / (1 + (-5 + 9 * v).exp()) for v in (S, T))
    beta = 1 - alpha_t / alpha_s
    tilde = beta * (1 - alpha_s) / (1 - alpha_t)
    p = Beta()(Prediction(e_hat), z, S, T, process)
    got = kl_divergence(process.posterior(z, e, S, T), p)
    # m_t − f = √α_s β/(1-α_t) (e − ê)
    distance = per_example(e - e_hat) * alpha_s * (beta / (1 - alpha_t)).square()
    constant = DIMS / 2 * (tilde / beta - 1 - (tilde / beta).log())
    torch.testing.assert_close(got, distance / (2 * beta) + constant, rtol=1e-11, atol=0)
    perfect = Beta()(Prediction(e), z, S, T, process)
    got = kl_divergence(process.posterior(z, e, S, T), perfect)
    torch.testing.assert_close(got, constant, rtol=1e-11, atol=0)


def test_kl_with_beta_tilde_is_the_difference_of_snr():
    """Equation 7: with σ² = β̃ the KL is ½ (SNR_s − SNR_t) ‖x − x̂‖²."""
    process, z, e, e_hat = setup()
    p = Posterior()(Prediction(e_hat), z, S, T, process)
    got = kl_divergence(process.posterior(z, e, S, T), p)
    snr = (5 - 9 * S).exp() - (5 - 9 * T).exp()
    torch.testing.assert_close(got, 0.5 * snr * per_example(e - e_hat), rtol=1e-11, atol=0)


def test_kl_with_a_learned_variance():
    """Nichol & Dhariwal 2021, equation 15: the KL of two normals with σ² = β^v β̃^(1-v)."""
    process, z, e, e_hat = setup()
    v = torch.rand(SHAPE, dtype=torch.float64) * 1.4 - 0.2
    alpha_s, alpha_t = (1 / (1 + (-5 + 9 * w).exp()) for w in (S, T))
    beta = (1 - alpha_t / alpha_s).reshape(2, 1, 1, 1)
    tilde = beta * ((1 - alpha_s) / (1 - alpha_t)).reshape(2, 1, 1, 1)
    variance = beta**v * tilde ** (1 - v)
    mean = alpha_s.sqrt().reshape(2, 1, 1, 1) * beta / (1 - alpha_t).reshape(2, 1, 1, 1)
    square = (mean * (e - e_hat)).square()
    each = 0.5 * (tilde / variance - 1 - (tilde / variance).log() + square / variance)
    p = Learned()(Prediction(e_hat, fraction=v), z, S, T, process)
    got = kl_divergence(process.posterior(z, e, S, T), p)
    torch.testing.assert_close(got, each.flatten(1).sum(1), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("step", "fraction"),
    [
        (Posterior(), None),
        (Beta(), None),
        (Learned(), 0.0),
        (Learned(), 0.4),
        (Learned(), 1.0),
        (Optimal(torch.linspace(0.1, 0.7, 9)), None),
    ],
    ids=["posterior", "beta", "learned 0", "learned 0.4", "learned 1", "optimal"],
)
def test_every_gaussian_step_has_the_rate_as_its_limit(step, fraction):
    """Equations 7 and 8: KL/(t-s) → ½ γ' SNR ‖x − x̂‖² as s → t, at first order, whatever
    the variance between β̃ and β."""
    process, z, e, e_hat = setup()
    prediction = Prediction(e_hat)
    if fraction is not None:
        prediction = Prediction(e_hat, fraction=torch.full(SHAPE, fraction, dtype=torch.float64))
    rate = process.rate(z, e, e_hat, T)
    errors = []
    for h in (2.0**-k for k in (9, 10, 11, 12)):
        p = step(prediction, z, T - h, T, process)
        kl = kl_divergence(process.posterior(z, e, T - h, T), p)
        errors.append((kl / h - rate)[0].item())
    assert abs(errors[-1]) < 0.01 * rate[0]
    assert ((orders(errors) - 1).abs() < 0.05).all(), orders(errors)


# ---- the mixture step, one dimension, by quadrature

LEVELS = 4
VALUES = Levels(LEVELS).values
PRIOR = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)
NODES, WEIGHTS = normal_nodes(121)


def line(gamma_min: float = -4.0, gamma_max: float = 2.0) -> GaussianDiffusion:
    return GaussianDiffusion(Linear(gamma_min, gamma_max), Levels(LEVELS))


def predict(z: Tensor, t: Tensor, process: GaussianDiffusion) -> LevelPrediction:
    """Bayes under PRIOR, for z of shape (B, 1): what an ideal network says of one dimension."""
    output = PRIOR.log().expand(len(z), 1, LEVELS)
    return LevelLogits(VALUES)(output, z, t, process)


def kl_by_quadrature(
    process: GaussianDiffusion, step: ReverseKernel, x: int, z: Tensor, s: float, t: float
) -> Tensor:
    """KL( q(z_s|z_t,x) ‖ P(z_s|z_t) ) for each z_t in z, shape (N,), the integral over z_s."""
    z = z[:, None]
    s, t = (torch.full((len(z),), v, dtype=torch.float64) for v in (s, t))
    e = process.embed(torch.full_like(z, x, dtype=torch.long))
    q = process.posterior(z, e, s, t).base_dist
    p = step(predict(z, t, process), z, s, t, process).base_dist
    at = q.loc + q.scale * NODES[:, None, None]
    return WEIGHTS @ (q.log_prob(at) - p.log_prob(at))[..., 0]


@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.3, 0.4), (0.2, 0.9)])
def test_the_mixture_is_normalised(s, t):
    """∫ P(z_s|z_t) dz_s = 1."""
    process = line()
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    s, t = (torch.full((5,), v, dtype=torch.float64) for v in (s, t))
    p = Mixture(VALUES)(predict(z, t, process), z, s, t, process).base_dist
    at = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    total = p.log_prob(at[:, None, None]).exp().sum(0) * (at[1] - at[0])
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_the_mixture_is_the_exact_marginal():
    """With Bayes' probabilities, P(z_s|z_t) = Σ_k P(v_k) q(z_s, z_t|v_k) / Σ_k
    P(v_k) q(z_t|v_k), by hand through the *forward* densities of z_s and z_t."""
    process = line()
    z = torch.tensor([[0.3], [-1.1]], dtype=torch.float64)
    at = torch.tensor([[0.1], [0.6]], dtype=torch.float64)
    p = Mixture(VALUES)(predict(z, T, process), z, S, T, process)

    def density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (-((x - mean) ** 2) / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()

    alpha_s, alpha_t = (1 / (1 + (-4 + 6 * v).exp())[:, None] for v in (S, T))
    kept = alpha_t / alpha_s
    of_t = density(z, alpha_t.sqrt() * VALUES, 1 - alpha_t)
    of_s = density(at, alpha_s.sqrt() * VALUES, 1 - alpha_s)
    step = density(z, kept.sqrt() * at, 1 - kept)
    truth = (PRIOR * of_s).sum(1) * step[:, 0] / (PRIOR * of_t).sum(1)
    torch.testing.assert_close(p.log_prob(at), truth.log(), rtol=1e-11, atol=1e-11)


def test_the_mixture_is_one_gaussian_in_the_limit():
    """And equation 8: KL(s, t)/(t-s) of the mixture → the Gaussian rate at first
    order, and so does its difference from the Gaussian step with the same probabilities → 0."""
    process = line()
    z, t = torch.tensor([0.2], dtype=torch.float64), 0.6
    one = torch.full((1,), t, dtype=torch.float64)
    e_hat = predict(z[:, None], one, process).e_hat
    e = process.embed(torch.tensor([[3]]))
    rate = process.rate(z[:, None], e, e_hat, one).item()
    to_rate, to_gaussian = [], []
    for h in (2.0**-k for k in (7, 8, 9, 10)):
        mixture = kl_by_quadrature(process, Mixture(VALUES), 3, z, t - h, t).item()
        gaussian = kl_by_quadrature(process, Posterior(), 3, z, t - h, t).item()
        to_rate.append(mixture / h - rate)
        to_gaussian.append((mixture - gaussian) / h)
    assert abs(to_rate[-1]) < 0.01 * rate
    assert ((orders(to_rate) - 1).abs() < 0.05).all(), orders(to_rate)
    assert ((orders(to_gaussian) - 1).abs() < 0.05).all(), orders(to_gaussian)


def test_the_mixture_kl_of_a_model_is_unbiased():
    """`kl` of the step, by draws, has the integral as its mean."""
    process, n = line(), 50_000
    z = torch.tensor([0.4], dtype=torch.float64)
    truth = kl_by_quadrature(process, Mixture(VALUES), 2, z, 0.3, 0.9).item()
    zs = z.expand(n, 1)
    s, t = (torch.full((n,), v, dtype=torch.float64) for v in (0.3, 0.9))
    q = process.posterior(zs, process.embed(torch.full((n, 1), 2)), s, t)
    p = Mixture(VALUES)(predict(zs, t, process), zs, s, t, process)
    assert_mean(kl(q, p, kl_noise(q, p)), truth, error=0.01 * truth)


def ideal_model(process: GaussianDiffusion, step: ReverseKernel) -> Model:
    """The ideal network of one dimension: the log prior as its output, whatever z_t."""

    def context(z: Tensor, level: Tensor) -> Tensor:
        return PRIOR.log().expand(*z.shape, LEVELS)

    return Model(Formula(context), process, LevelLogits(VALUES), step, LevelDecoder(), shape=(1,))


def expected_bound(process: GaussianDiffusion, step: ReverseKernel, times: TimeGrid) -> float:
    """E over x ~ PRIOR of −ELBO in one dimension, every integral by quadrature."""
    model = ideal_model(process, step)
    total = 0.0
    for x, share in enumerate(PRIOR.tolist()):
        xs = torch.full((len(NODES), 1), x)
        e = process.embed(xs)

        def at(t: float, e: Tensor = e) -> tuple[Tensor, Tensor]:
            ts = torch.full((len(NODES),), t, dtype=torch.float64)
            q = process.marginal(e, ts).base_dist
            return q.loc[:, 0] + q.scale[:, 0] * NODES, ts

        alpha = 1 / (1 + math.exp(process.schedule(torch.ones(1)).item()))
        cost = 0.5 * alpha * VALUES[x].item() ** 2 - 0.5 * alpha - 0.5 * math.log1p(-alpha)
        z, ts = at(times.first)
        cost -= (WEIGHTS * model.likelihood(z[:, None], ts).log_prob(xs)).sum().item()
        for s, t in itertools.pairwise(times.times.tolist()):
            z, _ = at(t)
            cost += (WEIGHTS * kl_by_quadrature(process, step, x, z, s, t)).sum().item()
        total += share * cost
    return total


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_mixture_loses_nothing_in_one_dimension(steps):
    """Equations 1 and 5, section 2: in one dimension the mixture of Bayes' probabilities is
    q's own reverse step, so at any T the bound misses only the prior's mismatch:
    E[−ELBO] = H(x) + KL( Σ_k P(v_k) q(z_T|v_k) ‖ N(0, 1) )."""
    process = line()
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    alpha = 1 / (1 + math.exp(2.0))
    errors = (z[:, None] - math.sqrt(alpha) * VALUES).square() / (2 * (1 - alpha))
    marginal = (PRIOR * (-errors).exp()).sum(1) / math.sqrt(2 * math.pi * (1 - alpha))
    normal = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    mismatch = (marginal * (marginal / normal).log()).sum().item() * (z[1] - z[0]).item()
    entropy = -(PRIOR * PRIOR.log()).sum().item()
    assert mismatch > 1e-3
    got = expected_bound(process, Mixture(VALUES), TimeGrid.uniform(steps))
    assert abs(got - entropy - mismatch) < 1e-10


def test_the_mixture_beats_the_gaussian_step():
    """With the same probabilities, at T = 2, 4, 8 the mixture's bound is the
    tighter one."""
    process = line()
    for steps in (2, 4, 8):
        times = TimeGrid.uniform(steps)
        mixture = expected_bound(process, Mixture(VALUES), times)
        assert mixture < expected_bound(process, Posterior(), times) - 1e-3
        assert mixture < expected_bound(process, Beta(), times) - 1e-3


def test_the_bound_of_a_mixture_model_by_draws():
    """Equation 5: `elbo` with the mixture step is what quadrature says, over x ~ PRIOR."""
    process, n = line(), 60_000
    x = torch.multinomial(PRIOR, n, replacement=True)[:, None]
    times = TimeGrid.uniform(4)
    truth = expected_bound(process, Mixture(VALUES), times)
    with torch.no_grad():
        got = elbo(ideal_model(process, Mixture(VALUES)), x, times)
    assert_mean(-got.elbo, truth, error=0.01)


def test_all_steps_are_one_where_the_model_is_certain():
    """One component with all the probability is the Gaussian step with it."""
    process = line()
    z = torch.randn(2, 3, dtype=torch.float64)
    output = torch.zeros(2, 3, LEVELS, dtype=torch.float64)
    output[..., 1] = 1e6
    prediction = LevelLogits(VALUES)(output, z, T, process)
    assert torch.equal(prediction.e_hat, VALUES[1].expand(2, 3))
    mixture = Mixture(VALUES)(prediction, z, S, T, process)
    gaussian = Posterior()(XPrediction()(prediction.e_hat, z, T, process), z, S, T, process)
    at = gaussian.sample()
    torch.testing.assert_close(mixture.log_prob(at), gaussian.log_prob(at), rtol=1e-13, atol=0)
