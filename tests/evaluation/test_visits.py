"""The mean of all examples from those visited, and its error, against what numbers really do."""

import math

import pytest
import torch

from nelbo.evaluation.survey import SurveyEstimate, repeated

N, CELLS, REPLICATES, BLOCK = 120, 3, 2, 6


@pytest.fixture
def population():
    """Known costs and mean costs of each example, (N, 1 + C) each."""
    known = torch.randn(N, 1 + CELLS, dtype=torch.float64)
    return known, known + 0.3 * torch.randn(N, 1 + CELLS, dtype=torch.float64) + 0.1


def visit(truth, blocks, replicates=REPLICATES):
    """Costs of these blocks, with noise; the prior has none."""
    costs = []
    for rows in blocks:
        noise = torch.randn(len(rows), replicates, 1 + CELLS, dtype=torch.float64)
        noise[..., 0] = 0
        costs.append(truth[rows][:, None] + noise)
    return costs


def sample(known, truth, visited, twice=N):
    blocks = torch.randperm(N).split(BLOCK)
    there = blocks[: visited // BLOCK]
    return SurveyEstimate(
        blocks, visit(truth, there[:twice]) + visit(truth, there[twice:], 1), known
    )


@pytest.mark.parametrize("twice", [2, 20], ids=["some twice", "all twice"])
@pytest.mark.parametrize("visited", [12, 60, N])
@pytest.mark.parametrize("columns", [slice(None), slice(1, 2)], ids=["all", "a cell"])
def test_the_mean_is_unbiased_and_its_error_true(population, visited, columns, twice):
    """The mean of 3000 means is the truth, and that of the squared errors is their variance, known
    to 2.6 %; with few blocks, or two that are visited more than once, it is a little less."""
    known, truth = population
    found = [sample(known, truth, visited, twice) for _ in range(3000)]
    means = torch.tensor([f.mean(columns) for f in found], dtype=torch.float64)
    errors = torch.tensor([f.monte_carlo(columns) for f in found], dtype=torch.float64)
    expected = truth[:, columns].sum(1).mean()
    assert abs(means.mean() - expected) < 4 * means.std() / math.sqrt(3000)
    assert 0.9 < errors.square().mean() / means.var() < 1.1


def test_a_few_second_visits_know_of_what_is_rare():
    """One cost in fifty has ten times the noise, and 30 of 1140 examples are visited twice: the
    intervals of 1000 samples hold the truth."""
    many = 1200
    known = torch.randn(many, 1 + CELLS, dtype=torch.float64)
    truth = known + 0.1 * torch.randn(many, 1 + CELLS, dtype=torch.float64)
    blocks, hits = torch.arange(many).split(BLOCK), 0
    for _ in range(1000):
        scale = torch.where(torch.rand(many, 2, 1) < 0.02, 10.0, 1.0)
        costs = truth[:, None] + scale * torch.randn(many, 2, 1 + CELLS, dtype=torch.float64)
        there = [costs[rows] if g < 5 else costs[rows, :1] for g, rows in enumerate(blocks)]
        found = SurveyEstimate(blocks, there[:190], known)
        hits += abs(found.mean() - truth.sum(1).mean().item()) < 1.96 * found.monte_carlo()
    assert 0.91 <= hits / 1000 <= 0.98, hits


def test_all_need_nothing_known(population):
    """To the last bit, in whatever order they were visited."""
    known, truth = population
    found = sample(known, truth, N)
    blind = SurveyEstimate(
        found.blocks, found.costs, torch.zeros(1, 1).double().expand(N, 1 + CELLS)
    )
    for columns in (slice(None), slice(0, 1), slice(2, None)):
        assert found.mean(columns) == blind.mean(columns)
    assert found.error() == blind.error()
    each = -found.bound.elbo
    assert found.mean() == pytest.approx(each.mean().item(), rel=1e-12)
    assert (each - truth.sum(1)).std() < 2.5
    assert found.error().data == pytest.approx(truth.sum(1).std().item() / N**0.5, rel=0.2)


def test_what_was_not_visited_has_no_bound(population):
    found = sample(*population, 60)
    each = found.bound.elbo
    assert each.shape == (N,) and each.isnan().sum() == N - 60
    assert not each[found.rows].isnan().any()
    assert torch.equal(each.isnan(), found.error_of_each.isnan())


def test_some_of_a_sample_are_visited_twice(population):
    """Eight examples at least; of a sample that grows to be all, two and thirty."""
    known, truth = population
    found = sample(known, truth, 12, 1)
    assert repeated(2, BLOCK, N) == 1 and repeated(N // BLOCK, BLOCK, N) == 5
    missing = found.missing(0.28)
    assert min(missing) == 2 and list(missing.values()) == sorted(missing.values(), reverse=True)
    whole = found.missing(1e-9)
    assert len(whole) == 18 and sum(n == 2 for n in whole.values()) == 4
    assert torch.isfinite(found.error_of_each[found.rows]).all()


def test_what_is_missing_for_a_target(population):
    """First others, then those that were visited least; the error is then about the target."""
    known, truth = population
    for target, again in ((0.2, False), (0.07, True)):
        reached = []
        for _ in range(50):
            found = sample(known, truth, 30)
            while found.monte_carlo() > target:
                missing = found.missing(target)
                there = len(found.costs)
                assert (min(missing) >= there) == (there < len(found.blocks))
                new = [c for g, n in missing.items() for c in visit(truth, [found.blocks[g]], n)]
                found = found.joined(dict(zip(missing, new, strict=True)))
                replicates = [block.shape[1] for block in found.costs]
                assert max(replicates) - min(replicates) <= 1
            assert (max(replicates) > REPLICATES) == again
            reached.append(found.monte_carlo())
        assert sum(reached) / 50 > 0.9 * target


@pytest.mark.parametrize("again", [False, True], ids=["sample", "replicates"])
def test_ending_by_the_spread_biases_no_mean(again):
    """Costs of a long tail: rounds end early where few of those that are large were seen, and a
    plain mean is too low by a sixth of the target, whether others or the same are visited."""
    size, target, seeds = (64, 0.1, 300) if again else (800, 0.14, 800)
    blocks, off, plain = torch.arange(size).split(8), [], []
    for _ in range(seeds):
        truth = torch.ones(size) if again else torch.empty(size).exponential_()

        def costs(some, truth=truth):
            noise = {
                g: torch.empty(8, r).exponential_().pow(1.5) / 1.3293 for g, r in some.items()
            }
            part = {g: truth[blocks[g]][:, None] for g in some}
            return {
                g: (part[g] * (noise[g] if again else 1 + 0.1 * noise[g]))[..., None].double()
                for g in some
            }

        found = SurveyEstimate(blocks, [], torch.zeros(size, 1).double())
        begun = {g: 2 for g in range(8)} if again else {g: 1 + (g == 0) for g in range(5)}
        found = found.joined(costs(begun))
        while not found.stated() <= target:
            found = found.joined(costs(found.missing(target)))
        expected = truth.mean().item() * (1 if again else 1.1)
        off.append((found.mean() - expected) / target)
        plain.append((SurveyEstimate(blocks, found.costs, found.known).mean() - expected) / target)
    assert sum(plain) / seeds < -0.1
    assert abs(sum(off) / seeds) < 0.1
