"""Estimates of the bound: any law of u, any number of draws, one mean."""

import itertools
import math

import pytest
import torch
from support.closed_forms import Formula
from torch import Tensor

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import GaussianDensity
from nelbo.diffusion.elbo import Bound, diffusion_term
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.parametrization import XPrediction
from nelbo.diffusion.reverse import Posterior, ReverseKernel
from nelbo.diffusion.schedules import Cosine, Linear, Schedule
from nelbo.diffusion.times import ContinuousTime, TimeGrid, elbo, iid, stratified
from nelbo.testing import assert_mean, orders

SHAPE = (3, 5, 7)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(18):
        yield


def gaussian_model(
    x_hat,
    shape: tuple[int, ...] = SHAPE,
    schedule: Schedule | None = None,
    step: ReverseKernel | None = None,
) -> Model:
    """x̂ a formula of z_t and γ, with σ² = β̃."""
    return Model(
        Formula(x_hat),
        GaussianDiffusion(schedule or Linear(-4.0, 2.0), Affine()),
        XPrediction(),
        step or Posterior(),
        GaussianDensity(Affine()),
        shape=shape,
    )


def blind(schedule: Schedule | None = None, shape: tuple[int, ...] = SHAPE) -> Model:
    """x̂ = 0 whatever z_t: each diffusion term is ½ (SNR_s − SNR_t) ‖x‖², without any noise."""
    return gaussian_model(lambda z, gamma: 0 * z, shape, schedule)


def square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


BATCH = 5


def batches(law, n: int, draws: int = 1) -> Tensor:
    """u of n/BATCH independent batches: stratified draws within a batch depend on each other."""
    return torch.cat([law(BATCH, draws) for _ in range(n // BATCH)])


GRIDS = pytest.mark.parametrize(
    "times",
    [TimeGrid.uniform(4), TimeGrid([0.1, 0.3, 1.0]), TimeGrid.uniform(50)],
    ids=["4", "uneven", "50"],
)


@GRIDS
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_full_sum_over_a_grid_is_the_sum_of_its_terms(times, batch):
    """Equation 5: by default u visits each of the T-1 terms of each example once, so
    their sum is exact in t; here ½ (SNR(t_1) − SNR(1)) ‖x‖², telescoped."""
    model, x = blind(), torch.randn(batch, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        got = elbo(model, x, times).diffusion
        terms = [
            diffusion_term(model, x, s.expand(batch), t.expand(batch)).cost
            for s, t in itertools.pairwise(times.times)
        ]
    torch.testing.assert_close(got, torch.stack(terms).sum(0), rtol=1e-12, atol=0)
    snr = math.exp(4 - 6 * times.first) - math.exp(-2.0)
    torch.testing.assert_close(got, 0.5 * snr * square(x), rtol=1e-11, atol=0)


@GRIDS
@pytest.mark.parametrize("law", [iid, stratified])
@pytest.mark.parametrize("draws", [1, 3])
def test_single_terms_are_unbiased(times, law, draws):
    """Equation 5: one draw of t times T-1, or the mean of n draws, has the sum as its mean,
    for each law of u."""
    model, n = blind(shape=(2,)), 20_000
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64).expand(n, 2)
    truth = 0.5 * (math.exp(4 - 6 * times.first) - math.exp(-2.0)) * square(x)[0].item()
    with torch.no_grad():
        got = elbo(model, x, times, u=batches(law, n, draws)).diffusion
    assert_mean(got.reshape(-1, BATCH).mean(1), truth, error=0.05 * truth)


@pytest.mark.parametrize("schedule", [Linear(-4.0, 2.0), Cosine(-4.0, 2.0)], ids=["lin", "cos"])
@pytest.mark.parametrize("law", [iid, stratified])
def test_the_continuum_is_unbiased(schedule, law):
    """Equation 8: ∫ ½ γ' SNR ‖x‖² dt = ½ (SNR(start) − SNR(1)) ‖x‖² by draws of t, for any
    schedule with the same ends; also from a later start."""
    model, n = blind(schedule, shape=(2,)), 20_000
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64).expand(n, 2)
    for start in (0.0, 0.2):
        first = (-schedule(torch.tensor([start], dtype=torch.float64))).exp().item()
        truth = 0.5 * (first - math.exp(-2.0)) * square(x)[0].item()
        with torch.no_grad():
            got = elbo(model, x, ContinuousTime(start), u=batches(law, n)).diffusion
        assert_mean(got.reshape(-1, BATCH).mean(1), truth, error=0.02 * truth)


def test_stratified_times_have_less_variance():
    """The mean over a batch with stratified t scatters by far less than with
    independent t."""
    model = blind(shape=(2,))
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64).expand(16, 2)
    with torch.no_grad():
        scatter = {
            law: torch.stack(
                [elbo(model, x, ContinuousTime(), u=law(16)).diffusion.mean() for _ in range(200)]
            ).var()
            for law in (iid, stratified)
        }
    assert scatter[stratified] < 0.05 * scatter[iid]


@pytest.mark.parametrize(("examples", "draws"), [(1, 1), (5, 1), (3, 7), (49, 1), (1, 98)])
def test_stratified_visits_each_stratum_once(examples, draws):
    """U as (i + u)/n: n draws, one in each of n equal strata, at any n, and
    each example one in each of its `draws` strata."""
    u = stratified(examples, draws)
    strata = (u.flatten().sort().values * examples * draws).floor()
    assert torch.equal(strata, torch.arange(examples * draws, dtype=torch.float64))
    each = (u.sort(1).values * draws).floor()
    assert torch.equal(each, torch.arange(draws, dtype=torch.float64).expand(examples, draws))
    assert ((u >= 0) & (u < 1)).all()


def test_stratified_ties_no_example_to_a_time():
    """Each example of a batch is uniform over [0, 1), fresh at each call."""
    u = torch.stack([stratified(4)[:, 0] for _ in range(8_000)])
    assert_mean(u, 0.5, error=0.004)
    assert_mean(u.square(), 1 / 3, error=0.004)
    tenths = torch.stack([((u * 10).floor() == k).double() for k in range(10)], -1)
    assert_mean(tenths, 0.1, error=0.004)
    assert_mean(iid(8_000, 4).square(), 1 / 3, error=0.004)


def test_one_step_has_no_diffusion():
    """Equation 5 at T = 1: prior and reconstruction at the one time, nothing between."""
    model, x = blind(), torch.randn(2, *SHAPE, dtype=torch.float64)
    for times in (TimeGrid.uniform(1), TimeGrid([1.0])):
        with torch.no_grad():
            got = elbo(model, x, times)
        assert torch.equal(got.diffusion, torch.zeros(2, dtype=torch.float64))
        e = square(x)
        truth = 0.5 * e / 0.01 + 105 * math.log(0.1 * math.sqrt(2 * math.pi))
        torch.testing.assert_close(got.reconstruction, truth, rtol=1e-12, atol=0)
        alpha = 1 / (1 + math.exp(2.0))
        prior = 0.5 * (alpha * e - 105 * alpha - 105 * math.log1p(-alpha))
        torch.testing.assert_close(got.prior, prior, rtol=1e-12, atol=0)


def test_the_elbo_is_minus_the_sum():
    """Equation 5."""
    bound = Bound(*torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]))
    assert bound.elbo.tolist() == [-111.0, -222.0]


@pytest.mark.parametrize(
    "times", [TimeGrid.uniform(4), ContinuousTime()], ids=["grid", "continuum"]
)
@pytest.mark.parametrize("shape", [SHAPE, (3,)], ids=str)
def test_an_example_does_not_see_its_batch(times, shape):
    """Each of the three terms is per example: with the noise-free model, a batch is its parts."""
    model, x = blind(shape=shape), torch.randn(2, *shape, dtype=torch.float64)
    u = iid(2, 3)
    with torch.no_grad():
        together = elbo(model, x, times, u=u)
        alone = [elbo(model, x[i : i + 1], times, u=u[i : i + 1]) for i in range(2)]
    for name in ("prior", "diffusion"):
        parts = torch.cat([getattr(b, name) for b in alone])
        torch.testing.assert_close(getattr(together, name), parts, rtol=1e-13, atol=0)


# ---- bounds on grids against the continuous one


def shrink(variance: float):
    """E[x|z_t] for x ~ N(0, variance)."""

    def x_hat(z: Tensor, gamma: Tensor) -> Tensor:
        alpha = torch.sigmoid(-gamma)
        share = alpha.sqrt() * variance / (alpha * variance + 1 - alpha)
        return share[:, None] * z

    return x_hat


def mmse(variance: float, t: Tensor) -> Tensor:
    """E (x − E[x|z_t])² = variance (1-α)/(α variance + 1 - α)."""
    alpha = 1 / (1 + (-4 + 6 * t).exp())
    return variance * (1 - alpha) / (alpha * variance + 1 - alpha)


def test_finer_grids_approach_the_continuum_from_above():
    """Equations 7 and 8, for an ideal denoiser: each halving of the steps between the same
    ends tightens the bound; it stays above the continuous one, ½ log((v SNR_0 + 1)/(v SNR_1 + 1)),
    and closes in at first order. Library KLs, expectations over x and z exact."""
    v = 2.5
    model = gaussian_model(shrink(v), shape=(1,))
    low, high = math.exp(4 - 6 * 0.1), math.exp(-2.0)
    limit = 0.5 * math.log((v * low + 1) / (v * high + 1))
    gaps = []
    for n in (1, 2, 4, 8, 16, 32, 64, 128):
        times = torch.linspace(0.1, 1.0, n + 1, dtype=torch.float64)
        s, t = times[:-1], times[1:]
        # x = √v a, z = √α x + √(1-α) b at (a, b) = (±√2, 0), (0, ±√2): exact for quadratics
        total = 0.0
        for a, b in ((2**0.5, 0.0), (-(2**0.5), 0.0), (0.0, 2**0.5), (0.0, -(2**0.5))):
            x = torch.full((n, 1), a * v**0.5, dtype=torch.float64)
            q = model.process.marginal(x, t).base_dist
            z = q.loc + q.scale * b
            posterior, step = model.process.posterior(z, x, s, t), model.reverse(z, s, t)
            total += torch.distributions.kl_divergence(posterior, step).sum().item() / 4
        truth = 0.5 * ((4 - 6 * s).exp() - (4 - 6 * t).exp()) @ mmse(v, t)
        assert abs(total - truth.item()) < 1e-10
        gaps.append(total - limit)
    assert all(a > b > 0 for a, b in itertools.pairwise(gaps))
    assert ((orders(gaps)[-2:] - 1).abs() < 0.1).all(), orders(gaps)


@pytest.mark.parametrize(
    "times", [TimeGrid.uniform(8), ContinuousTime(), ContinuousTime(0.3)], ids=["grid", "0", "0.3"]
)
def test_draws_of_an_ideal_denoiser(times):
    """Equations 5 and 8: `elbo` by draws of x, t and z, on a case known in closed form."""
    v, n = 2.5, 60_000
    model = gaussian_model(shrink(v), shape=(1,))
    x = math.sqrt(v) * torch.randn(n, 1, dtype=torch.float64)
    if isinstance(times, TimeGrid):
        s, t = times.times[:-1], times.times[1:]
        truth = (0.5 * ((4 - 6 * s).exp() - (4 - 6 * t).exp()) @ mmse(v, t)).item()
    else:
        first, last = math.exp(4 - 6 * times.first), math.exp(-2.0)
        truth = 0.5 * math.log((v * first + 1) / (v * last + 1))
    with torch.no_grad():
        got = elbo(model, x, times, u=stratified(n)).diffusion
    assert_mean(got, truth, error=0.03 * truth)
    variance = mmse(v, torch.tensor([times.first], dtype=torch.float64)).item()
    with torch.no_grad():
        reconstruction = elbo(model, x, times, u=stratified(n)).reconstruction
    decoded = 0.5 * variance / 0.01 + math.log(0.1 * math.sqrt(2 * math.pi))
    assert_mean(reconstruction, decoded, error=0.03 * abs(decoded))


def test_measuring_is_float64_and_leaves_no_trace():
    """Inside, evaluation mode and float64 without gradients; after, as before,
    also after an error."""
    model = blind()
    model.train()
    model.dtype = torch.float32
    with measuring(model):
        assert not model.training and not torch.is_grad_enabled()
        x = torch.randn(2, *SHAPE, dtype=torch.float64)
        assert elbo(model, x, TimeGrid.uniform(3)).elbo.dtype == torch.float64
    assert model.training and model.dtype == torch.float32
    with pytest.raises(ZeroDivisionError), measuring(model):
        raise ZeroDivisionError
    assert model.training and model.dtype == torch.float32 and torch.is_grad_enabled()


def test_the_model_refuses_what_does_not_fit():
    """Examples of another shape, and a network with another number of outputs, by name."""
    model = blind(shape=(3,))
    with pytest.raises(ValueError, match=r"examples of shape \(3,\); got \(4,\)"):
        elbo(model, torch.zeros(2, 4, dtype=torch.float64))
    wrong = gaussian_model(lambda z, gamma: z[:, :2], shape=(3,))
    with pytest.raises(ValueError, match=r"must give \(2, 3\) for XPrediction; got \(2, 2\)"):
        elbo(wrong, torch.zeros(2, 3, dtype=torch.float64))
