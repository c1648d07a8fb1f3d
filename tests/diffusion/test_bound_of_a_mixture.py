r"""The bound on data whose density is known: x ~ Σ_j w_j N(μ_j, τ_j²), one dimension.

The chain rule of KL for the joint q(x, z) against P(x, z), with the ideal denoiser E[x|z_t], gives

    E_x[ log p_data(x) − ELBO(x) ] = KL( q(z_T) ‖ N(0, 1) )                        prior
                                   + E KL( q(x|z_1) ‖ P(x|z_1) )                   decoder
                                   + Σ_t E KL( q(z_{t-1}|z_t) ‖ P(z_{t-1}|z_t) )   reverse steps

where the last is 0 in continuous time. A denoiser off by δ adds ½ γ' SNR E δ² to the rate, since
E[x|z_t] is the mean of x given z_t.
"""

import itertools
import math

import pytest
import torch
from support.closed_forms import Formula, legendre_nodes, normal_nodes
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import GaussianDensity
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import XPrediction
from nelbo.diffusion.reverse import Beta, Posterior, ReverseKernel
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid, elbo
from nelbo.testing import assert_mean

W = torch.tensor([0.3, 0.7], dtype=torch.float64)
MU = torch.tensor([-1.2, 0.6], dtype=torch.float64)
TAU = torch.tensor([0.3, 0.5], dtype=torch.float64)
GAMMA = (-3.0, 1.5)
SPREAD = 0.2
NODES_T = 24
NODES, WEIGHTS = normal_nodes(141, 8.0)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(22):
        yield


def log_data(x: Tensor) -> Tensor:
    """log p_data(x)."""
    each = W.log() - 0.5 * ((x[..., None] - MU) / TAU).square() - (TAU * 2.5066282746310002).log()
    return each.logsumexp(-1)


def shares(z: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P(j|z_t), and mean and variance of x | z_t, j, last dimension j; Bayes' rule."""
    variance = alpha[..., None] * TAU.square() + 1 - alpha[..., None]
    error = z[..., None] - alpha[..., None].sqrt() * MU
    share = (W.log() - 0.5 * error.square() / variance - 0.5 * variance.log()).softmax(-1)
    mean = MU + alpha[..., None].sqrt() * TAU.square() / variance * error
    return share, mean, TAU.square() * (1 - alpha[..., None]) / variance


def ideal(z: Tensor, gamma: Tensor) -> Tensor:
    """E[x|z_t]."""
    share, mean, _ = shares(z, torch.sigmoid(-gamma)[:, None].expand_as(z))
    return (share * mean).sum(-1)


def wrong_by(z: Tensor, gamma: Tensor) -> Tensor:
    """δ, a small error of the denoiser."""
    return 0.1 * (2 * z + gamma[:, None]).sin()


def wrong(z: Tensor, gamma: Tensor) -> Tensor:
    return ideal(z, gamma) + wrong_by(z, gamma)


def model(denoiser, step: ReverseKernel | None = None) -> Model:
    return Model(
        Formula(denoiser),
        GaussianDiffusion(Linear(*GAMMA), Affine()),
        XPrediction(),
        step or Posterior(),
        GaussianDensity(Affine(), SPREAD).requires_grad_(False),
        shape=(1,),
    )


def data_nodes() -> tuple[Tensor, Tensor]:
    """x and weights: the expectation over the data."""
    x = MU[:, None] + TAU[:, None] * NODES
    return x.flatten(), (W[:, None] * WEIGHTS).flatten()


def expected_cost(m: Model, times: TimeDiscretization) -> tuple[float, float, float]:
    """E over the data of the three terms: distributions of the library, quadrature in x, z, t."""
    x, of_x = data_nodes()
    x, weights = x[:, None].expand(-1, len(NODES)).reshape(-1, 1), torch.outer(of_x, WEIGHTS)
    e, noise = m.embed(x), NODES.repeat(len(of_x))[:, None]

    def at(t: float) -> tuple[Tensor, Tensor]:
        ts = torch.full((len(x),), t, dtype=torch.float64)
        q = m.process.marginal(e, ts).base_dist
        return q.loc + q.scale * noise, ts

    def mean(v: Tensor) -> float:
        return (weights.flatten() * v).sum().item()

    with torch.no_grad():
        _, ts = at(1.0)
        prior = mean(kl_divergence(m.process.marginal(e, ts), m.process.prior((1,), ts)))
        z, ts = at(times.first)
        reconstruction = mean(-m.likelihood(z, ts).log_prob(x))
        diffusion = 0.0
        if isinstance(times, TimeGrid):
            for s, t in itertools.pairwise(times.times.tolist()):
                z, ts = at(t)
                before = torch.full_like(ts, s)
                q = m.process.posterior(z, e, before, ts)
                diffusion += mean(kl_divergence(q, m.reverse(z, before, ts)))
        else:
            for t, weight in zip(*legendre_nodes(times.first, 1.0, NODES_T), strict=True):
                z, ts = at(t.item())
                rate = m.process.rate(z, e, m.predict(z, ts).e_hat, ts)
                diffusion += weight.item() * mean(rate)
    return prior, reconstruction, diffusion


def line(low: float = -14.0, high: float = 14.0, n: int = 5601) -> tuple[Tensor, float]:
    x = torch.linspace(low, high, n, dtype=torch.float64)
    return x, (x[1] - x[0]).item()


def alpha_at(t: float) -> Tensor:
    gamma = GAMMA[0] + (GAMMA[1] - GAMMA[0]) * t
    return torch.tensor(1 / (1 + math.exp(gamma)), dtype=torch.float64)


def log_marginal(z: Tensor, alpha: Tensor) -> Tensor:
    """log q(z_t), the data's density after noise."""
    variance = alpha * TAU.square() + 1 - alpha
    error = (z[..., None] - alpha.sqrt() * MU).square()
    return (W.log() - 0.5 * error / variance - 0.5 * (2 * math.pi * variance).log()).logsumexp(-1)


def gap_at_the_ends(first: float = 0.0) -> tuple[float, float]:
    """KL( q(z_T) ‖ N(0,1) ) and E KL( q(x|z_1) ‖ N(E[x|z_1], spread²) ), by other sums."""
    z, dz = line()
    log_q = log_marginal(z, alpha_at(1.0))
    log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    prior = (log_q.exp() * (log_q - log_normal)).sum().item() * dz
    # E KL(q(x|z_1) ‖ P) = E[−log P(x|z_1)] − H(x|z_1), H(x|z_1) = H(x) + H(z_1|x) − H(z_1)
    alpha = alpha_at(first)
    log_q = log_marginal(z, alpha)
    share, mean, variance = shares(z, alpha.expand_as(z))
    second = (share * (variance + mean.square())).sum(-1) - (share * mean).sum(-1).square()
    cost = 0.5 * (log_q.exp() * second).sum().item() * dz / SPREAD**2
    cost += 0.5 * math.log(2 * math.pi * SPREAD**2)
    log_p = log_data(z)
    entropy_x = -(log_p.exp() * log_p).sum().item() * dz
    entropy_z = -(log_q.exp() * log_q).sum().item() * dz
    entropy_noise = 0.5 * math.log(2 * math.pi * math.e * (1 - alpha.item()))
    return prior, cost - (entropy_x + entropy_noise - entropy_z)


def evidence() -> float:
    """E log p_data(x)."""
    z, dz = line()
    log_p = log_data(z)
    return (log_p.exp() * log_p).sum().item() * dz


def test_the_ideal_bound_misses_only_its_ends():
    """Equations 1, 5 and 8: with E[x|z_t] the continuous bound is E log p_data(x) minus the
    prior's and the decoder's mismatch, both computed apart."""
    prior, decoder = gap_at_the_ends()
    assert prior > 1e-4 and decoder > 1e-2
    bound = -sum(expected_cost(model(ideal), ContinuousTime()))
    assert abs(evidence() - bound - prior - decoder) < 1e-9


def test_a_wrong_denoiser_pays_for_its_error():
    """Equation 8: an error δ costs ∫ ½ γ' SNR E δ² dt in the diffusion term, and
    E δ²/(2 spread²) in the decoder, no more and no less; the bound stays below the truth."""
    z, dz = line()
    ends = torch.zeros((), dtype=torch.float64)
    extra = 0.0
    for t, weight in zip(*legendre_nodes(0.0, 1.0, NODES_T), strict=True):
        alpha, gamma = alpha_at(t.item()), GAMMA[0] + (GAMMA[1] - GAMMA[0]) * t
        error = wrong_by(z[:, None], gamma.expand(len(z)))[:, 0].square()
        mean = (log_marginal(z, alpha).exp() * error).sum() * dz
        extra += (weight * 0.5 * (GAMMA[1] - GAMMA[0]) * (-gamma).exp() * mean).item()
    error = wrong_by(z[:, None], torch.full_like(z, GAMMA[0]))[:, 0].square()
    ends = (log_marginal(z, alpha_at(0.0)).exp() * error).sum().item() * dz / (2 * SPREAD**2)
    right, off = (expected_cost(model(f), ContinuousTime()) for f in (ideal, wrong))
    assert abs(off[2] - right[2] - extra) < 1e-9
    assert abs(off[1] - right[1] - ends) < 1e-9
    assert extra > 1e-3
    assert -sum(off) < -sum(right) < evidence()


@pytest.mark.parametrize("step", [Posterior(), Beta()], ids=["beta_tilde", "beta"])
def test_grids_stay_below_and_approach(step):
    """Equations 5, 7 and 8: on grids between the same ends the bound is below E log p_data,
    rises with T, and stays below the continuous one."""
    limit = -sum(expected_cost(model(ideal), ContinuousTime(0.1)))
    prior, decoder = gap_at_the_ends(0.1)
    assert abs(evidence() - limit - prior - decoder) < 1e-9
    bounds = [
        -sum(
            expected_cost(
                model(ideal, step), TimeGrid(torch.linspace(0.1, 1, n + 1, dtype=torch.float64))
            )
        )
        for n in (1, 2, 4, 8, 16)
    ]
    assert all(a < b for a, b in itertools.pairwise([*bounds, limit, evidence()]))


@pytest.mark.parametrize("denoiser", [ideal, wrong])
@pytest.mark.parametrize(
    "times", [ContinuousTime(), TimeGrid.uniform(8)], ids=["continuum", "grid"]
)
def test_the_estimate_is_the_bound(denoiser, times):
    """Equations 5 and 8: `elbo` by draws of data, times and latents, within 4 standard
    errors of the quadrature, and with them below E log p_data(x)."""
    n = 50_000
    j = torch.multinomial(W, n, replacement=True)
    x = (MU[j] + TAU[j] * torch.randn(n, dtype=torch.float64))[:, None]
    m = model(denoiser)
    with torch.no_grad():
        got = elbo(m, x, times)
    truth = expected_cost(m, times)
    for draws, term in zip(got, truth, strict=True):
        assert_mean(draws, term, error=0.02)
    miss = log_data(x[:, 0]) - got.elbo
    assert_mean(miss, evidence() + sum(truth), error=0.02)
    assert evidence() + sum(truth) > 0.01
