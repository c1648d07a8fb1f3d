"""The encoder: every conditional against Bayes' rule, both processes by one contract."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from support.closed_forms import condition, states
from support.contracts import SymbolContract
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.schedules import Cosine, Linear, PowerAlpha, Schedule
from nelbo.testing import ProcessContract

SHAPE = (2, 3, 5, 7)
S = torch.tensor([0.2, 0.5], dtype=torch.float64)
U = torch.tensor([0.6, 0.95], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(4):
        yield


class GaussianContract(ProcessContract):
    @staticmethod
    def examples(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    @staticmethod
    def guess(e: Tensor) -> Tensor:
        return e + torch.randn_like(e)


class TestGaussianOfReals(GaussianContract):
    @pytest.fixture
    def process(self):
        return GaussianDiffusion(Linear(-5.0, 1.5), Affine(0.3, 0.7))


class TestGaussianOfLevels(GaussianContract):
    @staticmethod
    def examples(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(17, shape)

    @pytest.fixture
    def process(self):
        return GaussianDiffusion(Cosine(-6.0, 3.0), Levels(17))


class TestAbsorbing(SymbolContract):
    @pytest.fixture
    def process(self):
        return MaskedDiffusion(Linear(-4.0, 3.0), 5)

    def test_a_guess_costs(self, process, x):
        """Equation 9: ... where a mask hides something to guess."""
        hidden = (self.path(process, x)[-1] == process.mask).flatten(1).any(1)
        if not hidden.all():
            x = torch.cat([x] * 8)[: len(x)]
        super().test_a_guess_costs(process, x)


class InUnitsOfTheEmbedding(GaussianDiffusion):
    picture = ForwardProcess.picture


class Doubled(GaussianDiffusion):
    def rate(self, z, e, e_hat, t):
        return 2 * super().rate(z, e, e_hat, t)


@pytest.mark.parametrize(
    ("process", "test", "method"),
    [
        (InUnitsOfTheEmbedding, "test_the_picture_is_in_the_units_of_the_data", "picture"),
        (Doubled, "test_rate_is_the_limit_of_the_kl", "rate"),
    ],
)
def test_the_contract_names_the_method_that_is_wrong(process, test, method):
    wrong, x = process(Linear(-5.0, 1.5), Affine(0.3, 0.7)), torch.randn(2, 3).double()
    with pytest.raises(AssertionError, match=f"^{method}: .*off by"):
        getattr(GaussianContract(), test)(wrong, x)


# ---- Gaussian: equations 2, 3, 6 and 7


def scalar_bayes(
    process: GaussianDiffusion, z: Tensor, e: Tensor, s: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_s | z_t, x from the joint of (z_s, z_t), element by element.

    z_s = √α_s e + √(1-α_s) ε and z_t = √r z_s + √(1-r) ε', r = α_t/α_s, with α = 1/(1+e^γ).
    """
    mean, variance = torch.empty_like(z), torch.empty(len(z), dtype=torch.float64)
    for b in range(len(z)):
        alpha_s, alpha_t = (1 / (1 + math.exp(process.schedule(v[b]).item())) for v in (s, t))
        root = math.sqrt(alpha_t / alpha_s)
        cov = torch.tensor(
            [
                [1 - alpha_s, root * (1 - alpha_s)],
                [root * (1 - alpha_s), root**2 * (1 - alpha_s) + 1 - root**2],
            ],
            dtype=torch.float64,
        )
        zero = torch.zeros(2, dtype=torch.float64)
        gain, _, rest = condition(zero, cov, slice(1, 2), slice(0, 1))
        mean[b] = math.sqrt(alpha_s) * e[b] + gain[0, 0] * (z[b] - math.sqrt(alpha_t) * e[b])
        variance[b] = rest[0, 0]
    return mean, variance


@pytest.mark.parametrize("shape", [SHAPE, (2, 3), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("schedule", [Linear(-5.0, 4.0), Cosine(-9.0, 6.0)], ids=["lin", "cos"])
def test_m_t_and_beta_tilde_by_bayes_rule(schedule, shape):
    """Equation 6: m_t and β̃_t are the conditional of the joint Gaussian of (z_s, z_t)."""
    process = GaussianDiffusion(schedule, Affine())
    e, z = torch.randn(2, *shape, dtype=torch.float64)
    s, t = S[: len(e)], U[: len(e)]
    mean, variance = scalar_bayes(process, z, e, s, t)
    torch.testing.assert_close(process.m_t(z, e, s, t), mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(process.beta_tilde(s, t), variance, rtol=1e-11, atol=0)
    posterior = process.posterior(z, e, s, t).base_dist
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(posterior.variance.flatten(1)[:, 0], variance, rtol=1e-11, atol=0)


def test_the_kernel_is_the_chain():
    """Equations 2 and 3: t steps of √(1-β) z + √β ε give N(√α_t x, 1-α_t),
    α_t = Π(1-β_s)."""
    betas = [0.02, 0.3, 0.001, 0.5, 0.1]
    process = GaussianDiffusion(Schedule.from_betas(betas), Affine())
    x = torch.randn(1, 3, dtype=torch.float64)
    mean, variance = x, torch.zeros((), dtype=torch.float64)
    for i, beta in enumerate(betas, start=1):
        t = torch.tensor([i / 5], dtype=torch.float64)
        s = torch.tensor([(i - 1) / 5], dtype=torch.float64)
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        q = process.marginal(process.embed(x), t).base_dist
        torch.testing.assert_close(q.mean, mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(q.variance, variance.expand(1, 3), rtol=1e-13, atol=0)
        step = process.transition(x, s, t).base_dist
        torch.testing.assert_close(step.mean, math.sqrt(1 - beta) * x, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            step.variance, torch.full((1, 3), beta, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_two_gaussian_transitions_are_one_exactly():
    """Equations 2 and 3: r→s then s→t is r→t, and x→s then s→t is x→t."""
    process = GaussianDiffusion(Linear(-5.0, 4.0), Affine())
    r, z = torch.tensor([0.1, 0.3], dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    for first, whole in (
        (process.transition(z, r, S), process.transition(z, r, U)),
        (process.marginal(z, S), process.marginal(z, U)),
    ):
        second = process.transition(first.mean, S, U)
        kept = (second.base_dist.mean / first.base_dist.mean).square()
        variance = kept * first.variance + second.variance
        torch.testing.assert_close(second.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, whole.variance, rtol=1e-11, atol=0)


def test_the_prior_term_in_closed_form():
    """Equation 5: KL( N(√α e, 1-α) ‖ N(0, 1) ) = ½ [ α‖e‖² − D α − D log(1-α) ]."""
    process = GaussianDiffusion(Linear(-5.0, 1.5), Affine())
    e = torch.randn(SHAPE, dtype=torch.float64)
    t = torch.ones(2, dtype=torch.float64)
    alpha = 1 / (1 + math.exp(1.5))
    square = e.square().flatten(1).sum(1)
    truth = 0.5 * (alpha * square - 105 * alpha - 105 * math.log1p(-alpha))
    got = kl_divergence(process.marginal(e, t), process.prior(SHAPE[1:], t))
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=0)


def test_gaussian_at_the_data_itself():
    """Equation 6 at α_0 = 1: q(z_0|z_1,x) is x without noise, m_t = x and β̃ = 0, and the
    step from 0 is q(z_1|x): no clip, no 0/0."""
    process = GaussianDiffusion(Schedule.from_betas([1e-4, 0.02, 0.3]), Affine())
    x, z = torch.randn(2, *SHAPE, dtype=torch.float64)
    s, t = torch.zeros(2, dtype=torch.float64), torch.full((2,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(process.m_t(z, x, s, t), x, rtol=1e-12, atol=0)
    assert torch.equal(process.beta_tilde(s, t), s)
    torch.testing.assert_close(process.beta(s, t), torch.full_like(t, 1e-4), rtol=1e-12, atol=0)
    assert torch.equal(process.marginal(x, s).base_dist.mean, x)


def test_levels_fill_their_range():
    """One scaling: K levels on [-1, 1] with both edges, equally spaced."""
    values = Levels(256)(torch.arange(256))
    torch.testing.assert_close(
        values, torch.tensor([2 * k / 255 - 1 for k in range(256)], dtype=torch.float64)
    )
    with pytest.raises(ValueError, match=r"levels must be at least 2; got 1"):
        Levels(1)
    with pytest.raises(ValueError, match=r"levels must be at least 2; got 1"):
        MaskedDiffusion(PowerAlpha(), 1)


@pytest.mark.parametrize("gamma", [17.0, 40.0])
def test_signal_survives_far_into_the_noise(gamma):
    """Α = sigmoid(-γ) keeps its digits where 1 - sigmoid(γ) is 0."""
    process = GaussianDiffusion(Linear(-gamma, gamma), Affine())
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    small = math.exp(-gamma) / (1 + math.exp(-gamma))
    torch.testing.assert_close(process.alpha(ends)[1].item(), small, rtol=1e-13, atol=0)
    variance = process.marginal(torch.zeros(2, 1).double(), ends).variance
    torch.testing.assert_close(variance[0].item(), small, rtol=1e-13, atol=0)


@pytest.mark.parametrize("steps", [1_000, 1_000_000])
def test_beta_of_a_tiny_step_keeps_its_digits(steps):
    """Differences by expm1: β of a step of 1/T is -expm1 of the exact
    difference of log α, to the digits that float64 times leave (1e-16 T relative)."""
    schedule = Linear(-13.0, 5.0)
    process = GaussianDiffusion(schedule, Affine())
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    s = t - 1 / steps
    getcontext().prec = 40

    def log_alpha(v: float) -> Decimal:
        gamma = Decimal(-13) + Decimal(18) * Decimal(v)
        return -(1 + gamma.exp()).ln()

    truth = [
        float(1 - (log_alpha(b) - log_alpha(a)).exp())
        for a, b in zip(s.tolist(), t.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        process.beta(s, t), torch.tensor(truth, dtype=torch.float64), rtol=1e-14 * steps, atol=0
    )


# ---- absorbing: equation 9


def matrices(process: MaskedDiffusion, s: float, t: float) -> tuple[Tensor, Tensor]:
    """exp log_prob of q(z_t|z_s) and of q(z_s|z_t, x) as tables over all symbols."""
    k = process.count
    z = torch.arange(k + 1)
    times = [torch.full(((k + 1) ** 2,), v, dtype=torch.float64) for v in (s, t)]
    rows, columns = z.repeat_interleave(k + 1)[:, None], z.repeat(k + 1)[:, None]
    forward = process.transition(rows, *times).log_prob(columns).exp().reshape(k + 1, k + 1)
    back = torch.stack(
        [
            process.posterior(rows, process.embed(torch.full_like(rows, x)), *times)
            .log_prob(columns)
            .exp()
            .reshape(k + 1, k + 1)
            for x in range(k)
        ]
    )
    return forward, back


@pytest.mark.parametrize("schedule", [PowerAlpha(), Linear(-4.0, 3.0)], ids=["alpha", "gamma"])
@pytest.mark.parametrize(("r", "s", "t"), [(0.1, 0.4, 0.9), (0.0, 0.5, 1.0)])
def test_absorbing_tables(schedule, r, s, t):
    """Equations 4 and 9, all symbols, end points included: rows sum to 1, transitions
    compose (Chapman-Kolmogorov), and Bayes' rule gives the posterior wherever q(z_t|x) > 0."""
    process = MaskedDiffusion(schedule, 3)
    (first, _), (second, back), (whole, _) = (
        matrices(process, *pair) for pair in ((r, s), (s, t), (r, t))
    )
    for table in (first, second, whole, *back):
        assert table.isfinite().all()
        torch.testing.assert_close(table.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(first @ second, whole, rtol=0, atol=1e-14)
    alpha_s, alpha_t = process.alpha(torch.tensor([s, t], dtype=torch.float64)).tolist()
    for x in range(3):
        at_s = torch.zeros(4, dtype=torch.float64)
        at_s[x], at_s[3] = alpha_s, 1 - alpha_s
        at_t = at_s @ second
        assert abs(at_t[x] - alpha_t) < 1e-14
        bayes = (at_s[:, None] * second).T
        torch.testing.assert_close(at_t[:, None] * back[x], bayes, rtol=0, atol=1e-14)


def test_absorbing_end_points():
    """Equation 9 with α_0 = 1 and α_1 = 0: certain and impossible, nothing undefined."""
    process = MaskedDiffusion(PowerAlpha(), 3)
    x, masks = torch.tensor([[2, 0]]), torch.tensor([[3, 3]])
    e = process.embed(x)
    zero, half, one = (torch.tensor([v], dtype=torch.float64) for v in (0.0, 0.5, 1.0))
    infinite = torch.tensor([-torch.inf], dtype=torch.float64)
    assert torch.equal(process.marginal(e, zero).log_prob(x), zero)
    assert torch.equal(process.marginal(e, zero).log_prob(masks), infinite)
    assert torch.equal(process.marginal(e, one).log_prob(masks), zero)
    assert torch.equal(process.marginal(e, one).log_prob(x), infinite)
    assert torch.equal(process.posterior(masks, e, zero, half).log_prob(x), zero)
    assert torch.equal(process.posterior(masks, e, zero, one).log_prob(x), zero)
    assert torch.equal(process.posterior(masks, e, zero, one).log_prob(masks), infinite)
    last = process.prior((2,), one)
    assert torch.equal(last.log_prob(masks), zero)
    assert torch.equal(kl_divergence(process.marginal(e, one), last), zero)


@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
def test_absorbing_kl_is_finite_at_the_end_points(s, t):
    """Equation 9: KL = (α_s-α_t)/(1-α_t) Σ_masked −log P(x_i|z_t), gradients finite."""
    process = MaskedDiffusion(PowerAlpha(), 3)
    x, z = torch.tensor([[2, 0, 1]]), torch.tensor([[3, 3, 1]])
    logits = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    e, e_hat = process.embed(x), logits.log_softmax(-1)
    times = torch.tensor([[s], [t]], dtype=torch.float64)
    q, p = process.posterior(z, e, *times), process.posterior(z, e_hat, *times)
    kl = kl_divergence(q, p)
    surprise = -e_hat[0, :2].gather(-1, x[0, :2, None]).sum()
    torch.testing.assert_close(kl[0], (t - s) / t * surprise, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[0, :2] != 0).all() and (gradient[0, 2] == 0).all()


def test_what_no_mask_hides_at_the_end_is_uniform():
    """Equation 5: the prior gives the share α_T to all symbols alike, so the prior term is
    D α_T log K, finite."""
    process = MaskedDiffusion(Linear(-4.0, 1.0), 5)
    t = torch.ones(2, dtype=torch.float64)
    alpha = 1 / (1 + math.exp(1.0))
    prior = process.prior((3, 7), t)
    table = torch.stack(
        [prior.base_dist.log_prob(torch.full((2, 3, 7), k)) for k in range(6)]
    ).exp()
    truth = torch.tensor([alpha / 5] * 5 + [1 - alpha], dtype=torch.float64)
    torch.testing.assert_close(table, truth[:, None, None, None].expand(6, 2, 3, 7))
    q = process.marginal(process.embed(torch.randint(5, (2, 3, 7))), t)
    torch.testing.assert_close(
        kl_divergence(q, prior), torch.full((2,), 21 * alpha * math.log(5), dtype=torch.float64)
    )


def test_absorbing_features_are_the_symbols():
    """The network sees one-hot vectors, the channels of one dimension side by side."""
    process = MaskedDiffusion(PowerAlpha(), 4)
    z = torch.randint(5, SHAPE)
    seen = process.features(z).reshape(2, 3, 5, 5, 7)
    assert torch.equal(seen.argmax(2), z)
    assert torch.equal(seen.sum(2), torch.ones(SHAPE, dtype=torch.float64))
    flat = torch.tensor(states(2, 3))
    seen = MaskedDiffusion(PowerAlpha(), 2).features(flat).reshape(-1, 3, 3)
    assert np.array_equal(seen.argmax(-1).numpy(), flat.numpy())


def test_times_may_be_numbers_and_real_data_need_no_embedding():
    """Numbers are exact: none of them passes through float32."""
    process, data = GaussianDiffusion(Linear(-5.0, 1.5)), torch.tensor([[0.25, -3.0]])
    assert torch.equal(process.embed(data), data.double())
    s, t = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    for function in (process.beta, process.beta_tilde, process.log_kept):
        assert torch.equal(function(0.2, 0.6), function(s, t))
    assert torch.equal(process.alpha(0.6), process.alpha(t))
    assert torch.equal(process.schedule(0.6), process.schedule(t))
    assert process.alpha(1).item() == pytest.approx(1 / (1 + math.exp(1.5)), rel=1e-15)
