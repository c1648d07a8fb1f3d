"""Meaning of a network's output: every parametrisation of one prediction is that prediction."""

import math

import pytest
import torch

from nelbo._utils.numerics import constant, seeded
from nelbo.diffusion import level_law
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.level_law import mean_and_norm
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.parametrization import (
    EpsPrediction,
    LevelCurves,
    LevelLogits,
    Mean,
    SymbolLogits,
    VPrediction,
    WithVariance,
    XPrediction,
)
from nelbo.diffusion.reverse import Beta, Learned, Mixture, Posterior
from nelbo.diffusion.schedules import LearnedMonotone, Linear, PowerAlpha, Schedule

SHAPE = (2, 3, 5, 7)
T = torch.tensor([0.25, 0.75], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(12):
        yield


def alpha_of(process: GaussianDiffusion, t: torch.Tensor) -> torch.Tensor:
    """α = 1/(1 + e^γ), over a batch of pictures."""
    return (1 / (1 + process.schedule(t).exp())).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "schedule", [Linear(-6.0, 5.0), Schedule.from_betas([0.1, 0.2, 0.3, 0.4])], ids=["γ", "β"]
)
def test_heads_agree(schedule):
    """Equations 3, 6 and 7: x̂ written as ε̂, x̂, v̂ or f is read back as x̂; f by the
    textbook formula of m_t from the α's."""
    process = GaussianDiffusion(schedule, Affine())
    z, e_hat = torch.randn(2, *SHAPE, dtype=torch.float64)
    a = alpha_of(process, T)
    noise = (z - a.sqrt() * e_hat) / (1 - a).sqrt()
    velocity = a.sqrt() * noise - (1 - a).sqrt() * e_hat
    before = alpha_of(process, T - 0.25)
    beta = 1 - a / before
    mean = ((1 - before) * (1 - beta).sqrt() * z + before.sqrt() * beta * e_hat) / (1 - a)
    for head, output in (
        (EpsPrediction(), noise),
        (XPrediction(), e_hat),
        (VPrediction(), velocity),
        (Mean(4), mean),
    ):
        got = head(output, z, T, process).e_hat
        torch.testing.assert_close(got, e_hat, rtol=1e-10, atol=1e-10)


def test_mean_of_the_first_step_is_the_data():
    """Equation 7 with α_0 = 1: f(z_1, 1/T) is x̂ itself."""
    process = GaussianDiffusion(Schedule.from_betas([1e-4, 0.2, 0.3, 0.4]), Affine())
    z, output = torch.randn(2, 1, 3, dtype=torch.float64)
    got = Mean(4)(output, z, T[:1], process).e_hat
    torch.testing.assert_close(got, output, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("steps", [3, 7, 49, 1000])
def test_mean_accepts_every_time_of_its_grid(steps):
    """The times i/T however they are rounded, and the step Beta has f as its mean there."""
    process = GaussianDiffusion(Schedule.from_betas(torch.linspace(0.01, 0.2, steps)), Affine())
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]
    z, f = torch.randn(2, steps, 2, dtype=torch.float64)
    prediction = Mean(steps)(f, z, t, process)
    step = Beta()(prediction, z, t - 1 / steps, t, process).base_dist
    torch.testing.assert_close(step.mean, f, rtol=1e-9, atol=1e-9)


def test_mean_refuses_times_off_its_grid():
    """f belongs to steps of 1/T."""
    process = GaussianDiffusion(Schedule.from_betas([0.1, 0.2, 0.3, 0.4]), Affine())
    z = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"steps of 1/4; .*try TimeGrid.uniform\(4\)"):
        Mean(4)(z, z, torch.tensor([0.5, 0.6], dtype=torch.float64), process)


def test_level_logits_of_zero_are_the_posterior_of_one_pixel():
    """With no context, P(v_k|z_t) ∝ N(z_t; √α v_k, 1-α), Bayes under a uniform
    prior; densities by hand, x̂ their mean."""
    process = GaussianDiffusion(Linear(-6.0, 5.0), Levels(17))
    x = torch.randint(17, SHAPE)
    z = process.marginal(process.embed(x), T).sample()
    values = torch.tensor([2 * k / 16 - 1 for k in range(17)], dtype=torch.float64)
    a = alpha_of(process, T)[..., None]
    density = torch.exp(-((z[..., None] - a.sqrt() * values) ** 2) / (2 * (1 - a)))
    truth = density / density.sum(-1, keepdim=True)
    output = torch.zeros(*SHAPE, 17, dtype=torch.float64)
    got = LevelLogits(values)(output, z, T, process)
    torch.testing.assert_close(got.log_probs.exp(), truth, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(got.e_hat, (truth * values).sum(-1), rtol=1e-10, atol=1e-12)


def test_level_logits_are_a_prior():
    """Outputs log P(v_k) + anything constant give Bayes under that prior."""
    process = GaussianDiffusion(Linear(-6.0, 5.0), Levels(3))
    z = torch.randn(SHAPE, dtype=torch.float64)
    prior = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    values = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    a = alpha_of(process, T)[..., None]
    joint = prior * torch.exp(-((z[..., None] - a.sqrt() * values) ** 2) / (2 * (1 - a)))
    output = (prior.log() + 7).expand(*SHAPE, 3)
    got = LevelLogits(values)(output, z, T, process).log_probs.exp()
    torch.testing.assert_close(got, joint / joint.sum(-1, keepdim=True), rtol=1e-10, atol=1e-15)


def test_curves_are_logits_through_a_matrix():
    """... so unit vectors for curves give LevelLogits, and any curves a law that sums to one."""
    process = GaussianDiffusion(Linear(-13.0, 5.0), Levels(17))
    values, z = process.embedding.values, torch.randn(SHAPE, dtype=torch.float64)
    full, few = LevelLogits(values, SHAPE[1:]), LevelCurves(values, SHAPE[1:], 17)
    few.log_prior.data = full.log_prior.data = torch.randn(*SHAPE[1:], 17)
    output = torch.randn(*SHAPE, 17, dtype=torch.float64)
    got = few(output, z, T, process)
    torch.testing.assert_close(got.log_probs.exp().sum(-1), torch.ones(SHAPE).double())
    want = full(output @ few.curves.double(), z, T, process)
    torch.testing.assert_close(got.log_probs, want.log_probs)
    few.curves.data = torch.eye(17)
    want = full(output, z, T, process)
    torch.testing.assert_close(few(output, z, T, process).e_hat, want.e_hat)


def test_few_curves_reach_every_level():
    """For each level there is an output that it or a near one is likeliest for, for each end that
    level itself; and outputs as large as they come have a finite gradient."""
    process = GaussianDiffusion(Linear(-7.0, 40.0), Levels(256))
    head = LevelCurves(process.embedding.values)
    t = torch.ones(1, dtype=torch.float64)
    z = torch.zeros(256, dtype=torch.float64)
    output = 4 * head.curves.detach().T.double()
    found = head(output[None], z[None], t, process).log_probs[0].argmax(-1)
    assert (found - torch.arange(256)).abs().max() <= 4 and (found[0], found[-1]) == (0, 255)
    for size in (1e4, -1e4):
        extreme = torch.full((1, 1, 32), size, requires_grad=True)
        head(extreme, torch.full((1, 1), 3.0), 0 * t, process).log_probs[..., 0].sum().backward()
        assert extreme.grad.isfinite().all()


def test_levels_in_parts_are_the_levels(monkeypatch):
    """Parts of the batch that are computed again give the same law and gradients, also of a
    schedule whose interior is held constant only in the forward pass."""
    schedule = LearnedMonotone(-6.0, 5.0, learn_endpoints=True)
    process = GaussianDiffusion(schedule, Levels(5))
    head = LevelCurves(process.embedding.values, SHAPE[1:], 4)
    output, noise = torch.randn(*SHAPE, 4), torch.randn(SHAPE, dtype=torch.float64)
    x = torch.randint(5, SHAPE)
    found = []
    for part in (2**20, 1):
        monkeypatch.setattr(level_law, "PART", {"cpu": part})
        output = output.detach().requires_grad_()
        with constant(schedule.interior()):
            z = process.marginal(process.embed(x), T).base_dist
            prediction = head(output.double(), z.loc + z.scale * noise, T, process)
        loss = prediction.e_hat.sum() + prediction.log_prob(x).sum()
        loss.backward()
        grads = output.grad, head.curves.grad, head.log_prior.grad, schedule.ends.grad
        found.append([loss.detach(), prediction.log_probs.detach(), *(g.clone() for g in grads)])
        head.zero_grad(), schedule.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("part", "shared"), [(1, False), (2**20, False), (2**20, True)])
def test_gradients_of_the_law_of_levels(monkeypatch, part, shared):
    """Gradients of mean and log-norm in all that they depend on are finite differences; autograd
    knows neither, for their probabilities are not kept."""
    monkeypatch.setattr(level_law, "PART", {"cpu": part})
    shapes = (2, 3, 4), (4, 5), (1 if shared else 3, 5), (2, 3), (2,), (2,)
    c, f, h, z, a, p = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    v = torch.linspace(-1, 1, 5, dtype=torch.float64)
    logits = c @ f + h - p.exp()[:, None, None] / 2 * (z[..., None] - a[:, None, None] * v) ** 2
    mean, norm = mean_and_norm(c, f, h, v, z, a, p.exp())
    torch.testing.assert_close(norm, logits.logsumexp(-1))
    torch.testing.assert_close(mean, logits.softmax(-1) @ v)
    inputs = c, f, h, z, a, p
    assert torch.autograd.gradcheck(
        lambda c, f, h, z, a, p: mean_and_norm(c, f, h, v, z, a, p.exp()), inputs
    )


def test_the_probability_of_one_level_needs_no_table():
    """... it is what the table of all levels says, also of a choice of dimensions."""
    process = GaussianDiffusion(Linear(-9.0, 5.0), Levels(17))
    x, z = torch.randint(17, SHAPE), torch.randn(SHAPE, dtype=torch.float64)
    for shape in ((), SHAPE[1:]):
        head = LevelCurves(process.embedding.values, shape, 6)
        head.log_prior.data = torch.randn(*shape, 17)
        found = head(torch.randn(*SHAPE, 6, dtype=torch.float64), z, T, process)
        each = found.log_prob(x)
        torch.testing.assert_close(each, found.log_probs.gather(-1, x[..., None])[..., 0])
        first = found.map(lambda v: v[:, 0])
        torch.testing.assert_close(first.log_prob(x[:, 0]), each[:, 0])
        law = LevelDecoder()(found, z, T, process)
        torch.testing.assert_close(law.log_prob(x), each.sum((1, 2, 3)))
        torch.testing.assert_close(law.log_prob(torch.stack([x, x]))[1], each.sum((1, 2, 3)))


def test_too_few_curves_are_refused():
    with pytest.raises(ValueError, match="at least 4; got 3"):
        LevelCurves(torch.linspace(-1, 1, 256), curves=3)


def test_variance_runs_from_beta_tilde_to_beta():
    """Equation 7: v = -1 is β̃, v = 1 is β, 0 their geometric mean; x̂ is the inner head's
    and the mean of the step is that of Posterior and Beta."""
    process = GaussianDiffusion(Linear(-6.0, 5.0), Affine())
    z, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    s = T - 0.2
    low, high = process.beta_tilde(s, T), process.beta(s, T)
    for v, variance in ((-1.0, low), (1.0, high), (0.0, (low * high).sqrt())):
        output = torch.stack([noise, torch.full_like(noise, v)], -1)
        prediction = WithVariance(EpsPrediction())(output, z, T, process)
        inner = EpsPrediction()(noise, z, T, process)
        assert torch.equal(prediction.e_hat, inner.e_hat)
        step = Learned()(prediction, z, s, T, process)
        want = variance.reshape(2, 1, 1, 1).expand(SHAPE)
        torch.testing.assert_close(step.variance, want, rtol=1e-12, atol=0)
        for other in (Posterior(), Beta()):
            assert torch.equal(step.mean, other(inner, z, s, T, process).mean)


def test_symbol_logits_are_normalised():
    """Equation 9: ê = log_softmax of the output."""
    process = MaskedDiffusion(PowerAlpha(), 3)
    output = torch.randn(2, 3, 3, dtype=torch.float64)
    e_hat = SymbolLogits(3)(output, torch.full((2, 3), 3), T, process).e_hat
    truth = output.exp() / output.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(e_hat.exp(), truth, rtol=1e-13, atol=0)
    assert math.isclose(e_hat.exp().sum().item(), 6)


def test_heads_and_steps_refuse_what_they_cannot_use():
    """Each refusal names what is needed instead."""
    gaussian, absorbing = (
        GaussianDiffusion(Linear(-6.0, 5.0), Affine()),
        MaskedDiffusion(PowerAlpha(), 3),
    )
    z = torch.zeros(2, 3, dtype=torch.float64)
    point = XPrediction()(z, z, T, gaussian)
    with pytest.raises(ValueError, match="Mean needs GaussianDiffusion; got MaskedDiffusion"):
        Mean(4)(z, z, T, absorbing)
    with pytest.raises(
        TypeError, match="SymbolLogits needs a process of symbols; got GaussianDiffusion"
    ):
        SymbolLogits(3)(z, z, T, gaussian)
    with pytest.raises(
        ValueError, match=r"LevelLogits has 3; try WithVariance\(EpsPrediction\(\)\)"
    ):
        WithVariance(LevelLogits(torch.linspace(-1, 1, 3)))
    with pytest.raises(TypeError, match="WithVariance"):
        Learned()(point, z, T - 0.1, T, gaussian)
    values = torch.linspace(-1, 1, 3)
    with pytest.raises(TypeError, match="LevelLogits"):
        Mixture(values)(point, z, T - 0.1, T, gaussian)
    for step in (Beta(), Learned(), Mixture(values)):
        with pytest.raises(
            ValueError, match="diffusion; got MaskedDiffusion: give step=Posterior"
        ):
            step(point, z, T - 0.1, T, absorbing)


def test_logits_start_from_the_frequencies_of_each_dimension():
    """Under a network that gives zero and all noise, P(x_i = v_k|z) is the frequency of level k in
    dimension i, smoothed by K counts of the frequencies over all dimensions."""
    levels = Levels(4)
    x = torch.randint(0, 4, (5000, 2, 3)) % torch.tensor([[4, 3, 2], [1, 4, 2]])
    head = LevelLogits(levels.values, (2, 3))
    head.fit_statistics(x.to(torch.uint8))
    frequency = torch.nn.functional.one_hot(x, 4).double().mean(0)
    z, t = torch.randn(1, 2, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    noise = GaussianDiffusion(Linear(-6.0, 40.0), levels)
    got = head(torch.zeros(1, 2, 3, 4, dtype=torch.float64), z, t, noise).log_probs[0].exp()
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (got - frequency).abs().max() < 4 / 5000
    assert got.min() > 0
    symbols = SymbolLogits(4, (2, 3))
    symbols.fit_statistics(x)
    torch.testing.assert_close(symbols.log_prior, head.log_prior)
