"""log P(x) = ELBO + KL[ q(z|x) ‖ P(z|x) ] on a linear-Gaussian model: all three are known."""

import numpy as np
import pytest
import torch
from support.closed_forms import (
    Formula,
    chain,
    condition,
    normal_kl,
    normal_log_prob,
    sigma_points,
)
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import GaussianDensity
from nelbo.diffusion.elbo import diffusion_term, prior_term, reconstruction_term
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import Mean
from nelbo.diffusion.reverse import Beta, Posterior, ReverseKernel
from nelbo.diffusion.schedules import Schedule
from nelbo.diffusion.times import TimeGrid, elbo
from nelbo.testing import assert_mean

BETAS = [0.3, 0.1, 0.6, 0.45]
T, D = len(BETAS), 3
EYE = torch.eye(D, dtype=torch.float64)
ZERO = torch.zeros(D, dtype=torch.float64)
SHIFT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
SCALE = torch.tensor([2.0, 0.7, 1.3], dtype=torch.float64)
SPREAD = 0.4


@pytest.fixture(autouse=True)
def _seed():
    with seeded(20):
        yield


def block(i: int) -> slice:
    """The place of the i-th vector of a chain."""
    return slice(i * D, (i + 1) * D)


class LinearGaussian:
    """P(z_{t-1}|z_t) = N(A_t z_t + c_t, σ_t²), P(x|z_1) = N(shift + scale (A_1 z_1 + c_1), ...).

    `matrix` and `offset` hold A_1..A_T and c_1..c_T; σ_t² is β_t or β̃_t from the betas alone.
    """

    def __init__(
        self,
        step: ReverseKernel,
        matrix: Tensor,
        offset: Tensor,
        betas: list[float] = BETAS,
        shift: Tensor = SHIFT,
        scale: Tensor = SCALE,
        spread: float = SPREAD,
    ) -> None:
        self.matrix, self.offset, self.betas = matrix, offset, betas
        self.shift, self.scale, self.spread = shift, scale, spread
        alphas = np.cumprod(1 - np.array(betas))
        before = np.r_[1.0, alphas[:-1]]
        tilde = np.array(betas) * (1 - before) / (1 - alphas)
        self.alphas = alphas
        self.variance = tilde if isinstance(step, Posterior) else np.array(betas)

        schedule = Schedule.from_betas(betas)
        gammas = torch.tensor(np.log((1 - alphas) / alphas))

        def f(z: Tensor, level: Tensor) -> Tensor:
            i = (level[:, None] - gammas).abs().argmin(1)
            return torch.einsum("bij,bj->bi", matrix[i], z) + offset[i]

        affine = Affine(shift, scale)
        self.model = Model(
            Formula(f),
            GaussianDiffusion(schedule, affine),
            Mean(len(betas)),
            step,
            GaussianDensity(affine, spread),
            shape=(D,),
        )
        self.times = TimeGrid.uniform(len(betas))

    def joint_p(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (z_T, ..., z_1, x) under P."""
        steps = [
            (self.matrix[i], self.offset[i], self.variance[i] * EYE)
            for i in range(len(self.betas) - 1, 0, -1)
        ]
        units = torch.diag(self.scale)
        last = (
            units @ self.matrix[0],
            units @ self.offset[0] + self.shift,
            torch.diag(self.scale * self.spread).square(),
        )
        return chain(ZERO, EYE, [*steps, last])

    def encoder(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (z_1, ..., z_T) under q given x, by the chain itself."""
        e = (x - self.shift) / self.scale
        keep = [np.sqrt(1 - b) for b in self.betas]
        steps = [(keep[i] * EYE, ZERO, b * EYE) for i, b in enumerate(self.betas) if i > 0]
        return chain(keep[0] * e, self.betas[0] * EYE, steps)

    def backwards(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same of (z_T, ..., z_1)."""
        mean, cov = self.encoder(x)
        order = torch.arange(len(mean)).reshape(-1, D).flip(0).flatten()
        return mean[order], cov[order][:, order]

    def log_evidence(self, x: Tensor) -> Tensor:
        mean, cov = self.joint_p()
        return normal_log_prob(x, mean[-D:], cov[-D:, -D:])

    def elbo(self, x: Tensor) -> Tensor:
        """E_q log P(x, z) − E_q log q(z|x), from the two joint Gaussians."""
        mean_p, cov_p = self.joint_p()
        mean_q, cov_q = self.backwards(x)
        wide = torch.zeros_like(cov_p)
        wide[:-D, :-D] = cov_q
        cross = normal_log_prob(torch.cat([mean_q, x]), mean_p, cov_p)
        cross = cross - 0.5 * torch.linalg.solve(cov_p, wide).trace()
        entropy = 0.5 * (torch.logdet(cov_q) + len(mean_q) * (1 + np.log(2 * np.pi)))
        return cross + entropy

    def gap(self, x: Tensor) -> Tensor:
        """KL[ q(z|x) ‖ P(z|x) ], with P(z|x) by Bayes' rule on the joint Gaussian."""
        mean_p, cov_p = self.joint_p()
        n = len(mean_p) - D
        gain, offset, cov = condition(mean_p, cov_p, slice(n, n + D), slice(0, n))
        return normal_kl(*self.backwards(x), gain @ x + offset, cov)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Prior, reconstruction and each diffusion term (t = 2..T), in closed form."""
        mean, cov = self.encoder(x)
        last = block(len(self.betas) - 1)
        prior = normal_kl(mean[last], cov[last, last], ZERO, EYE)

        units = torch.diag(self.scale)
        error = x - self.shift - units @ (self.matrix[0] @ mean[:D] + self.offset[0])
        of_z = units @ self.matrix[0]
        variance = (self.scale * self.spread).square()
        square = error.square() + (of_z @ cov[:D, :D] @ of_z.T).diag()
        reconstruction = 0.5 * (square / variance + (2 * np.pi * variance).log()).sum()

        diffusion = []
        for i in range(1, len(self.betas)):
            s, t, var = block(i - 1), block(i), self.variance[i]
            gain, offset, rest = condition(mean, cov, t, s)
            slope = gain - self.matrix[i]
            error = slope @ mean[t] + offset - self.offset[i]
            square = error @ error + (slope @ cov[t, t] @ slope.T).trace()
            logs = D * np.log(var) - torch.logdet(rest)
            diffusion.append(0.5 * (rest.trace() / var - D + logs + square / var))
        return prior, reconstruction, diffusion


STEPS = pytest.mark.parametrize("step", [Beta(), Posterior()], ids=["beta", "beta_tilde"])
POINTS = torch.tensor([[0.0, 0.0, 0.0], [1.3, -2.0, 0.4], [-5.0, 3.0, 9.0]], dtype=torch.float64)


def arbitrary(step: ReverseKernel) -> LinearGaussian:
    """A model of which nothing is special."""
    matrix = 0.7 * EYE + 0.3 * torch.randn(T, D, D, dtype=torch.float64)
    return LinearGaussian(step, matrix, torch.randn(T, D, dtype=torch.float64))


@STEPS
@pytest.mark.parametrize("x", POINTS, ids=["zero", "near", "far"])
def test_evidence_is_elbo_plus_kl(step, x):
    """Equations 1 and 5: log P(x) = ELBO + KL, and ELBO = minus the three terms.

    log P(x), the ELBO as one integral, the KL to the true posterior and the terms are four
    separate computations from the joint Gaussians of P and of q.
    """
    case = arbitrary(step)
    prior, reconstruction, diffusion = case.terms(x)
    bound = case.elbo(x)
    assert case.gap(x) > 0.1
    torch.testing.assert_close(case.log_evidence(x), bound + case.gap(x), rtol=1e-11, atol=1e-9)
    total = prior + reconstruction + sum(diffusion)
    torch.testing.assert_close(-total, bound, rtol=1e-11, atol=1e-9)


@STEPS
@pytest.mark.parametrize("x", POINTS, ids=["zero", "near", "far"])
def test_terms_are_the_closed_ones_exactly(step, x):
    """Equations 5-7: each term of the library, its expectation over z taken exactly.

    For Gaussians each term is quadratic in z, and sigma points integrate a quadratic exactly.
    """
    case = arbitrary(step)
    model, times = case.model, case.times.times
    prior, reconstruction, diffusion = case.terms(x)
    mean, cov = case.encoder(x)

    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(prior_term(model, x[None], one)[0], prior, rtol=0, atol=1e-9)

    z = sigma_points(mean[block(0)], cov[block(0), block(0)])
    first = times[:1].expand(len(z))
    got = -model.likelihood(z, first).log_prob(x.expand_as(z)).mean()
    torch.testing.assert_close(got, reconstruction, rtol=1e-12, atol=1e-9)

    for i, truth in enumerate(diffusion, start=1):
        z = sigma_points(mean[block(i)], cov[block(i), block(i)])
        e = model.embed(x.expand_as(z))
        s, t = times[i - 1].expand(len(z)), times[i].expand(len(z))
        q, p = model.process.posterior(z, e, s, t), model.reverse(z, s, t)
        torch.testing.assert_close(kl_divergence(q, p).mean(), truth, rtol=1e-12, atol=1e-9)


@STEPS
def test_terms_by_draws_are_the_closed_ones(step):
    """Equation 5: `elbo.py` itself, 2e5 draws of each term, each t separately."""
    case = arbitrary(step)
    x = POINTS[1]
    prior, reconstruction, diffusion = case.terms(x)
    n = 200_000
    xs, ones = x.expand(n, D), torch.ones(n, dtype=torch.float64)
    with torch.no_grad():
        exact = prior_term(case.model, xs[:5], ones[:5])
        torch.testing.assert_close(exact, prior.expand(5), rtol=0, atol=1e-9)
        draws = reconstruction_term(case.model, xs, ones * case.times.first).cost
        assert_mean(draws, reconstruction, error=0.01 * reconstruction)
        for i, truth in enumerate(diffusion, start=1):
            s, t = case.times.times[i - 1], case.times.times[i]
            draws = diffusion_term(case.model, xs, ones * s, ones * t).cost
            assert_mean(draws, truth, error=0.01 * truth)


@STEPS
def test_elbo_is_below_the_evidence_by_the_kl(step):
    """Equation 1: the library's ELBO plus the closed KL is the closed log P(x)."""
    case = arbitrary(step)
    x = POINTS[1]
    n = 100_000
    with torch.no_grad():
        bound = elbo(case.model, x.expand(n, D), case.times)
    assert_mean(bound.elbo, case.log_evidence(x) - case.gap(x), error=0.01 * case.gap(x))


@pytest.mark.parametrize("betas", [BETAS, [0.4]], ids=["T=4", "T=1"])
def test_gap_is_zero_where_the_posterior_is_q(betas):
    """Equation 1: for x ~ N(0, 1) in units of e, P(z_{t-1}|z_t) = q(z_{t-1}|z_t) =
    N(√(1-β_t) z_t, β_t), so P(z|x) = q(z|x) and the ELBO is log P(x), for every x."""
    matrix = torch.stack([np.sqrt(1 - b) * EYE for b in betas])
    case = LinearGaussian(
        Beta(),
        matrix,
        torch.zeros(len(betas), D, dtype=torch.float64),
        betas=betas,
        spread=betas[0] ** 0.5,
    )
    model, times = case.model, case.times.times
    for x in POINTS:
        truth = normal_log_prob(x, SHIFT, torch.diag(SCALE.square()))
        assert case.gap(x).abs() < 1e-9
        mean, cov = case.encoder(x)
        cost = prior_term(model, x[None], torch.ones(1, dtype=torch.float64))[0]
        z = sigma_points(mean[block(0)], cov[block(0), block(0)])
        first = times[:1].expand(len(z))
        cost = cost - model.likelihood(z, first).log_prob(x.expand_as(z)).mean()
        for i in range(1, len(betas)):
            z = sigma_points(mean[block(i)], cov[block(i), block(i)])
            s, t = times[i - 1].expand(len(z)), times[i].expand(len(z))
            q = model.process.posterior(z, model.embed(x.expand_as(z)), s, t)
            cost = cost + kl_divergence(q, model.reverse(z, s, t)).mean()
        torch.testing.assert_close(-cost, truth, rtol=1e-12, atol=1e-9)


def test_density_is_in_the_units_of_the_data():
    """Transforms own their log-determinant: the bound of x/1000 is the bound
    of x plus D log 1000, for the same model in other units."""
    matrix = 0.7 * EYE + 0.3 * torch.randn(T, D, D, dtype=torch.float64)
    offset = torch.randn(T, D, dtype=torch.float64)
    one = LinearGaussian(Beta(), matrix, offset)
    other = LinearGaussian(Beta(), matrix, offset, shift=SHIFT / 1000, scale=SCALE / 1000)
    x = POINTS.double()
    with seeded(1):
        a = elbo(one.model, x, one.times).elbo
    with seeded(1):
        b = elbo(other.model, x / 1000, other.times).elbo
    torch.testing.assert_close(b, a + D * np.log(1000), rtol=0, atol=1e-9)
