"""Which terms to draw: unbiased for any allocation, and a pilot that says what is left."""

import math
from dataclasses import replace

import pytest
import torch
from support.known_models import MODELS
from torch import Tensor

from nelbo._utils.numerics import seeded
from nelbo.data import as_examples
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid, stratified
from nelbo.evaluation import allocation
from nelbo.evaluation.allocation import (
    DOUBT,
    EVEN,
    Proposal,
    Strata,
    estimate,
    even,
    pilot,
    stratum_of,
)
from nelbo.evaluation.allocation import fit_proposal as fit_rows
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.testing import assert_mean


@pytest.fixture(autouse=True)
def _seed():
    with seeded(43), torch.no_grad():
        yield


TIMES = pytest.mark.parametrize(
    "times", [TimeGrid([0.05, 0.3, 1.0]), ContinuousTime(0.05)], ids=["grid", "continuum"]
)


def arbitrary(count: int, variates: int, features: int, least: float = 0.3) -> Proposal:
    """Any probabilities and any coefficients."""
    p = least / count + (1 - least) * torch.rand(count, dtype=torch.float64).softmax(0)
    within, between = (torch.randn(count, n, dtype=torch.float64) for n in (variates, features))
    unknown = torch.full_like(p, math.nan)
    return Proposal(p / p.sum(), within, 0.3 * between, unknown, unknown[0], unknown[0])


def test_uniform_draws_fall_where_they_should():
    """Stratum c with frequency p_c, evenly over the stratum; the share is in [0, 1)."""
    p = torch.tensor([0.3, 1e-5, 0.25, 0.4, 0.05 - 1e-5], dtype=torch.float64)
    n = 1_000_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    stratum, share = stratum_of(p, u)
    assert (torch.bincount(stratum, minlength=5) - n * p).abs().max() <= 1
    assert ((share >= 0) & (share < 1)).all()
    for c in range(5):
        inside = share[stratum == c]
        steps = inside.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / n / p[c]), atol=1e-9, rtol=0)
        assert inside[0] < 1.01 / (n * p[c])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    stratum, share = stratum_of(p, ends)
    assert stratum.tolist() == [0, 4]
    assert ((share >= 0) & (share < 1)).all()


@TIMES
@pytest.mark.parametrize(("draws", "calls"), [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_any_allocation_is_unbiased(name, draws, calls, times):
    """E[y] is reconstruction + diffusion of each example, whatever p, k and b are."""
    known = MODELS[name]()
    data = known.examples(69)
    truth = known.bound(data[:3], times)
    strata = Strata(times)
    controls = ControlVariates(known.model, data, strata.edges, calls == 2)
    x = as_examples(data[:3])
    n = 1500 // draws
    features = controls.between(x).shape[-1]
    proposal = arbitrary(strata.count, controls.columns + 1, features)
    u = torch.rand(3 * n, draws, dtype=torch.float64)
    many = Batch(x.repeat_interleave(n, 0))
    costs = estimate(strata, controls, proposal, many, u).view(3, n, -1)
    assert costs.shape == (3, n, strata.count)
    scale = truth[:, 1:].sum(1).max().item()
    assert_mean(costs.sum(-1).T, truth[:, 1:].sum(1), error=0.4 * scale)
    assert_mean(costs[..., 0].T, truth[:, 1], error=0.4 * scale)


@pytest.mark.parametrize("name", ["levels", "symbols"])
def test_the_control_variates_of_a_pair_have_mean_zero(name):
    """The context of each draw is the other's, never its own, so v has mean zero; so has the
    position in the stratum."""
    known = MODELS[name]()
    data = as_examples(known.examples(69))
    strata = Strata(TimeGrid([0.3, 0.6, 0.8, 1.0]))
    controls = ControlVariates(known.model, data, strata.edges)
    n = 6000
    x, place = Batch(data[:1].expand(n, 2)), torch.rand(n, dtype=torch.float64)
    for c in range(strata.count - 1):  # at time 1 all symbols are hidden, and nothing varies
        _, v = strata.draw(controls, x, torch.full((n,), c), place)
        size = v.std(0).clamp(min=1e-300)  # a place in the first stratum is none
        assert (size[:-1] > 1e-9).all()
        assert_mean(v / size, 0.0, error=1.01 / math.sqrt(n))


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_taken_off_it_is_importance_sampling(name):
    """k = b = 0 and any p, several stratified draws, averaged: the same expectation, and each
    stratum's own cost in its own place."""
    known = MODELS[name]()
    times = TimeGrid.uniform(4)
    data = known.examples(69)
    x = as_examples(data[:1]).expand(400, 2)
    strata = Strata(times)
    controls = ControlVariates(known.model, data, strata.edges, pairs=False)
    proposal = arbitrary(strata.count, controls.columns + 1, 1)
    zero = torch.zeros(strata.count, controls.between(x[:1]).shape[-1], dtype=torch.float64)
    proposal = replace(proposal, within=0 * proposal.within, between=zero)
    u = torch.cat([stratified(1, 5) for _ in range(400)])
    costs = estimate(strata, controls, proposal, Batch(x), u)
    truth = known.bound(data[:1], times)[0]
    assert_mean(costs[:, 0], truth[1], error=0.1 * truth.sum().item())
    for c in range(1, strata.count):
        edge = strata.edges.tolist()
        part = known.terms(data[:1], Between(edge[c - 1], edge[c]))[0, 2]
        assert_mean(costs[:, c], part, error=0.1 * truth.sum().item())


class Between(TimeGrid):
    """One term of a grid."""

    def __init__(self, s: float, t: float) -> None:
        self.times = torch.tensor([s, t], dtype=torch.float64)
        self.first = s


def test_even():
    """No pilot: a share for the reconstruction, the other strata alike, and taken off is only what
    the network says at the other call of a pair."""
    known = MODELS["levels"]()
    strata = Strata(TimeGrid.uniform(6))
    controls = ControlVariates(known.model, known.examples(69), strata.edges)
    proposal = even(strata, controls, 0.25)
    expected = torch.tensor([0.25, 0.15, 0.15, 0.15, 0.15, 0.15], dtype=torch.float64)
    torch.testing.assert_close(proposal.probability, expected)
    assert even(strata, controls, 0.01).probability[0].item() == pytest.approx(1 / 6)
    assert even(Strata(TimeGrid.uniform(1)), controls, 0.1).probability.tolist() == [1.0]
    assert proposal.within.shape == (6, controls.columns + 1)
    assert proposal.between.shape == (6, controls.features)
    assert not proposal.within[:, [0, 1, 3]].any() and not proposal.between.any()
    assert (proposal.within[:, 2] == 1).all()
    assert proposal.left.isnan().all()


def test_two_calls_of_a_draw_stand_half_a_stratum_apart(monkeypatch):
    """And each is the context of the other, where there are contexts."""
    known = MODELS["levels"]()
    data = as_examples(known.examples(69))
    strata = Strata(ContinuousTime(0.05))
    controls = ControlVariates(known.model, data, strata.edges)
    seen = []
    within = ControlVariates.within
    monkeypatch.setattr(
        ControlVariates, "within", lambda self, draws: (seen.append(draws), within(self, draws))[1]
    )
    strata.draw(controls, Batch(data[:5]), torch.full((5,), 7), torch.rand(5).double())
    ((one, other),) = seen
    gap = (one.term.t - other.term.t).abs() / (strata.edges[7] - strata.edges[6])
    torch.testing.assert_close(gap, torch.full_like(gap, 0.5))
    assert controls.calls == 2


@pytest.mark.parametrize(("name", "calls"), [("levels", 2), ("symbols", 2), ("gaussian", 1)])
def test_draws_are_pairs_where_they_give_a_context(name, calls):
    """And where there are control variates, which pairs are for."""
    known = MODELS[name]()
    x, edges = as_examples(known.examples(69)), Strata(ContinuousTime(0.05)).edges
    assert ControlVariates(known.model, x, edges).calls == calls
    alone = ControlVariates(known.model, x, edges, piloted=False)
    assert alone.calls == calls and alone.usual.sum() == calls - 1
    assert ControlVariates(known.model, x, edges, pairs=False).calls == 1
    assert ControlVariates(known.model, None, edges).calls == 1


@pytest.mark.parametrize(
    ("times", "count"),
    [
        (TimeGrid.uniform(1), 1),
        (TimeGrid.uniform(2), 2),
        (TimeGrid.uniform(100), 33),
        (ContinuousTime(0.1), 33),
    ],
    ids=["1", "2", "100", "continuum"],
)
def test_strata_cover_the_times(times: TimeDiscretization, count: int):
    """From the first time to 1, without a gap; the reconstruction comes first."""
    strata = Strata(times)
    assert strata.count == count
    assert len(strata.edges) == count
    assert strata.edges[0] == times.first
    assert strata.edges[-1] == 1
    assert (strata.edges.diff() > 0).all()


def fit(cost: Tensor, v: Tensor, phi: Tensor, large: bool = False) -> Proposal:
    """Fit costs (C, n), as many rows in each stratum."""
    stratum = torch.arange(len(cost)).repeat_interleave(cost.shape[1])
    rows = stratum, cost.flatten(), v.flatten(0, 1), phi.flatten(0, 1)
    return fit_rows(len(cost), *rows, torch.full(v.shape[2:], large))


def synthetic(groups: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Costs of nine strata, each of its own size, made of a variate, a feature and noise."""
    size = torch.logspace(-1, 1, 9, dtype=torch.float64)
    v, f, e = torch.randn(3, 9, groups, dtype=torch.float64)
    v = v * size[:, None]
    cost = 5 + 0.8 * v + size[:, None] * (0.5 * f + noise * e)
    phi = torch.stack([torch.ones_like(f), f], -1)
    return cost, v[..., None], phi, size


def test_the_fit_finds_the_coefficients():
    """k = 0.8 for all, b = 0.5 of each size, levels 5, to the error of least squares."""
    cost, v, phi, size = synthetic(20_000, 0.1)
    found = fit(cost, v, phi)
    # the ridge takes DOUBT of each coefficient; noise of 0.1/√20000
    ridge = 1 / (1 + DOUBT)
    within, between = torch.full_like(found.within, 0.8 * ridge), 0.5 * ridge * size
    torch.testing.assert_close(found.within, within, rtol=0.015, atol=0)
    torch.testing.assert_close(found.between[:, 1], between, rtol=0.03, atol=0)
    assert ((found.between[:, 0] - 5).abs() < 4 * size / math.sqrt(20_000)).all()
    # .. so that as much of 0.8 and of 0.5 is left, beside the noise
    left = math.hypot(0.1, (1 - ridge) * math.hypot(0.8, 0.5))
    torch.testing.assert_close(found.left, left * size, rtol=0.03, atol=0)
    evenly = EVEN / 20_000
    best = (1 - evenly) * found.left / found.left.sum() + evenly / 9
    torch.testing.assert_close(found.probability, best)
    assert found.probability.sum().item() == pytest.approx(1)


def test_the_more_rows_the_less_a_stratum_borrows():
    """Slopes that bend between strata: of few rows neighbours smear them, of many less."""
    slopes = 1 + torch.linspace(-1, 1, 9, dtype=torch.float64).square()

    def error(rows: int) -> float:
        v = torch.randn(9, rows, dtype=torch.float64)
        cost = slopes[:, None] * v + 0.01 * torch.randn_like(v)
        found = fit(cost, v[..., None], torch.ones(9, rows, 1, dtype=torch.float64))
        # the reconstruction borrows nothing
        return (found.within[1:, 0] - slopes[1:]).square().mean().sqrt().item()

    assert error(4000) < error(16) / 2


def test_few_rows_are_trusted_less():
    """The share that is spread evenly falls with the rows of a stratum."""

    def even_share(rows: int) -> float:
        size = torch.logspace(-1, 1, 9, dtype=torch.float64)
        nothing = torch.zeros(9, rows, 1, dtype=torch.float64)
        found = fit(size[:, None] * torch.randn(9, rows).double(), nothing, nothing + 1)
        best = found.left / found.left.sum()
        shares = (found.probability - best) / (1 / 9 - best)
        torch.testing.assert_close(shares, shares[:1].expand(9))
        return shares[0].item()

    assert even_share(8) == pytest.approx(EVEN / 8)
    assert even_share(6400) == pytest.approx(EVEN / 6400)


def test_what_is_left_is_not_flattered():
    """Eight rows a stratum, and features that mean nothing: over 200 pilots the stated root mean
    square of what is left is not below that of fresh rows, nor above it by half."""
    stated, fresh = [], []
    for _ in range(200):
        cost, v, phi, size = synthetic(8, 0.5)
        phi = torch.cat([phi, torch.randn(9, 8, 4, dtype=torch.float64)], -1)
        found = fit(cost, v, phi)
        cost, v, phi, size = synthetic(8, 0.5)
        phi = torch.cat([phi, torch.randn(9, 8, 4, dtype=torch.float64)], -1)
        left = cost - (v * found.within[:, None]).sum(-1) - (phi * found.between[:, None]).sum(-1)
        # where neighbours differ tenfold in size the ends borrow much: look at the middle
        fresh.append((left[2:7] / size[2:7, None]).square().mean())
        stated.append((found.left[2:7] / size[2:7]).square().mean())
    ratio = (torch.stack(stated).mean() / torch.stack(fresh).mean()).sqrt().item()
    assert 1 < ratio < 1.5, ratio


def test_a_variate_whose_rare_values_were_not_seen_has_no_large_coefficient():
    """What rows show of it is small, and may go with their costs by chance; but where it is known
    to be as large as the costs, so may what they do not show."""
    v = 0.02 * torch.randn(9, 16, 1, dtype=torch.float64)
    cost = -30 * v[..., 0] + 0.1 * torch.randn(9, 16, dtype=torch.float64)
    phi = torch.ones(9, 16, 1, dtype=torch.float64)
    assert (fit(cost, v, phi).within < -15).all()
    assert (fit(cost, v, phi, large=True).within.abs() < 2.5).all()
    # and one that is seen keeps its own
    v = torch.randn(9, 16, 1, dtype=torch.float64)
    cost = 0.8 * v[..., 0] + 0.5 * torch.randn(9, 16, dtype=torch.float64)
    difference = fit(cost, v, phi, large=True).within - fit(cost, v, phi).within
    assert difference.abs().max() < 0.05


def test_a_stratum_that_saw_nothing_is_not_starved():
    """A stratum whose few rows all cost zero, among strata of cost, keeps a share near theirs, and
    does not take from them the coefficient of their variate."""
    _, v, _, _ = synthetic(8, 0.0)
    v = v / v.std(1, keepdim=True)
    cost = v[..., 0] + 0.3 * torch.randn(9, 8, dtype=torch.float64)
    cost[4] = 0.0
    phi = torch.ones(9, 8, 1, dtype=torch.float64)
    found = fit(cost, v, phi)
    assert found.probability[4] > 0.4 / 9
    assert (found.within > 0.4).all()


def test_the_reconstruction_is_asked_as_often_as_others_borrow(monkeypatch):
    """It has no neighbours to lean on, and what is rare in it may be most of the variance."""
    known = MODELS["levels"]()
    x, strata = known.examples(69).long(), Strata(ContinuousTime())
    asked = []

    def keep(count: int, stratum: Tensor, *rows: Tensor) -> Proposal:
        asked.append(stratum.bincount(minlength=count))
        return fit_rows(count, stratum, *rows)

    monkeypatch.setattr(allocation, "fit_proposal", keep)
    pilot(strata, ControlVariates(known.model, x, strata.edges), Batch(x), 18)
    first = asked[0]
    assert first[0] == pytest.approx(4 * first[1:].double().mean().item(), rel=0.1)
    assert first[1:].min() >= 2  # of fewer there is no variance


@pytest.mark.parametrize("name", ["gaussian", "levels"])
def test_the_pilot_foresees_the_variance_of_fresh_draws(name):
    """And the part of it that is between examples, against the truth of each."""
    known, times = MODELS[name](), TimeGrid.uniform(4)
    x = as_examples(known.examples(100))
    strata = Strata(times)
    controls = ControlVariates(known.model, x, strata.edges)
    found = pilot(strata, controls, Batch(x), 512)
    seen = found.known(controls.between(x))
    y = torch.stack(
        [
            estimate(strata, controls, found, Batch(x), stratified(100), seen).sum(1)
            for _ in range(24)
        ],
        1,
    )
    left = y - seen.sum(1, keepdim=True)
    effect = known.bound(x, times)[:, 1:].sum(1) - seen.sum(1)
    variance = (left - left.mean()).square().mean()
    assert 0.85 < found.variance / variance < 1.6
    assert abs(found.effect - effect.var()) < 0.3 * effect.var() + 0.05 * variance


def test_what_the_pilot_hardly_saw_it_does_not_judge():
    """All of a pilot's examples alike but for 1e-5 of a feature: no coefficient follows from that,
    for the other examples are whole units away."""
    cost, v, phi, _ = synthetic(8, 0.5)
    phi[..., 1] = 1 + 1e-5 * torch.randn(9, 8, dtype=torch.float64)
    found = fit(cost, v, phi)
    assert (found.between[:, 1].abs() < 0.01 * cost.std(1)).all()


def test_no_cost_at_all():
    """Where nothing costs anything strata are alike, and nothing is not a number."""
    zero = torch.zeros(5, 8, dtype=torch.float64)
    found = fit(zero, torch.randn(5, 8, 1, dtype=torch.float64), torch.ones(5, 8, 2).double())
    torch.testing.assert_close(found.probability, torch.full((5,), 0.2).double())
    assert found.within.isfinite().all() and not found.between.any()
