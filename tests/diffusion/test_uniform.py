"""Uniform-state diffusion against sums over all latents, from matrices of transitions."""

import itertools
import math

import pytest
import torch
from support.closed_forms import Formula, legendre_nodes
from support.contracts import SymbolContract
from torch import Tensor
from torch.distributions import kl_divergence

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.codec.api import compress, decompress
from nelbo.codec.settings import Settings
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.symbols import Certain, Predicted
from nelbo.diffusion.terms import DiffusionRate, DiffusionTerm, ReconstructionTerm, TermDraw
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.diffusion.uniform import UniformDiffusion
from nelbo.evaluation.allocation import Strata, pilot
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.evaluation.symbol_variates import ReplacedVariate
from nelbo.sampling.samplers import ancestral
from nelbo.testing import assert_mean

K, D = 3, 2
STATES = torch.tensor(list(itertools.product(range(K), repeat=D)))  # all x, and all z


class TestUniformDiffusion(SymbolContract):
    @pytest.fixture(params=[False, True], ids=["channels", "codes"])
    def process(self, request):
        return UniformDiffusion(Linear(-4.0, 3.0), 5, as_codes=request.param, shorter=True)


def made(schedule, seed=1):
    """A model whose P_k depend on the whole of z and the time, and its table of logits."""
    with seeded(seed):
        table, lean = torch.randn(2, len(STATES), D, K, dtype=torch.float64)

    def logits(z: Tensor, level: Tensor) -> Tensor:
        at = K * z[:, 0] + z[:, 1]
        return table[at] + 0.1 * level[:, None, None] * lean[at]

    def network(features: Tensor, level: Tensor) -> Tensor:
        return logits(features.reshape(-1, D, K).argmax(-1), level)

    parts = UniformDiffusion(schedule, K), SymbolLogits(K), Posterior(), Categorical()
    return Model(Formula(network), *parts, (D,)), logits


def alpha(schedule, t):
    return schedule(torch.as_tensor(t, dtype=torch.float64)).neg().sigmoid().item()


def chances(alpha):
    """Probabilities of a symbol from each, (K, K), if it is kept with probability alpha."""
    return alpha * torch.eye(K).double() + (1 - alpha) / K


def whole(tables):
    """Probabilities of all states from those of the places, (..., D, K): (..., K^D)."""
    return torch.einsum("...i,...j->...ij", tables[..., 0, :], tables[..., 1, :]).flatten(-2)


def denoised(logits, schedule, t):
    """P_k of both places for each z, (K^D, D, K)."""
    gamma = schedule(torch.tensor(t, dtype=torch.float64)).clamp(-15, 15).expand(len(STATES))
    return logits(STATES, gamma).softmax(-1)


def back(p, s, t):
    """P(z_s|z_t) of each state z_t, (K^D, K^D), for α of s and t: q(z_s, z_t) under P_k."""
    joint = (p @ chances(s)) * chances(t / s).T[STATES]
    return whole(joint / joint.sum(-1, keepdim=True))


def decoded(p, t):
    """P(x|z_t) of each state z_t, (K^D, K^D)."""
    joint = p * chances(t).T[STATES]
    return whole(joint / joint.sum(-1, keepdim=True))


def divergence(q, p):
    return torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1)


def terms(logits, schedule, times, x):
    """Prior, reconstruction and diffusion of a state x on a grid, by sums over all z."""
    known = torch.eye(K).double()[STATES[x]].expand(len(STATES), D, K)
    q = {t: whole(chances(alpha(schedule, t))[STATES[x]]) for t in times}
    prior = divergence(q[times[-1]], torch.full((len(STATES),), K**-D, dtype=torch.float64))
    first = alpha(schedule, times[0])
    p = denoised(logits, schedule, times[0])
    reconstruction = -(q[times[0]] * decoded(p, first)[:, x].log()).sum()
    diffusion = torch.zeros(()).double()
    for s, t in itertools.pairwise(times):
        a, b, p = alpha(schedule, s), alpha(schedule, t), denoised(logits, schedule, t)
        diffusion = diffusion + (q[t] * divergence(back(known, a, b), back(p, a, b))).sum()
    return torch.stack([prior, reconstruction, diffusion])


def evidence(logits, schedule, times):
    """P(x) of all states by the chain of the model."""
    z = torch.full((len(STATES),), K**-D, dtype=torch.float64)
    for s, t in reversed(list(itertools.pairwise(times))):
        p = denoised(logits, schedule, t)
        z = z @ back(p, alpha(schedule, s), alpha(schedule, t))
    return z @ decoded(denoised(logits, schedule, times[0]), alpha(schedule, times[0]))


def jump_rate(p, known, a, change):
    """KL per unit of time of the jumps back from each state, for α = a and -α' = change.

    A symbol leaves j for i at the rate change/α/K, and comes back at this times m(j)/m(i).
    """
    total = torch.zeros(len(STATES)).double()
    for place in range(D):
        at = STATES[:, place]
        m, m_hat = (v[:, place] @ chances(a) for v in (known, p))
        u, u_hat = (v / v.gather(1, at[:, None]) for v in (m, m_hat))
        each = u * (u / u_hat).log() - u + u_hat
        total += change / a / K * each.masked_fill(torch.eye(K).bool()[at], 0.0).sum(1)
    return total


def measured(model, x, times):
    """The three terms of a state x by the package, with sums over all z for its draws."""
    one, e = torch.ones(len(STATES)).double(), STATES[x].expand(len(STATES), D)
    process = model.process

    def mean(t, cost):
        q = process.marginal(e, t * one).log_prob(STATES).exp()
        return (q * cost).sum()

    with torch.no_grad():
        first = times[0] * one
        prior = kl_divergence(process.marginal(e, one), process.prior((D,), one))[0]
        reconstruction = mean(times[0], -model.likelihood(STATES, first).log_prob(e))
        diffusion = torch.zeros(()).double()
        for s, t in itertools.pairwise(times):
            q = process.posterior(STATES, e, s * one, t * one)
            kl = kl_divergence(q, model.reverse(STATES, s * one, t * one))
            diffusion = diffusion + mean(t, kl)
    return torch.stack([prior, reconstruction, diffusion])


X, Z = (v.flatten(0, 1) for v in (STATES[:, None].expand(-1, 9, -1), STATES.expand(9, -1, -1)))


def rates(model, t):
    """The mean rate at the times t of all states x, (K^D,) each, by sums over all z."""
    now = t.repeat_interleave(len(X))
    x, z = X.repeat(len(t), 1), Z.repeat(len(t), 1)
    with torch.no_grad():
        q = model.process.marginal(x, now).log_prob(z).exp()
        rate = model.process.predicted_rate(z, x, model.predict(z, now), now)
    return (q * rate).view(len(t), len(STATES), len(STATES)).sum(2)


def continuous(model, nodes=60):
    """Minus the bound of all states x in continuous time, from 0 to 1, without the other terms."""
    u, weights = legendre_nodes(0.0, 1.0, nodes)  # t = u²: the integrand has a logarithm at 0
    return (weights * 2 * u) @ rates(model, u.square())


SCHEDULES = {"linear": Linear(-5.0, 3.0), "quadratic": PowerAlpha(2.0)}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("times", [[1.0], [0.3, 0.55, 1.0]], ids=["one step", "three"])
def test_the_bound_on_a_grid_by_enumeration(name, times):
    """Equations 4 and 5: each term, ELBO <= log P(x), and Σ_x P(x) = 1."""
    model, logits = made(SCHEDULES[name])
    log_p = evidence(logits, SCHEDULES[name], times).log()
    bounds = []
    for x in range(len(STATES)):
        wanted = terms(logits, SCHEDULES[name], times, x)
        torch.testing.assert_close(measured(model, x, times), wanted, rtol=1e-9, atol=1e-10)
        bounds.append(-wanted.sum())
    assert abs(log_p.exp().sum() - 1) < 1e-12
    assert (torch.stack(bounds) < log_p + 1e-12).all()
    assert wanted[0] > 0 or name == "quadratic"


def test_the_rate_is_that_of_the_jumps():
    """Equation 9 without masks: the KL of the jumps back, of each z, at all noise levels."""
    schedule = PowerAlpha(2.0)
    model, logits = made(schedule)
    for t in (1e-4, 0.02, 0.4, 0.9, 0.9999):
        p, a = denoised(logits, schedule, t), 1 - t * t
        for x in STATES:
            e = x.expand(len(STATES), D)
            known = torch.eye(K).double()[e]
            now = torch.full((len(STATES),), t, dtype=torch.float64)
            with torch.no_grad():
                prediction = model.predict(STATES, now)
                got = model.process.predicted_rate(STATES, e, prediction, now)
            wanted = jump_rate(p, known, a, 2 * t)
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


def test_bounds_in_continuous_time_sum_to_at_most_one():
    """Equation 1: Σ_x exp(ELBO(x)) <= 1 for any network, and finer grids approach it."""
    model, logits = made(PowerAlpha(2.0))
    bounds = continuous(model)
    assert 0.1 < (-bounds).exp().sum() < 1
    errors = []
    for steps in (64, 128, 256):
        grid = (torch.arange(1, steps + 1).double() / steps).tolist()
        errors.append(terms(logits, PowerAlpha(2.0), grid, 4).sum() - bounds[4])
    ratio = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert (errors[-1] > 0) and ((ratio - 2).abs() < 0.1).all(), errors


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_exact_opinions_cost_nothing(power):
    """Equation 1: with P_k = P(x_i = k|z but z_i) the gap is 0, so the bound is log P(x)."""
    schedule = PowerAlpha(power)
    with seeded(3):
        truth = torch.rand(K, K, dtype=torch.float64) ** 2
    truth = truth / truth.sum()

    def network(features: Tensor, level: Tensor) -> Tensor:
        z = features.reshape(-1, D, K).argmax(-1)
        found = []
        for (i, j), gamma in zip(z.tolist(), level, strict=True):
            q = chances((-gamma).sigmoid().item())
            found.append(torch.stack([truth @ q[:, j], q[:, i] @ truth]).log())
        return torch.stack(found)

    parts = UniformDiffusion(schedule, K), SymbolLogits(K), Posterior(), Categorical()
    found = continuous(Model(Formula(network), *parts, (D,)), nodes=40)
    torch.testing.assert_close(found, -truth.log().flatten(), rtol=0, atol=2e-5)


def distributions():
    """Each kind of distribution over five symbols, for 2 x 3 places."""
    with seeded(5):
        z, x = torch.randint(5, (2, 2, 3))
        logits = torch.randn(2, 3, 5, dtype=torch.float64)
    process = UniformDiffusion(Linear(-4.0, 3.0), 5)
    s, t = torch.tensor([[0.2, 0.5], [0.6, 0.9]], dtype=torch.float64)
    e_hat = logits.log_softmax(-1)
    prediction = SymbolLogits(5)(logits, z, t, process)
    return {
        "marginal": process.marginal(x, t).base_dist,
        "transition": process.transition(x, s, t).base_dist,
        "posterior": process.posterior(z, x, s, t).base_dist,
        "predicted": process.posterior(z, e_hat, s, t).base_dist,
        "decoded": process.likelihood(prediction, z, t),
    }


@pytest.mark.parametrize("name", distributions())
def test_draws_and_tables_are_those_of_the_probabilities(name):
    q = distributions()[name]
    table = torch.stack([q.log_prob(torch.full((2, 3), k)) for k in range(5)], -1)
    torch.testing.assert_close(q.log_probs, table, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(2, 3).double())
    assert torch.equal(q.mode, table.argmax(-1))
    with seeded(6):
        drawn = draw(q, None, (4000, 2, 3))
    for k in range(5):
        assert_mean((drawn == k).double(), table[..., k].exp(), 0.01)


def test_divergences_of_predictions_are_those_of_the_tables():
    a, b = distributions()["predicted"], distributions()["decoded"]
    wanted = (a.log_probs.exp() * (a.log_probs - b.log_probs)).sum(-1)
    torch.testing.assert_close(kl_divergence(a, b), wanted)


def test_samples_have_the_probabilities_of_the_chain():
    model, logits = made(PowerAlpha(2.0))
    times = [0.4, 0.7, 1.0]
    x = ancestral(model, 20_000, TimeGrid(times), seed=2)
    seen = (x[:, :1] * K + x[:, 1:] == torch.arange(K**D)).double()
    assert_mean(seen, evidence(logits, PowerAlpha(2.0), times), 0.004)


@pytest.mark.parametrize("times", [TimeGrid([0.3, 0.55, 1.0]), None], ids=["grid", "continuous"])
def test_the_bound_is_estimated(times):
    """The mean of the package's estimator, and the error that it states."""
    model, logits = made(PowerAlpha(2.0))
    each = (
        continuous(model)
        if times is None
        else torch.stack(
            [
                terms(logits, PowerAlpha(2.0), times.times.tolist(), x).sum()
                for x in range(len(STATES))
            ]
        )
    )
    off = []
    for seed in range(6):
        found = nelbo.evaluate(model, STATES.repeat(4, 1), times=times, calls=16, seed=seed)
        error = found.standard_error.monte_carlo * found.nats / found.bits_per_dim
        off.append((found.nats - each.mean().item()) / error)
    assert error < 0.1 * each.mean()
    assert 0.3 < sum(v * v for v in off) < 28, off  # χ² of 6, but for 1 in 1000 below, 10^4 above


def test_it_compresses():
    with seeded(0):
        model, _ = made(Linear(-5.0, 3.0))
    data = compress(
        model, STATES.repeat(3, 1), Settings(tuple(TimeGrid.uniform(4).times.tolist()))
    )
    assert torch.equal(decompress(data, model).x.long(), STATES.repeat(3, 1))


def test_the_ends_of_an_infinite_schedule():
    """At t = 0, z is x: decoding costs nothing, with a gradient; at t = 1 it says nothing."""
    process, x = UniformDiffusion(PowerAlpha(2.0), 5), torch.tensor([[0, 3], [4, 1]])
    zero, half, one = (torch.full((2,), v).double() for v in (0.0, 0.5, 1.0))
    assert torch.equal(process.marginal(x, zero).sample(), x)
    output = torch.randn(2, 2, 5, requires_grad=True)
    prediction = SymbolLogits(5)(output, x, zero, process)
    cost = -process.likelihood(prediction, x, zero).log_prob(x).sum()
    cost = cost + process.predicted_rate(x, x, prediction, zero).sum()
    (gradient,) = torch.autograd.grad(cost, output)
    assert cost == 0 and (gradient == 0).all()
    assert kl_divergence(process.marginal(x, one), process.prior((2,), one)).sum() == 0
    assert torch.allclose(
        process.log_snr_input(torch.cat([zero, one])).abs(), torch.tensor(15.0).double()
    )
    p = process.predicted_posterior(x, prediction, half, one)
    expected = process.marginal(x, half)  # of a certain x
    same = process.posterior(x, x, half, one)
    z = torch.tensor([[2, 3], [0, 0]])
    torch.testing.assert_close(same.log_prob(z), expected.log_prob(z))
    assert kl_divergence(same, p).isfinite().all()


class NoTable(Predicted):
    """A prediction that refuses to make the table of all symbols at all places."""

    @property
    def log_probs(self):
        raise AssertionError("a table was made")

    def table(self):
        raise AssertionError("a table was made")


def test_no_table_of_all_symbols_is_made():
    """Of 5000 symbols float32 is enough for logits: 1e-5 nats per token from float64."""
    count, process = 5000, UniformDiffusion(PowerAlpha(2.0), 5000)
    with seeded(7):
        logits, x = 3 * torch.randn(2, 6, count), torch.randint(count, (2, 6))
        s, t = torch.tensor([[0.2, 0.5], [0.4, 0.95]]).double()
        z = process.marginal(x, t).sample()
    found = []
    for dtype in (torch.float32, torch.float64):

        class P:
            def symbols(self, z, mask, dtype=dtype):
                return NoTable(logits, z, mask, dtype=dtype)

        p = P()
        kl = kl_divergence(process.posterior(z, x, s, t), process.predicted_posterior(z, p, s, t))
        rate = process.predicted_rate(z, x, p, t)
        found.append(torch.stack([kl, rate, -process.likelihood(p, z, t).log_prob(x).sum(1)]))
        process.predicted_posterior(z, p, s, t).sample()
    assert (found[1] > 0).all()
    assert ((found[0] - found[1]).abs() < 6 * 1e-5).all()


def test_what_is_beyond_a_shorter_text_costs_nothing():
    """x and z are K there; the numbers of the others are as if the text ended before."""
    process = UniformDiffusion(PowerAlpha(2.0), 5, as_codes=True, shorter=True)
    with seeded(9):
        logits, x = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(5, (2, 6))
        s, t = torch.tensor([[0.2, 0.5], [0.4, 0.95]]).double()
        x[:, 4:] = process.absent
        z = process.marginal(x, t).sample()
        before = process.posterior(z, x, s, t).sample()
    assert (z[:, 4:] == 5).all() and (z[:, :4] < 5).all()
    found = []
    for part in (slice(None), slice(4)):
        a, b, c = x[:, part], z[:, part], before[:, part]
        prediction = SymbolLogits(5)(logits[:, part], b, t, process)
        q, p = process.posterior(b, a, s, t), process.predicted_posterior(b, prediction, s, t)
        decoder = process.likelihood(prediction, b, t)
        prior = process.prior(a.shape[1:], t)
        costs = (
            process.marginal(a, t).log_prob(b),
            kl_divergence(process.marginal(a, t), prior),
            prior.log_prob(b),
            q.log_prob(c),
            kl_divergence(q, p),
            process.predicted_rate(b, a, prediction, t),
            decoder.log_prob(a).sum(1),
        )
        found.append(torch.stack(costs))
        drawn = (draw(v)[:, 4:] for v in (p, decoder))
        assert all((each == 5).all() for each in drawn)
    torch.testing.assert_close(*found)
    assert (found[0] != 0).all()


def test_what_is_known_is_certain():
    q = UniformDiffusion(PowerAlpha(2.0), 4).marginal(torch.tensor([[1, 2]]), torch.tensor([0.5]))
    assert isinstance(q.base_dist.source, Certain) and math.isclose(
        q.base_dist.log_probs[0, 0, 1].exp(), 0.75 + 0.25 / 4
    )
    with pytest.raises(ValueError, match="levels must be at least 2; got 1"):
        UniformDiffusion(PowerAlpha(), 1)


T = torch.full((len(X),), 0.6, dtype=torch.float64)
TERMS = {"rate": DiffusionRate(T), "step": DiffusionTerm(T, T / 2), "first": ReconstructionTerm(T)}


@pytest.mark.parametrize("name", TERMS)
def test_the_control_variate_is_the_cost_of_an_opinion_less_its_mean(name):
    """By enumeration of z for each x: the mean is zero, and an opinion of the symbols that does
    not depend on z costs as much for all z once the variate is taken off."""
    model, _ = made(PowerAlpha(2.0))
    process, term = model.process, TERMS[name]
    with seeded(5):
        opinion = torch.randn(D, K, dtype=torch.float64).log_softmax(-1)
    said = Prediction(opinion.expand(len(X), D, K))
    variate = ReplacedVariate(model, STATES)
    drawn = TermDraw(X, term, Z, said, None, None)
    within = variate.within([drawn, drawn])[0, :, 0].view(len(STATES), -1)
    q = process.marginal(X, T).log_prob(Z).exp().view(len(STATES), -1)
    none = torch.zeros(len(STATES), dtype=torch.float64)
    torch.testing.assert_close((q * within).sum(1), none, rtol=0, atol=1e-12)
    assert within.abs().min() > 0.01
    if name == "rate":
        cost = process.rate(Z, X, said.e_hat, T)
    else:  # of the step to time 0, where nothing is replaced, that decodes
        s = term.before
        cost = kl_divergence(process.posterior(Z, X, s, T), process.posterior(Z, said.e_hat, s, T))
    if name == "first":
        torch.testing.assert_close(cost, -process.likelihood(said, Z, T).log_prob(X).sum(1))
    left = cost.view(len(STATES), -1) - within
    torch.testing.assert_close(left, left[:, :1].expand_as(left), rtol=1e-10, atol=1e-10)


def test_rare_early_changes_do_not_surprise():
    """They cost much, and few draws without one would look as if there were none. What is left
    of the cost, given a neighbouring draw's opinion, has a small third moment."""
    model, _ = made(PowerAlpha(3.0))
    x, z, other = (v.flatten() for v in torch.meshgrid(*[torch.arange(K**D)] * 3, indexing="ij"))
    x, z, other = STATES[x], STATES[z], STATES[other]
    t = torch.full((len(x),), 0.2, dtype=torch.float64)
    with torch.no_grad():
        said, opinion = model.predict(z, t), model.predict(other, t)
        cost = model.process.predicted_rate(z, x, said, t)
        pair = [
            TermDraw(x, DiffusionRate(t), at, of, None, None)
            for at, of in ((z, said), (other, opinion))
        ]
        left = cost - ReplacedVariate(model, STATES).within(pair)[0, :, 0]
    q = model.process.marginal(x, t)
    weight = (q.log_prob(z) + q.log_prob(other)).exp()

    def moment(v: Tensor, power: int) -> float:
        of_x = (weight * v).view(len(STATES), -1).sum(1).repeat_interleave(K ** (2 * D))
        return (weight * (v - of_x).abs() ** power).sum().item()

    assert moment(left, 2) < 0.3 * moment(cost, 2)
    assert moment(left, 3) < 0.2 * moment(cost, 3)


def test_a_pilot_keeps_coefficients_that_are_right():
    """An opinion that does not depend on z leaves nothing of the cost at a coefficient of 1: the
    penalty of the pilot's fit shrinks coefficients to it, where 0 would leave rare large costs."""
    opinion = torch.randn(D, K, generator=torch.Generator().manual_seed(1)).double()
    network = Formula(lambda z, level: opinion.expand(len(z), D, K))
    process = UniformDiffusion(PowerAlpha(3.0), K)
    model = Model(network, process, SymbolLogits(K), Posterior(), Categorical(), (D,))
    with seeded(2), measuring(model):
        strata = Strata(ContinuousTime())
        controls = ControlVariates(model, STATES, strata.edges)
        found = pilot(strata, controls, Batch(STATES), 16)
    # shrunk to 0, they are 0 where 16 rows of a stratum saw no change
    assert (found.within[1:, 0] - 1).abs().max() < 0.3


def test_continuous_time_is_the_default():
    model, _ = made(PowerAlpha(2.0))
    found = nelbo.evaluate(model, STATES, calls=8)
    assert found.steps is None and found.terms.prior == 0 and found.terms.reconstruction == 0
    assert ContinuousTime().first == 0
