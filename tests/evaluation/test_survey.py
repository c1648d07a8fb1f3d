"""The mean of all examples from those visited, and its error, against what numbers really do."""

import math

import pytest
import torch
from torch.nn.functional import pad

from nelbo._utils.numerics import seeded
from nelbo.evaluation.survey import SurveyEstimate, drawn_again

N, STRATA, REPLICATES, BLOCK = 120, 3, 2, 6


@pytest.fixture
def population():
    """Known costs and mean costs of each example, (N, 1 + C) each."""
    known = torch.randn(N, 1 + STRATA, dtype=torch.float64)
    return known, known + 0.3 * torch.randn(N, 1 + STRATA, dtype=torch.float64) + 0.1


def root(found):
    """The root of the estimated Monte Carlo variance, without the widening of what is stated."""
    return root_of_sum(found._summed(slice(None)))


def root_of_sum(found):
    """The same of an estimate of one column, the sum of some."""
    within, _, between = found._parts()
    share = len(found.rows) / len(found.known)
    return torch.sqrt(share * within.sum() + (1 - share) * between.sum()).item()


def visit(truth, blocks, replicates=REPLICATES, share=1.0):
    """Costs of these blocks, with the noise of a share of the draws; the prior has none."""
    rows = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.long)
    noise = torch.randn(len(rows), replicates, 1 + STRATA, dtype=torch.float64)
    noise[..., 0] = 0
    return list((truth[rows][:, None] + noise / share**0.5).split([len(of) for of in blocks]))


def sample(known, truth, visited, twice=N, share=1.0):
    blocks = torch.randperm(N).split(BLOCK)
    there = blocks[: visited // BLOCK]
    costs = visit(truth, there[:twice], max(REPLICATES, round(1 / share)), share) + visit(
        truth, there[twice:], 1
    )
    return SurveyEstimate(blocks, costs, known, share=share)


@pytest.mark.parametrize(
    ("visited", "twice", "share"),
    [
        pytest.param(12, 2, 1, id="12"),
        pytest.param(60, 2, 1, id="60, some twice"),
        pytest.param(60, 20, 1, id="60, all twice", marks=pytest.mark.slow),
        pytest.param(N, 2, 1, id="all, some twice", marks=pytest.mark.slow),
        pytest.param(N, 5, 1 / 2, id="all, some by halves"),
        pytest.param(N, 5, 1 / 3, id="all, some by thirds", marks=pytest.mark.slow),
        pytest.param(N, 20, 1, id="all, all twice"),
    ],
)
def test_the_mean_is_unbiased_and_its_error_true(population, visited, twice, share):
    """The mean of 3000 means is the truth, and that of the squared errors is their variance, known
    to 2.6 %; with few blocks, or two that are visited more than once, it is a little less."""
    known, truth = population
    found = [sample(known, truth, visited, twice, share) for _ in range(3000)]
    for columns in (slice(None), slice(1, 2)):  # the whole bound, and one stratum
        sums = [f._summed(columns) for f in found]
        means = torch.stack([of.means for of in sums])[:, 0]
        assert means[0] == found[0].mean(columns)
        errors = torch.tensor([root_of_sum(of) for of in sums], dtype=torch.float64)
        expected = truth[:, columns].sum(1).mean()
        assert abs(means.mean() - expected) < 4 * means.std() / math.sqrt(3000)
        assert 0.9 < errors.square().mean() / means.var() < 1.1


@pytest.mark.slow
def test_a_few_second_visits_know_of_what_is_rare():
    """One cost in fifty has ten times the noise, and 30 of 1140 examples are visited twice: the
    intervals of 1000 samples hold the truth."""
    many = 1200
    known = torch.randn(many, 1 + STRATA, dtype=torch.float64)
    truth = known + 0.1 * torch.randn(many, 1 + STRATA, dtype=torch.float64)
    blocks, hits = torch.arange(many).split(BLOCK), 0
    for _ in range(1000):
        scale = torch.where(torch.rand(many, 2, 1) < 0.02, 10.0, 1.0)
        costs = truth[:, None] + scale * torch.randn(many, 2, 1 + STRATA, dtype=torch.float64)
        there = [costs[rows] if g < 5 else costs[rows, :1] for g, rows in enumerate(blocks)]
        found = SurveyEstimate(blocks, there[:190], known)
        hits += abs(found.mean() - truth.sum(1).mean().item()) < 1.96 * root(found)
    assert 0.91 <= hits / 1000 <= 0.98, hits


def test_all_need_nothing_known(population):
    """In whatever order they were visited."""
    known, truth = population
    found = sample(known, truth, N)
    blind = SurveyEstimate(
        found.blocks, found.costs, torch.zeros(1, 1).double().expand(N, 1 + STRATA)
    )
    for columns in (slice(None), slice(0, 1), slice(2, None)):
        assert found.mean(columns) == pytest.approx(blind.mean(columns), rel=1e-12)
    assert found.error() == blind.error()
    each = -found.bound.elbo
    assert found.mean() == pytest.approx(each.mean().item(), rel=1e-12)
    assert (each - truth.sum(1)).std() < 2.5
    assert found.error().data == pytest.approx(truth.sum(1).std().item() / N**0.5, rel=0.2)


def test_data_beneath_the_noise_have_an_error_all_the_same():
    """Their spread is unknown, and not zero: the stated error is seldom less than half of it."""
    stated = []
    with seeded(3):
        for _ in range(200):
            cost = 0.5 * torch.randn(60, 1, 1).double() + 3 * torch.randn(60, 2, 1).double()
            known = torch.zeros(60, 3).double()
            blocks = torch.arange(60).split(10)
            found = SurveyEstimate(blocks, [pad(c, (1, 1)) for c in cost.split(10)], known)
            stated.append(found.error().data)
    assert min(stated) > 0
    assert (torch.tensor(stated) > 0.5 * 0.5 / 60**0.5).double().mean() > 0.95


def test_what_was_not_visited_has_no_bound(population):
    found = sample(*population, 60)
    each = found.bound.elbo
    assert each.shape == (N,) and each.isnan().sum() == N - 60
    assert not each[found.rows].isnan().any()
    assert torch.equal(each.isnan(), found.error_of_each.isnan())


def test_some_of_a_sample_are_visited_twice(population):
    """Two at least; of all, two and thirty."""
    known, truth = population
    found = sample(known, truth, 12, 1)
    assert drawn_again(12, N) == 2 and drawn_again(N, N) == 32
    assert torch.isfinite(found.error_of_each[found.rows]).all()


def test_further_rounds_reach_a_target(population):
    """First others, then those that were visited least, an eighth more each time."""
    known, truth = population
    for target, again in ((0.2, False), (0.07, True)):
        reached = []
        for _ in range(50):
            found, replicates = sample(known, truth, 30), [REPLICATES] * 5
            while root(found) > target:
                further, there = found.further(), len(found.costs)
                assert set(further.values()) == {1}
                assert len(further) == min(len(found.blocks), -(-sum(replicates) // 8))
                assert next(iter(further)) == there or there == len(found.blocks)
                new = [visit(truth, [found.blocks[g]], 1)[0] for g in further]
                found = found.joined(dict(zip(further, new, strict=True)))
                replicates = [block.shape[1] for block in found.costs]
            assert (max(replicates) > REPLICATES) == again
            reached.append(root(found))
        assert sum(reached) / 50 > 0.9 * target


def test_a_rate_varies_as_what_sizes_leave_of_the_costs():
    """Over samples of texts of 2 to 40 tokens the stated error of the bound per token is its
    spread; that of the mean per text is more than 5 times as large."""
    rates, stated, of_mean = [], [], []
    with seeded(5):
        for _ in range(300):
            size = torch.randint(2, 41, (160,)).double()
            cost = 3 * size + size.sqrt() * torch.randn(160, dtype=torch.float64)
            noise = 0.5 * size.sqrt() * torch.randn(2, 160, dtype=torch.float64)
            found = SurveyEstimate(
                torch.arange(160).split(20),
                [pad(part.T[..., None], (2, 0)) for part in (cost + noise).split(20, 1)],
                torch.zeros(160, 3, dtype=torch.float64),
            )
            rates.append(found.mean() / size.mean().item())
            stated.append(found.error(size).total / size.mean().item())
            of_mean.append(found.error().total / size.mean().item())
    spread = torch.tensor(rates).std().item()
    mean = torch.tensor(stated).square().mean().sqrt().item()
    assert 0.9 < mean / spread < 1.15
    assert torch.tensor(of_mean).mean() > 5 * spread
