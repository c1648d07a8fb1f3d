"""The probability flow: exact trace = Hutchinson in expectation = closed form; there and back."""

import pytest
import torch
from diffusion.test_bound_of_a_mixture import MU, TAU, W, ideal
from support.closed_forms import Formula, normal_log_prob
from torch import Tensor, nn
from torch.distributions import Normal

from nelbo._utils.numerics import seeded
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Categorical, GaussianDensity, LevelDecoder
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Calls, Model, counting
from nelbo.diffusion.parametrization import (
    LevelLogits,
    Mean,
    SymbolLogits,
    WithVariance,
    XPrediction,
)
from nelbo.diffusion.reverse import Mixture, Posterior
from nelbo.diffusion.schedules import (
    Cosine,
    LearnedMonotone,
    Linear,
    PowerAlpha,
    Schedule,
    time_of,
)
from nelbo.diffusion.times import ContinuousTime
from nelbo.evaluation.dequantization import Encoder, TruncatedNormal, Uniform
from nelbo.evaluation.probability_flow import (
    carry,
    drift_and_trace,
    evaluate_flow,
    is_exact,
    log_density,
    random_probes,
    unit_probes,
)
from nelbo.evaluation.replicates import BLOCK
from nelbo.testing import assert_mean, orders

ENDS = (-4.0, 2.5)
SHAPE = (3, 1, 2)
D = 6


@pytest.fixture(autouse=True)
def _seed():
    with seeded(32):
        yield


class NormalData:
    """e ~ N(μ, Σ), the ideal denoiser, and the law of its flow: along the eigenvectors of Σ a
    latent keeps its distance from the mean in units of √(α Σ_i + 1 - α)."""

    def __init__(self) -> None:
        root = torch.randn(D, D, dtype=torch.float64) / D**0.5
        self.cov, self.mean = root @ root.T + 0.1 * torch.eye(D), torch.randn(D).double()

    def marginal(self, gamma: float) -> tuple[Tensor, Tensor]:
        alpha = torch.sigmoid(-torch.tensor(gamma, dtype=torch.float64))
        eye = torch.eye(D, dtype=torch.float64)
        return alpha.sqrt() * self.mean, alpha * self.cov + (1 - alpha) * eye

    def flow(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of z_1 where z_T ~ N(0, 1)."""
        (first, cov_first), (last, cov_last) = (self.marginal(gamma) for gamma in ENDS)
        vectors = torch.linalg.eigh(self.cov).eigenvectors
        ratio = [(vectors.T @ cov @ vectors).diag() for cov in (cov_first, cov_last)]
        matrix = vectors @ torch.diag((ratio[0] / ratio[1]).sqrt()) @ vectors.T
        return first - matrix @ last, matrix @ matrix.T

    def log_density(self, z: Tensor) -> Tensor:
        return torch.stack([normal_log_prob(v, *self.flow()) for v in z.flatten(1)])

    def denoise(self, z: Tensor, gamma: Tensor) -> Tensor:
        alpha = torch.sigmoid(-gamma)[:, None, None]
        cov = alpha * self.cov + (1 - alpha) * torch.eye(D, dtype=torch.float64)
        error = z.double().flatten(1) - alpha[:, 0].sqrt() * self.mean
        gain = torch.linalg.solve(cov, error[..., None])[..., 0] @ self.cov
        return (self.mean + alpha[:, 0].sqrt() * gain).reshape(z.shape)

    def model(
        self, schedule: Schedule | None = None, shape=SHAPE, affine=None, spread=0.1
    ) -> Model:
        affine = Affine() if affine is None else affine
        process, decoder = (
            GaussianDiffusion(schedule or Linear(*ENDS), affine),
            GaussianDensity(affine),
        )
        decoder.log_spread.data.fill_(torch.tensor(spread).log())
        network = Formula(self.denoise)
        return Model(network, process, XPrediction(), Posterior(), decoder, shape)


@pytest.fixture
def case() -> NormalData:
    return NormalData()


def latents(count: int, shape=SHAPE) -> Tensor:
    return 0.8 * torch.randn(count, *shape, dtype=torch.float64)


def mixture_model() -> Model:
    """The ideal denoiser of a mixture of two normals, D = 1: not linear."""
    process = GaussianDiffusion(Linear(*ENDS), Affine())
    return Model(
        Formula(ideal), process, XPrediction(), Posterior(), GaussianDensity(Affine()), (1,)
    )


def mixture_log_density(z: Tensor) -> Tensor:
    """In one dimension the flow keeps F_t(z_t), F_t the distribution function of q(z_t):
    z_T = F_T⁻¹(F_1(z_1)) and p(z_1) = N(z_T; 0, 1) q(z_1)/q(z_T)."""

    def parts(gamma: float) -> Normal:
        alpha = torch.sigmoid(-torch.tensor(gamma, dtype=torch.float64))
        return Normal(alpha.sqrt() * MU, (alpha * TAU.square() + 1 - alpha).sqrt())

    first, last = (parts(gamma) for gamma in ENDS)
    target = (first.cdf(z[..., None]) * W).sum(-1)
    low, high = torch.full_like(z, -20.0), torch.full_like(z, 20.0)
    for _ in range(100):
        middle = (low + high) / 2
        above = (last.cdf(middle[..., None]) * W).sum(-1) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    q_first, q_last = (
        (W.log() + q.log_prob(v[..., None])).logsumexp(-1) for q, v in ((first, z), (last, middle))
    )
    return Normal(0.0, 1.0).log_prob(middle) + q_first - q_last


@pytest.mark.parametrize("shape", [SHAPE, (D,)], ids=str)
def test_the_exact_trace_is_the_closed_form(case, shape):
    """log p(z_1) of a Gaussian with full covariance, for images and for vectors."""
    z = latents(5, shape)
    got = log_density(case.model(shape=shape), z, 0.0, unit_probes(z), 1e-9)
    torch.testing.assert_close(got, case.log_density(z), rtol=0, atol=1e-7)


def test_hutchinson_is_the_exact_trace_in_expectation(case):
    """The mean over probes, one for a whole path, is the closed form; one probe alone is not."""
    z = latents(1).expand(3000, *SHAPE)
    got = log_density(case.model(), z, 0.0, random_probes(z), 1e-6)
    assert_mean(got, case.log_density(z[:1])[0], error=0.03)
    assert got.std() > 0.1


def test_signs_are_exact_for_a_diagonal_jacobian():
    """v_i² = 1: where dimensions do not mix, one probe is the exact trace."""
    model, z = mixture_model(), latents(6, (1,))
    by_signs, by_units = (
        log_density(model, z, 0.0, p(z), 1e-5) for p in (random_probes, unit_probes)
    )
    torch.testing.assert_close(by_signs, by_units, rtol=1e-12, atol=1e-12)


def test_a_flow_that_is_not_linear():
    """log p(z_1) in one dimension by distribution functions, to the tolerance: each tenth of the
    tolerance gains nearly a digit."""
    model, z = mixture_model(), torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)[:, None]
    truth = mixture_log_density(z[:, 0])
    errors = [
        (log_density(model, z, 0.0, unit_probes(z), 10.0**-k) - truth).abs().max().item()
        for k in (3, 5, 7, 9)
    ]
    assert errors[-1] < 1e-7
    assert (orders(errors) > 3).all(), errors  # at least 8 times less for 100 times the tolerance


def test_batch_mates_do_not_matter():
    """An example among others that need many more steps is as if it were alone, at a tolerance
    where other steps would show."""
    model, z = mixture_model(), torch.tensor([[0.1], [40.0], [-0.9], [-3.0]]).double()
    loose, tight = (log_density(model, z, 0.0, unit_probes(z), v) for v in (1e-3, 1e-8))
    alone = torch.cat([log_density(model, v[None], 0.0, unit_probes(v[None]), 1e-3) for v in z])
    torch.testing.assert_close(loose, alone, rtol=1e-12, atol=1e-12)
    assert ((loose - tight).abs()[[0, 2]] > 1e-7).all()


@pytest.mark.parametrize("probes", [unit_probes, random_probes])
def test_there_and_back(case, probes):
    """z_1 → z_T → z_1, and what the density loses on the way it gains on the way back."""
    z, model = latents(4), case.model()
    fixed = probes(z)
    there = carry(model, z, 0.0, 1.0, fixed, 1e-8)
    back = carry(model, there.z, 1.0, 0.0, fixed, 1e-8)
    assert (there.z - z).abs().max() > 0.1 and there.log_det.abs().min() > 0.1
    torch.testing.assert_close(back.z, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=0, atol=1e-6)


def test_the_flow_does_not_know_the_schedule(case):
    """Schedules between the same ends have one flow; 1/T is where one of betas begins."""
    z = latents(3)
    alphas = torch.sigmoid(-Linear(*ENDS)(torch.linspace(0, 1, 50).double()))
    betas = 1 - alphas / torch.cat([torch.ones(1).double(), alphas[:-1]])
    bent = LearnedMonotone(*ENDS)
    bent.up.data.normal_()
    want = log_density(case.model(), z, 0.0, unit_probes(z), 1e-6)
    for schedule in (Cosine(*ENDS), bent, Schedule.from_betas(betas)):
        got = log_density(case.model(schedule), z, schedule.start, unit_probes(z), 1e-6)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        t = torch.linspace(schedule.start, 1, 9, dtype=torch.float64)
        with torch.no_grad():
            back = time_of(schedule, schedule(t), schedule.start)
        torch.testing.assert_close(back, t, rtol=0, atol=1e-10)


def test_drift_and_trace_by_autograd(case):
    """The sum over unit vectors is the trace of the whole Jacobian, and costs D backward passes of
    one forward pass."""
    model, z, gamma = case.model(), latents(2), torch.tensor([-1.0, 2.0]).double()
    with counting(model.network) as calls:
        f, traces = drift_and_trace(model, z, gamma, 0.0, unit_probes(z))
    trace = traces.sum(0)
    assert calls == Calls(forward=2, backward=2 * D)
    for i in range(2):

        def one(v: Tensor, i: int = i) -> Tensor:
            return drift_and_trace(model, v[None], gamma[i : i + 1], 0.0, v[None, None][:0])[0]

        step = 1e-6
        columns = [
            ((one(z[i] + step * u) - one(z[i] - step * u)) / (2 * step)).flatten()
            for u in torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE)
        ]
        torch.testing.assert_close(trace[i], torch.stack(columns).trace(), rtol=1e-6, atol=1e-7)
    assert not f.requires_grad and not trace.requires_grad
    signs = random_probes(z)  # drawn once: f and the trace are functions of (z, γ)
    once, again = (drift_and_trace(model, z, gamma, 0.0, signs)[1] for _ in range(2))
    assert torch.equal(once, again)


def test_gradients_and_dtypes_do_not_matter(case):
    """With frozen weights, in and out of no_grad, and with a float32 network inside."""
    z = latents(3)
    model = case.model()
    want = log_density(model, z, 0.0, unit_probes(z), 1e-6)
    assert not want.requires_grad and want.dtype == torch.float64
    model.network.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(log_density(model, z, 0.0, unit_probes(z), 1e-6), want)
    single = case.model()
    single.network.float()
    got = log_density(single, z, 0.0, unit_probes(z), 1e-5)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


# ---- bounds on log P(x)

K = 3
PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


class Nothing(nn.Module):
    """No context: the head's log-prior is all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor, level: Tensor) -> Tensor:
        return self.zero * z[..., None].expand(*z.shape, K)


def levels_model(values: Levels, gamma: float) -> Model:
    head = LevelLogits(values.values)
    head.log_prior.data = PRIOR.log()
    process, step = GaussianDiffusion(Linear(gamma, 4.0), values), Mixture(values.values)
    return Model(Nothing(), process, head, step, LevelDecoder(), (1,))


def quadrature(model: Model, dequantiser, first: float) -> Tensor:
    """P(x) = ∫ P(x|z) p(z) dz for each level; p(z) by the flow, on a line of z."""
    levels = model.process.embedding
    z = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    t = torch.full((len(z),), first, dtype=torch.float64)
    with torch.no_grad():
        log_p = log_density(model, z[:, None], first, unit_probes(z[:, None]), 1e-6)
        if isinstance(dequantiser, Encoder):
            decoded = model.likelihood(z[:, None], t).base_dist.log_probs[:, 0].exp()
            return (log_p.exp()[:, None] * decoded).sum(0) * (z[1] - z[0])
    # bins have edges: the trapezoid rule within each, on a cubic through the points
    from scipy.interpolate import CubicSpline

    total = CubicSpline(z.numpy(), log_p.exp().numpy()).antiderivative()
    h, signal = (levels.values[1] - levels.values[0]).item() / 2, model.process.alpha(t)[0].sqrt()
    low, high = ((signal * (levels.values + side)).numpy() for side in (-h, h))
    if isinstance(dequantiser, TruncatedNormal):
        low[0], high[-1] = z[0].item(), z[-1].item()
    return torch.tensor(total(high) - total(low))


@pytest.mark.parametrize(
    "dequantiser", [Encoder(), TruncatedNormal(), Uniform()], ids=lambda d: d.name
)
@pytest.mark.parametrize(
    ("levels", "first"), [(Levels(K), 0.0), (Levels(K, -0.7, 0.4), 0.05)], ids=["edges", "other"]
)
def test_dequantised_levels(dequantiser, levels, first):
    """E P(x|z) p(z)/q(z|x) = P(x) for each level x, the P(x) sum to 1 (uniform: to less, since its
    bins leave out the tails), and the bound is below log P(x)."""
    model = levels_model(levels, -4.0)
    truth = quadrature(model, dequantiser, first)
    if isinstance(dequantiser, Uniform):
        assert 0.5 < truth.sum() < 1
    else:
        torch.testing.assert_close(truth.sum().item(), 1.0, rtol=0, atol=1e-4)
    x = torch.arange(K).repeat_interleave(2500)[:, None]
    t = torch.full((len(x),), first, dtype=torch.float64)
    with torch.no_grad():
        z, log_ratio = dequantiser(model, Batch(x), t)
    log_w = log_ratio + log_density(model, z, first, random_probes(z), 1e-6)
    draws = log_w.reshape(K, -1).T
    error = draws.exp().std(0) / len(draws) ** 0.5
    solver = 1e-4  # where q is nearly the posterior, the draws vary less than the solver errs
    assert (error < 0.015).all()
    assert ((draws.exp().mean(0) - truth).abs() < 4 * error + solver).all()
    gap, error = truth.log() - draws.mean(0), draws.std(0) / len(draws) ** 0.5 + solver
    assert (gap > -4 * error).all()
    if isinstance(dequantiser, Encoder):  # in one dimension its q is the ideal model's posterior
        assert (gap < 4 * error).all()
    else:
        assert (gap < (0.1 if isinstance(dequantiser, TruncatedNormal) else 2.0)).all()
    if isinstance(dequantiser, Uniform):
        assert (gap > 0.005).all()


def test_real_data_are_a_density_in_their_own_units(case):
    """E P(x|z_1) p(z_1)/q(z_1|x) = P(x): the first interval and log|de/dx| are in it. For a linear
    decoder of a Gaussian flow P(x) is a Gaussian."""
    affine = Affine(torch.randn(SHAPE).double(), torch.rand(SHAPE).double() + 0.5)
    model = case.model(affine=affine, spread=0.15)
    mean, cov = case.flow()
    gamma = torch.full((D + 1,), ENDS[0], dtype=torch.float64)
    points = torch.cat([torch.zeros(1, D), torch.eye(D)]).double().reshape(D + 1, *SHAPE)
    rows = case.denoise(points, gamma).flatten(1)
    matrix, units = (rows[1:] - rows[0]).T, torch.diag(affine.scale.flatten())
    mean = affine.shift.flatten() + units @ (rows[0] + matrix @ mean)
    cov = units @ (matrix @ cov @ matrix.T + 0.15**2 * torch.eye(D)) @ units
    x = affine.shift + affine.scale * torch.linspace(-0.5, 0.8, D).double().reshape(SHAPE)
    truth = normal_log_prob(x.flatten(), mean, cov)

    rows = x.expand(4000, *SHAPE)
    with torch.no_grad():
        z, log_ratio = Encoder()(model, Batch(rows), torch.zeros(4000).double())
    log_w = log_ratio + log_density(model, z, 0.0, unit_probes(z), 1e-4)
    assert_mean((log_w - truth).exp(), 1.0, error=0.03)
    one, many = (evaluate_flow(model, x[None].expand(40, *SHAPE), samples=k) for k in (1, 8))
    assert one.unit == "nats" and one.bits_per_dim is None
    assert -truth < many.nats < one.nats


def test_the_pass_counts_its_calls_and_shows_its_convergence(case):
    """Rows through the network, forward and backward, are those stated; the bound at two
    tolerances."""
    model, x = case.model(), torch.randn(BLOCK + 3, *SHAPE)
    rows = []
    handle = model.network.register_forward_pre_hook(lambda _, i: rows.append(len(i[0])))
    a = evaluate_flow(model, x, trace="hutchinson", tolerance=1e-3)
    handle.remove()
    n = len(x)
    assert a.calls_per_example == pytest.approx(sum(rows) / n)
    # all but the decoder's one call have a backward pass for each of two probes
    assert a.backward_calls_per_example == pytest.approx(2 * (a.calls_per_example - 1))
    assert a.how.trace == "hutchinson" and a.how.dequantiser == "encoder"
    assert (a.how.tolerance, a.how.loose_tolerance) == (1e-3, 1e-2)
    assert 0 < abs(a.how.loose - a.nats) < a.how.largest_change < 0.5
    assert a.per_example.mean().item() == pytest.approx(-a.nats)
    b = evaluate_flow(model, x, trace="exact", tolerance=1e-5, replicates=2)
    assert b.backward_calls_per_example == pytest.approx(D * (b.calls_per_example - 2))
    assert b.how.largest_change < a.how.largest_change
    assert b.standard_error.monte_carlo > 0
    assert b.to_dict()["how"]["loose"] == b.how.loose


def test_the_error_of_the_probes_is_stated(case):
    """Where all else is drawn alike, the bound differs from that by the exact trace by as much as
    is stated; and the exact trace has no probes."""
    model, x = case.model(), torch.randn(256, *SHAPE)
    got, exact = (
        evaluate_flow(model, x, trace=trace, tolerance=1e-3) for trace in ("hutchinson", "exact")
    )
    assert exact.how.probe_error is None and got.how.probe_error < got.standard_error.total
    off = got.per_example - exact.per_example
    assert_mean(off.square() / len(x) / got.how.probe_error**2, 1.0, error=0.2)
    assert got.to_dict()["how"]["probe_error"] == got.how.probe_error


def test_a_bound_that_the_solver_has_not_settled_is_refused(case):
    """A change by the tolerance above that by another seed or other data is refused, and one with
    nothing to compare it with; a tolerance that settles it is named, and does."""
    model, x = case.model(), torch.randn(20, *SHAPE)
    alike = 6 + 0.01 * torch.randn(600, *SHAPE)
    with pytest.raises(
        ValueError, match=r"0\.9 and 0\.09 the mean changes .* tolerance of 0\.009"
    ):
        evaluate_flow(model, alike, tolerance=0.09)
    with pytest.raises(ValueError, match=r"more than the stated error of 0\.06"):
        evaluate_flow(model, 6 + x[:1], tolerance=0.09)
    found = evaluate_flow(model, x[:20], tolerance=1e-6)
    assert found.how.largest_change < found.standard_error.total


def test_refusals(case):
    model, x = case.model(), torch.randn(2, *SHAPE)
    masks = Model(
        Nothing(),
        MaskedDiffusion(PowerAlpha(), K),
        SymbolLogits(K),
        Posterior(),
        Categorical(),
        (1,),
    )
    with pytest.raises(ValueError, match="Gaussian process; the model's is MaskedDiffusion"):
        evaluate_flow(masks, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        evaluate_flow(model, x, samples=0)
    with pytest.raises(ValueError, match=r"not be a bound; try trace='exact'"):
        evaluate_flow(model, x, samples=2, trace="hutchinson")
    with pytest.raises(ValueError, match="auto, exact or hutchinson; got 'rough'"):
        evaluate_flow(model, x, trace="rough")
    with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\); got 0"):
        evaluate_flow(model, x, tolerance=0)
    with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\); got 2"):
        evaluate_flow(model, x, tolerance=0.2)
    with pytest.raises(ValueError, match="real numbers; try encoder"):
        evaluate_flow(model, x, dequantiser=Uniform())
    with pytest.raises(ValueError, match="finite γ at both ends"):
        evaluate_flow(case.model(PowerAlpha()), x)
    for head in (Mean(4), WithVariance(Mean(4))):
        mean = case.model()
        mean.head = head
        with pytest.raises(ValueError, match="4 steps and has no flow"):
            evaluate_flow(mean, x)
    assert is_exact(model, "auto") and not is_exact(case.model(shape=(17,)), "auto")
    assert ContinuousTime(0.0).first == model.process.schedule.start
