"""The absorbing process where everything can be enumerated: D = 2 dimensions of K = 3 symbols."""

import itertools

import numpy as np
import pytest
import torch
from support.closed_forms import Formula, MaskChain, legendre_nodes, states
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.elbo import (
    Bound,
    diffusion_rate,
    diffusion_term,
    prior_term,
    reconstruction_term,
)
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Linear, PowerAlpha, Schedule
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid, elbo, iid
from nelbo.testing import assert_mean

K, D = 3, 2
STATES = torch.tensor(states(K, D))
EXAMPLES = list(itertools.product(range(K), repeat=D))


@pytest.fixture(autouse=True)
def _seed():
    with seeded(9):
        yield


def table_model(shown: np.ndarray, schedule: Schedule) -> Model:
    """P(x_i = k|z) from a table over all states z, shape (S, D, K)."""
    log_probs = torch.tensor(shown).log()

    def table(features: Tensor, level: Tensor) -> Tensor:
        z = features.reshape(-1, D, K + 1).argmax(-1)
        return log_probs[z[:, 0] * (K + 1) + z[:, 1]]

    return Model(
        Formula(table),
        MaskedDiffusion(schedule, K),
        SymbolLogits(K),
        Posterior(),
        Categorical(),
        shape=(D,),
    )


def arbitrary() -> np.ndarray:
    """Predictions of which nothing is special."""
    return torch.randn(len(STATES), D, K, dtype=torch.float64).softmax(-1).numpy()


def true_conditionals(joint: np.ndarray) -> np.ndarray:
    """P(x_i = k| the symbols of z that show), shape (S, D, K)."""
    out = np.empty((len(STATES), D, K))
    for row, (a, b) in zip(out, STATES.tolist(), strict=True):
        row[0] = joint.sum(1) if b == K else joint[:, b] / joint[:, b].sum()
        row[1] = joint.sum(0) if a == K else joint[a] / joint[a].sum()
    return out


def over_states(model: Model, x: Tensor, t: Tensor, values: Tensor) -> Tensor:
    """E_q(z_t|x) of values given for every state."""
    weights = model.process.marginal(model.embed(x.expand_as(STATES)), t).log_prob(STATES).exp()
    return torch.where(weights > 0, weights * values, 0.0).sum()


def exact_bound(model: Model, x: tuple[int, ...], times: TimeDiscretization) -> Bound:
    """The three terms with the expectations over z_t taken over all states (and over time by
    quadrature that is exact for polynomials of degree 39)."""
    x = torch.tensor(x)
    xs = x.expand_as(STATES)
    e = model.embed(xs)
    first = torch.full((len(STATES),), times.first, dtype=torch.float64)
    prior = prior_term(model, x[None], torch.ones(1, dtype=torch.float64))[0]
    decoded = -model.likelihood(STATES, first).log_prob(xs)
    reconstruction = over_states(model, x, first, decoded)
    diffusion = torch.zeros((), dtype=torch.float64)
    if isinstance(times, TimeGrid):
        for s, t in itertools.pairwise(times.times):
            s, t = s.expand(len(STATES)), t.expand(len(STATES))
            q, p = model.process.posterior(STATES, e, s, t), model.reverse(STATES, s, t)
            diffusion = diffusion + over_states(model, x, t, kl_divergence(q, p))
    else:
        for t, weight in zip(*legendre_nodes(times.first, 1.0, 20), strict=True):
            t = t.expand(len(STATES))
            rate = model.process.rate(STATES, e, model.predict(STATES, t).e_hat, t)
            diffusion = diffusion + weight * over_states(model, x, t, rate)
    return Bound(prior, reconstruction, diffusion)


CHAINS = pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (PowerAlpha(), TimeGrid.uniform(1)),
        (PowerAlpha(), TimeGrid.uniform(3)),
        (PowerAlpha(), TimeGrid([0.1, 0.35, 1.0])),
        (Linear(-3.0, 2.0), TimeGrid([0.3, 0.6, 1.0])),
        (Schedule.from_betas([0.2, 0.5, 0.3]), TimeGrid.uniform(3)),
    ],
    ids=["T=1", "uniform", "uneven", "symbols left at T", "betas"],
)


@CHAINS
def test_elbo_and_evidence_by_enumeration(schedule, times):
    """Equations 1, 5 and 9: over all paths z_1..z_T, log P(x) = ELBO + KL, and the
    library's three terms, summed over all states, are that ELBO; for each of the 9 x."""
    shown = arbitrary()
    model = table_model(shown, schedule)
    chain = MaskChain(model.process.alpha(times.times).tolist(), shown)
    for x in EXAMPLES:
        evidence, bound, gap = chain.bound(x)
        assert abs(evidence - bound - gap) < 1e-12
        got = exact_bound(model, x, times).elbo.item()
        assert abs(got - bound) < 1e-12
        # With one step and no symbol left, z_1 is all masks under q and P alike.
        assert gap > 1e-3 or len(times.times) == 1


@CHAINS
def test_the_enumerated_model_is_normalised(schedule, times):
    """Equation 9: Σ_x P(x) = 1, so no bound above is of an improper model."""
    shown = arbitrary()
    chain = MaskChain(table_model(shown, schedule).process.alpha(times.times).tolist(), shown)
    assert abs(sum(np.exp(chain.bound(x)[0]) for x in EXAMPLES) - 1) < 1e-12


@pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (PowerAlpha(), TimeGrid.uniform(3)),
        (Linear(-3.0, 2.0), TimeGrid([0.3, 0.6, 1.0])),
        # From 0 on, E rate² = ∫ dt/t: the mean is right and the variance infinite.
        (PowerAlpha(), ContinuousTime(0.05)),
        (Linear(-3.0, 2.0), ContinuousTime()),
    ],
    ids=["grid", "symbols left at T", "continuum", "continuum, symbols left"],
)
def test_terms_by_draws_are_the_enumerated_ones(schedule, times):
    """Equations 5 and 9: `elbo.py` by draws, each term and each t separately."""
    model = table_model(arbitrary(), schedule)
    x = (2, 0)
    truth = exact_bound(model, x, times)
    n = 60_000
    xs, ones = torch.tensor(x).expand(n, D), torch.ones(n, dtype=torch.float64)
    with torch.no_grad():
        draws = reconstruction_term(model, xs, ones * times.first).cost
        assert_mean(draws, truth.reconstruction, error=0.01)
        got = elbo(model, xs, times, u=iid(n))
        assert_mean(got.diffusion, truth.diffusion, error=0.03)
        torch.testing.assert_close(got.prior, truth.prior.expand(n), rtol=0, atol=1e-14)
        if isinstance(times, TimeGrid):
            total = 0.0
            for s, t in itertools.pairwise(times.times):
                draws = diffusion_term(model, xs, ones * s, ones * t).cost
                total += draws.mean().item()
                q = model.process.posterior(
                    STATES, model.embed(xs[:16]), ones[:16] * s, t * ones[:16]
                )
                kl = kl_divergence(q, model.reverse(STATES, ones[:16] * s, ones[:16] * t))
                assert_mean(draws, over_states(model, xs[0], t * ones[:16], kl), error=0.01)
            assert abs(total - truth.diffusion) < 0.04
        else:
            for t in (0.2, 0.7):
                draws = diffusion_rate(model, xs, ones * t).cost
                rate = model.process.rate(
                    STATES,
                    model.embed(xs[:16]),
                    model.predict(STATES, t * ones[:16]).e_hat,
                    t * ones[:16],
                )
                assert_mean(draws, over_states(model, xs[0], t * ones[:16], rate), error=0.04)


def joint_table() -> np.ndarray:
    joint = torch.randn(K * K, dtype=torch.float64).mul(1.5).softmax(0)
    return joint.reshape(K, K).numpy()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps_cost_the_mutual_information_over_t(steps):
    """Equations 1 and 9, with exact conditionals: E[ log P(x) − ELBO ] = I(x_1; x_2)/T.

    Given what shows, the model's symbols are independent; the truth's are not, and only a step
    that reveals both at once pays, KL = I. Each of them is revealed in one of T steps (the
    decoder is the last), uniformly since α_t = 1 − t: the same one with probability 1/T.
    """
    joint = joint_table()
    model = table_model(true_conditionals(joint), PowerAlpha())
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = (joint * np.log(joint / product)).sum()
    assert information > 0.1
    gap = sum(
        joint[x] * (np.log(joint[x]) - exact_bound(model, x, TimeGrid.uniform(steps)).elbo.item())
        for x in EXAMPLES
    )
    assert abs(gap - information / steps) < 1e-12


def test_continuous_time_costs_nothing():
    """Equation 9, the limit: with exact conditionals the ELBO is log P(x), for every x;
    two symbols are never revealed at once."""
    joint = joint_table()
    model = table_model(true_conditionals(joint), PowerAlpha())
    for x in EXAMPLES:
        bound = exact_bound(model, x, ContinuousTime())
        assert bound.prior == 0
        assert bound.reconstruction == 0
        assert abs(bound.elbo.item() - np.log(joint[x])) < 1e-12


def test_continuous_time_does_not_depend_on_the_schedule():
    """Equation 9: between the same α's at the ends, any path of α costs the same."""
    shown = arbitrary()

    class Bent(Schedule):
        """Linear(-3, 2) at t² instead of t."""

        def forward(self, t: Tensor) -> Tensor:
            return -3 + 5 * t.double().square()

    for x in EXAMPLES[:3]:
        straight = exact_bound(table_model(shown, Linear(-3.0, 2.0)), x, ContinuousTime()).elbo
        bent = exact_bound(table_model(shown, Bent()), x, ContinuousTime()).elbo
        torch.testing.assert_close(straight, bent, rtol=0, atol=1e-10)


def test_grids_approach_the_continuum_at_first_order():
    """Equations 5 and 9: the bound on a grid tends to the continuous one like 1/T."""
    model = table_model(arbitrary(), PowerAlpha())
    limit = exact_bound(model, (1, 2), ContinuousTime()).elbo
    errors = [
        (exact_bound(model, (1, 2), TimeGrid.uniform(n)).elbo - limit).item()
        for n in (8, 16, 32, 64)
    ]
    ratios = np.log2(np.abs(np.array(errors[:-1]) / errors[1:]))
    assert ((ratios > 0.95) & (ratios < 1.05)).all()


def test_a_wrong_symbol_on_show_is_impossible():
    """Equation 9: P(x|z_1) copies what shows, so it excludes every other symbol."""
    model = table_model(arbitrary(), PowerAlpha())
    z = torch.tensor([[1, K], [1, 2]])
    t = torch.full((2,), 0.5, dtype=torch.float64)
    x = torch.tensor([[0, 0], [1, 2]])
    torch.testing.assert_close(
        model.likelihood(z, t).log_prob(x), torch.tensor([-torch.inf, 0.0], dtype=torch.float64)
    )
