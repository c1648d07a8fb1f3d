"""Which terms to draw: unbiased for any allocation, and a pilot that says what is left."""

import math

import pytest
import torch
from support.known_models import MODELS
from torch import Tensor

from nelbo._utils.numerics import seeded
from nelbo.data import as_examples
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid, stratified
from nelbo.evaluation import allocation as allocate
from nelbo.evaluation.allocation import (
    EVEN,
    Proposal,
    Strata,
    _apart,
    _lenders,
    estimate,
    even,
    pilot,
    stratum_of,
    visits,
)
from nelbo.evaluation.allocation import fit_proposal as fit_rows
from nelbo.evaluation.control_variates import ControlVariates, NoControlVariates
from nelbo.testing import assert_mean


@pytest.fixture(autouse=True)
def _seed():
    with seeded(43), torch.no_grad():
        yield


draw = Strata._draw
TIMES = pytest.mark.parametrize(
    "times", [TimeGrid([0.05, 0.3, 1.0]), ContinuousTime(0.05)], ids=["grid", "continuum"]
)


def arbitrary(count: int, variates: int, features: int, least: float = 0.3) -> Proposal:
    """Any probabilities and any coefficients."""
    p = least / count + (1 - least) * torch.rand(count, dtype=torch.float64).softmax(0)
    within, between = (torch.randn(count, n, dtype=torch.float64) for n in (variates, features))
    return Proposal(p / p.sum(), within, 0.3 * between, torch.full_like(p, math.nan))


def test_uniform_draws_fall_where_they_should():
    """Cell c with frequency p_c, evenly over the cell; the share is in [0, 1)."""
    p = torch.tensor([0.3, 1e-5, 0.25, 0.4, 0.05 - 1e-5], dtype=torch.float64)
    n = 1_000_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    cell, share = stratum_of(p, u)
    assert (torch.bincount(cell, minlength=5) - n * p).abs().max() <= 1
    assert ((share >= 0) & (share < 1)).all()
    for c in range(5):
        inside = share[cell == c]
        steps = inside.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / n / p[c]), atol=1e-9, rtol=0)
        assert inside[0] < 1.01 / (n * p[c])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    cell, share = stratum_of(p, ends)
    assert cell.tolist() == [0, 4]
    assert ((share >= 0) & (share < 1)).all()


@TIMES
@pytest.mark.parametrize(("draws", "each"), [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_any_allocation_is_unbiased(name, draws, each, times):
    """E[y] is reconstruction + diffusion of each example, whatever p, k and b are."""
    known = MODELS[name]()
    data = known.examples(69)
    truth = known.bound(data[:3], times)
    cells = Strata(times)
    controls = ControlVariates(known.model, data, cells.edges)
    x = as_examples(data[:3])
    n = 1500 // draws
    features = controls.between(x).shape[-1]
    allocation = arbitrary(cells.count, cells.variates(controls), features)
    u = torch.rand(3, n, draws, dtype=torch.float64)
    costs = estimate(cells, controls, allocation, Batch(x), u, each)
    assert costs.shape == (3, n, cells.count)
    scale = truth[:, 1:].sum(1).max().item()
    assert_mean(costs.sum(-1).T, truth[:, 1:].sum(1), error=0.4 * scale)
    assert_mean(costs[..., 0].T, truth[:, 1], error=0.4 * scale)


@pytest.mark.parametrize("name", ["levels", "symbols"])
def test_draws_lend_each_other_their_context(name):
    """v of two draws has mean zero: the context of each is the other's, never its own. So has that
    of the place in the cell; the mean of two draws of one visit is that of their v."""
    known = MODELS[name]()
    data = as_examples(known.examples(69))
    cells = Strata(TimeGrid([0.3, 0.6, 0.8, 1.0]))
    controls = ControlVariates(known.model, data, cells.edges)
    n, half = 6000, controls.variates // 2
    share = torch.rand(n, 2, dtype=torch.float64)
    replicate = torch.zeros(2, dtype=torch.long)
    one = replicate[:1]
    for c in range(cells.count - 1):  # at time 1 all symbols are hidden, and nothing varies
        cell = torch.tensor([c, max(0, c - 1)]).expand(n, 2)
        _, v = cells.visit(controls, Batch(data[:1].expand(n, 2)), cell, share, replicate)
        _, both = cells.visit(
            controls, Batch(data[:1].expand(n, 2)), cell[:, :1], share[:, :1], one, 2
        )
        for found in (v, both):
            assert not found[..., :half].any()  # of those alone
            found = found[..., half:]
            size = found.std(0).clamp(min=1e-300)  # a place in the first cell is none
            assert_mean(found / size, 0.0, error=1.01 / math.sqrt(n))


def test_who_lends():
    """The nearest of the same example and of no later replicate, a noisier one counting four times
    as far; never itself, so that the first replicate's only draw is alone."""
    place = 9 * torch.rand(5, 7, dtype=torch.float64)
    replicate = torch.tensor([0, 1, 1, 1, 2, 2, 3])
    lender = _lenders(place, replicate)
    assert (lender[:, 0] == -1).all()
    for i in range(5):
        for j in range(1, 7):
            others = [k for k in range(7) if k != j and replicate[k] <= replicate[j]]
            gap = {k: (place[i, k] - place[i, j]).item() for k in others}
            nearest = min(others, key=lambda k: 4 * gap[k] if gap[k] > 0 else -gap[k])
            assert lender[i, j] == 7 * i + nearest


def test_replicates_are_uncorrelated():
    """The part taken off one replicate depends on others' noise; their covariance is none."""
    known = MODELS["levels"]()
    data = as_examples(known.examples(69))
    cells = Strata(TimeGrid([0.3, 0.6, 1.0]))
    controls = ControlVariates(known.model, data, cells.edges)
    n = 6000
    allocation = arbitrary(cells.count, cells.variates(controls), controls.between(data).shape[-1])
    x, u = data[:1].expand(n, 2), torch.rand(n, 2, 1, dtype=torch.float64)
    one, two = estimate(cells, controls, allocation, Batch(x), u).sum(-1).unbind(1)
    product = (one - one.mean()) * (two - two.mean()) / (one.std() * two.std())
    assert_mean(product, 0.0, error=product.std().item() * 1.01 / math.sqrt(n))


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_taken_off_it_is_importance_sampling(name):
    """k = b = 0 and any p, several stratified draws, averaged: the same expectation, and each
    cell's own cost in its own place."""
    known = MODELS[name]()
    times = TimeGrid.uniform(4)
    data = known.examples(69)
    x = as_examples(data[:1]).expand(400, 2)
    cells = Strata(times)
    controls = ControlVariates(known.model, data, cells.edges)
    allocation = arbitrary(cells.count, cells.variates(controls), 1)
    zero = torch.zeros(cells.count, controls.between(x[:1]).shape[-1], dtype=torch.float64)
    allocation = Proposal(allocation.probability, 0 * allocation.within, zero, allocation.left)
    u = torch.stack([stratified(1, 5) for _ in range(400)])
    costs = estimate(cells, controls, allocation, Batch(x), u)[:, 0]
    truth = known.bound(data[:1], times)[0]
    assert_mean(costs[:, 0], truth[1], error=0.1 * truth.sum().item())
    for c in range(1, cells.count):
        edge = cells.edges.tolist()
        part = known.terms(data[:1], Between(edge[c - 1], edge[c]))[0, 2]
        assert_mean(costs[:, c], part, error=0.1 * truth.sum().item())


class Between(TimeGrid):
    """One term of a grid."""

    def __init__(self, s: float, t: float) -> None:
        self.times = torch.tensor([s, t], dtype=torch.float64)
        self.first = s


def test_even():
    """No pilot: a share for the reconstruction, the other cells alike, nothing taken off."""
    known = MODELS["levels"]()
    cells = Strata(TimeGrid.uniform(6))
    controls = ControlVariates(known.model, known.examples(69), cells.edges)
    allocation = even(cells, controls, 4, 0.25)
    expected = torch.tensor([0.25, 0.15, 0.15, 0.15, 0.15, 0.15], dtype=torch.float64)
    torch.testing.assert_close(allocation.probability, expected)
    assert even(cells, controls, 4, 0.01).probability[0].item() == pytest.approx(1 / 6)
    assert even(Strata(TimeGrid.uniform(1)), controls, 4, 0.1).probability.tolist() == [1.0]
    assert allocation.within.shape == (6, cells.variates(controls))
    assert allocation.between.shape == (6, 4)
    assert not allocation.within.any() and not allocation.between.any()
    assert allocation.left.isnan().all()


def test_two_draws_of_a_visit_stand_half_a_cell_apart(monkeypatch):
    """In one cell, and each lends to the other; where nothing is lent each draw visits a cell."""
    known = MODELS["levels"]()
    data = as_examples(known.examples(69))
    cells = Strata(ContinuousTime(0.05))
    controls = ControlVariates(known.model, data, cells.edges)
    seen = []
    monkeypatch.setattr(
        Strata, "_draw", lambda self, *args: (seen.append(args), draw(self, *args))[1]
    )
    cell, share = torch.randint(33, (5, 1)), torch.rand(5, 1, dtype=torch.float64)
    cells.visit(controls, Batch(data[:5]), cell, share, torch.zeros(1, dtype=torch.long), 2)
    _, _, cells_of, places, replicate = seen[0]
    assert torch.equal(cells_of, cell.expand(5, 2))
    gap = (places[:, 1] - places[:, 0]) % 1
    torch.testing.assert_close(gap, torch.full_like(gap, 0.5))
    assert _lenders(cells_of + places, replicate).tolist() == [
        [2 * i + 1, 2 * i] for i in range(5)
    ]
    assert [visits(n, controls) for n in (1, 2, 3)] == [(1, 1), (1, 2), (3, 1)]
    assert visits(2, NoControlVariates(known.model, cells.edges)) == (2, 1)


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
def test_cells_cover_the_times(times: TimeDiscretization, count: int):
    """From the first time to 1, without a gap; the reconstruction comes first."""
    cells = Strata(times)
    assert cells.count == count
    assert len(cells.edges) == count
    assert cells.edges[0] == times.first
    assert cells.edges[-1] == 1
    assert (cells.edges.diff() > 0).all()


def fit(cost: Tensor, v: Tensor, phi: Tensor) -> Proposal:
    """Fit costs (C, n), as many rows in each cell."""
    cell = torch.arange(len(cost)).repeat_interleave(cost.shape[1])
    return fit_rows(len(cost), cell, cost.flatten(), v.flatten(0, 1), phi.flatten(0, 1))


def synthetic(groups: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Costs of nine cells, each of its own size, made of a variate, a feature and noise."""
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
    # a ridge of 2 % of each coefficient; noise of 0.1/√20000
    torch.testing.assert_close(found.within, torch.full((9, 1), 0.8).double(), rtol=0.025, atol=0)
    b = torch.stack([torch.full_like(size, 5.0), 0.5 * size], 1)
    torch.testing.assert_close(found.between[:, 1], b[:, 1], rtol=0.04, atol=0)
    assert ((found.between[:, 0] - 5).abs() < 4 * size / math.sqrt(20_000)).all()
    # .. so that 2 % of 0.8 and of 0.5 are left, beside the noise
    torch.testing.assert_close(found.left, 0.1 * size, rtol=0.04, atol=0)
    best = (1 - EVEN) * found.left / found.left.sum() + EVEN / 9
    torch.testing.assert_close(found.probability, best)
    assert found.probability.sum().item() == pytest.approx(1)


def test_the_more_rows_the_less_a_cell_borrows():
    """Slopes that bend from cell to cell: of few rows neighbours smear them, of many less."""
    slopes = 1 + torch.linspace(-1, 1, 9, dtype=torch.float64).square()

    def error(rows: int) -> float:
        v = torch.randn(9, rows, dtype=torch.float64)
        cost = slopes[:, None] * v + 0.01 * torch.randn_like(v)
        found = fit(cost, v[..., None], torch.ones(9, rows, 1, dtype=torch.float64))
        # the reconstruction borrows nothing
        return (found.within[1:, 0] - slopes[1:]).square().mean().sqrt().item()

    assert error(4000) < error(16) / 2


def test_heavy_tails_are_drawn_more_evenly():
    """Normal noise of 64 rows a cell leaves a share of 3 (3 - 1)/80 even; Student's noise of four
    degrees of freedom, whose variance they know worse, more; that of two values no more than the
    least."""

    def even_share(noise: Tensor) -> float:
        size = torch.logspace(-1, 1, 9, dtype=torch.float64)
        nothing = torch.zeros(*noise.shape, 1, dtype=torch.float64)
        found = fit(size[:, None] * noise, nothing, nothing + 1)
        best = found.left / found.left.sum()
        shares = (found.probability - best) / (1 / 9 - best)
        torch.testing.assert_close(shares, shares[:1].expand(9))
        return shares[0].item()

    normal = torch.distributions.Normal(0.0, 1.0).sample((9, 64)).double()
    heavy = torch.distributions.StudentT(4.0).sample((9, 64)).double()
    two = torch.tensor([-1.0, 1.0]).double().repeat(9, 32)
    assert even_share(normal) == pytest.approx(0.075, abs=0.015)
    assert even_share(heavy) > 1.5 * even_share(normal)
    assert even_share(two) == pytest.approx(EVEN)


def test_what_is_left_is_not_flattered():
    """Eight rows a cell, and features that mean nothing: over 200 pilots the stated root mean
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


def test_a_cell_that_saw_nothing_is_not_starved():
    """A cell whose few rows all cost zero, among cells of cost, keeps a share near theirs, and
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
    x, cells = known.examples(69).long(), Strata(ContinuousTime())
    asked = []

    def keep(count: int, cell: Tensor, *rows: Tensor) -> Proposal:
        asked.append(cell.bincount(minlength=count))
        return fit_rows(count, cell, *rows)

    monkeypatch.setattr(allocate, "fit_proposal", keep)
    pilot(cells, ControlVariates(known.model, x, cells.edges), Batch(x), 18, 1, 2)
    first = asked[0]
    assert first[0] == pytest.approx(4 * first[1:].double().mean().item(), rel=0.1)
    assert first[1:].min() >= 2  # of fewer there is no variance


def test_what_the_pilot_hardly_saw_it_does_not_judge():
    """All of a pilot's examples alike but for 1e-5 of a feature: no coefficient follows from that,
    for the other examples are whole units away."""
    cost, v, phi, _ = synthetic(8, 0.5)
    phi[..., 1] = 1 + 1e-5 * torch.randn(9, 8, dtype=torch.float64)
    found = fit(cost, v, phi)
    assert (found.between[:, 1].abs() < 0.01 * cost.std(1)).all()


def test_no_cost_at_all():
    """Cells are alike where nothing costs anything, and no share is NaN."""
    zero = torch.zeros(5, 8, dtype=torch.float64)
    found = fit(zero, torch.randn(5, 8, 1, dtype=torch.float64), torch.ones(5, 8, 2).double())
    torch.testing.assert_close(found.probability, torch.full((5,), 0.2).double())
    assert found.within.isfinite().all() and not found.between.any()


def test_replicates_of_one_draw_stand_as_far_apart_as_independent_ones():
    """Two of them are independent; of more, the one that lends is the nearest of half of them."""
    with seeded(0):
        apart = {r: _apart(4000, 1, r) for r in (2, 8)}
    assert apart[2].min() >= 0
    assert apart[2].max() <= 0.5
    # mean of the least of m distances, each uniform on [0, 1/2]: 1/2 (m + 1)
    assert apart[2].mean().item() == pytest.approx(1 / 4, abs=0.01)
    assert apart[8].mean().item() == pytest.approx(1 / 10, abs=0.01)
