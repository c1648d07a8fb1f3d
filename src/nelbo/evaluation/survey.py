r"""From the costs of visited examples to the mean over all examples, with its error.

A visited example i of block g has the cost L_ir = prior_i + Σ_cells cost_ir in the replicates
r = 1..R_g. Strata are common to a block, so that only its replicates are independent. If all N
examples are visited,

    mean           mean_i mean_r L_ir
    Monte Carlo²   Σ_g (n_g/N)² w_g²/R_g,  w_g² = var_r( mean_{i in g} L_ir )   another seed
    data²          ( var_i(mean_r L_ir) - mean_i(w_i²/R_g) ) / N,  w_i² = var_r( L_ir )  other data

If only a random sample S of n is, the costs k_i, which are known for every example without the
network, enter for all (the regression estimator in two stages: Cochran, Sampling Techniques, 1977,
sections 7.1 and 10.4):

    mean           mean_{all i} k_i + mean_{i in S}( mean_r L_ir - k_i )
    Monte Carlo²   (1 - n/N) s²/n + n/N (that of the mean over S)², s² = var_S( mean_r L_ir - k_i )

If the size of further rounds follows from the spread of earlier ones, the visits end the sooner
the fewer rare large costs were seen, and a plain mean is too low: E mean = μ - cov(mean, s²)/s².
So the weight of a visit is the inverse of the number of visits that would have been made without
its cost, n_{-i} ∝ s²_{-i}, which is independent of that cost: E[y_i / n_{-i}] = μ E[1 / n_{-i}].

Most examples of a sample are visited once, R_g = 1. For them w_i² is s² times its share of noise
among the examples visited twice (rare large costs enter both factors), with some caution if these
are few, and w_g² = w_i²/n_g.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nelbo.diffusion.elbo import Bound
from nelbo.evaluation.intervals import errors, freedoms, typical, widened
from nelbo.evaluation.result import StandardError

FURTHER = 1 / 32  # growth of a sample in one round, at least, as a share of the visited blocks
TWICE = (8, 1 / 32, 32)  # examples visited twice: at least; share of a sample; in a full sample
CAUTION = 8  # weight of the assumption w² = s², in examples visited twice


def repeated(blocks: int, block: int, examples: int) -> int:
    """Return how many blocks of a sample to visit twice; they give w², whose weight is n/N."""
    least, share, most = TWICE
    visited = min(blocks * block, examples)
    return max(1, round(max(least, share * visited, most * (visited / examples) ** 2) / block))


@dataclass(frozen=True)
class SurveyEstimate:
    """The costs of n of N examples, in nats, and estimates from them.

    Args:
        blocks: rows of all examples in blocks, of which the first are visited.
        costs: of each visited block the prior and all cells, the first of which is the
            reconstruction, in each replicate; shapes (n_g, R_g, 1 + C).
        known: known part of these costs for all examples, shape (N, 1 + C).
        first: number of visits in the first round, which did not depend on costs; all of them
            where left out.
    """

    blocks: Sequence[Tensor]
    costs: Sequence[Tensor]
    known: Tensor
    first: int | None = None

    @property
    def rows(self) -> Tensor:
        """Rows of the visited examples, (n,)."""
        return torch.cat(list(self.blocks[: len(self.costs)]))

    @property
    def bound(self) -> Bound:
        """The bound of each example, in the order of the data, (N,); NaN where not visited."""
        prior, reconstruction, *diffusion = self._means().unbind(1)
        terms = prior, reconstruction, sum(diffusion, torch.zeros_like(prior))
        return Bound(*map(self._in_order, terms))

    @property
    def error_of_each(self) -> Tensor:
        """The Monte Carlo error of each example's bound, likewise; NaN where it is unknown."""
        return self._in_order(errors(self._left(slice(None))))

    @property
    def made(self) -> int:
        """Number of visits to all examples."""
        return sum(block.shape[0] * block.shape[1] for block in self.costs)

    def _means(self) -> Tensor:
        """Return the means over the replicates, (n, 1 + C)."""
        parts = zip(self.costs, self._of_replicates(), strict=True)
        return torch.cat([(block * weight[:, None]).sum(1) for block, weight in parts])

    def _of_replicates(self) -> list[Tensor]:
        """Return the weights of the replicates of each block, (R_g,), which add up to 1."""
        equal = [torch.ones(b.shape[1]).double() / b.shape[1] for b in self.costs]
        again = all(block.shape[1] > 1 for block in self.costs)
        if self.first is None or not again:
            return equal
        means = [block.mean(0) for block in self._totals(slice(None))]
        each = [len(b) ** 2 / b.shape[1] for b in self.costs]
        whole = sum(n * mean.var() for n, mean in zip(each, means, strict=True))
        return [
            self._weights(1 + n * (_without(mean) - mean.var()) / whole)
            for n, mean in zip(each, means, strict=True)
        ]

    def _of_examples(self) -> Tensor:
        """Return the weights of the examples of a sample, (n,), which add up to 1."""
        left = torch.cat([block.mean(1) for block in self._left(slice(None))])
        if self.first is None:
            return torch.full_like(left, 1 / len(left))
        within, between, share = self._variances(slice(None))
        ratio = _without(left) / left.var()
        # the number of visits that the error requires: (1 - n/N) s²/n + w²/N
        rest = share * (between - within)
        return self._weights(ratio * between / (between + (ratio - 1) * rest))

    def _weights(self, ratio: Tensor) -> Tensor:
        """Return the weights of visits, (n,), from the share of visits made without each."""
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        weight = 1 / (len(ratio) * ratio.clamp(min=(self.first or self.made) / self.made))
        return weight + (1 - weight.sum()) / len(weight)

    def _totals(self, columns: slice) -> list[Tensor]:
        """Return sums of some columns of each example and replicate, (n_g, R_g) per block."""
        return [block[..., columns].sum(2) for block in self.costs]

    def _left(self, columns: slice) -> list[Tensor]:
        """Return the same less their known part."""
        known = self.known[:, columns].sum(1)
        parts = zip(self._totals(columns), self.blocks, strict=False)
        return [total - known[rows, None] for total, rows in parts]

    def _noise(self, columns: slice, caution: float = 0.0) -> list[Tensor]:
        """Return w_i² of each example, (n_g,) per block."""
        alike = math.nan
        if len({block.shape[1] > 1 for block in self.costs}) == 2:
            alike, _ = typical(self._left(columns), caution)
        return [
            b.var(1) if b.shape[1] > 1 else torch.full((len(b),), alike).double()
            for b in self._totals(columns)
        ]

    def _in_order(self, each: Tensor) -> Tensor:
        return each.new_full((len(self.known),), math.nan).index_put((self.rows,), each)

    def mean(self, columns: slice = slice(None)) -> float:
        """Return the mean of some columns over all N examples."""
        means = self._means()[:, columns].sum(1)
        if len(self.rows) == len(self.known):
            return means.mean().item()
        known = self.known[:, columns].sum(1)
        return (known.mean() + self._of_examples() @ (means - known[self.rows])).item()

    def monte_carlo(self, columns: slice = slice(None)) -> float:
        """Return the root of the estimated Monte Carlo variance of this mean."""
        within, between, share = self._variances(columns)
        return math.sqrt((1 - share) * between + share * within)

    def stated(self, columns: slice = slice(None)) -> float:
        """Return the Monte Carlo error to state with this mean; NaN where it is unknown."""
        within, each, between = self._parts(columns)
        share = len(self.rows) / len(self.known)
        parts = torch.cat([share * within, (1 - share) * between])
        error = parts.sum().sqrt().item()
        each = torch.cat([each, torch.ones_like(between)])
        known = freedoms(parts, each)
        drawn_again = all(block.shape[1] > 1 for block in self.costs) and not len(between)
        if drawn_again and not math.isnan(known):
            # few draws see only part of a heavy tail, and where they do, the mean is off as well
            known = max(1.0, known * min(1.0, known / each.sum().item()))
        return error * widened(known) if error > 0 else math.nan

    def _variances(self, columns: slice) -> tuple[float, float, float]:
        """Return variances of the mean over S, by its draws and by S with its draws; and n/N."""
        within, _, between = self._parts(columns)
        return within.sum().item(), between.sum().item(), len(self.rows) / len(self.known)

    def _parts(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return independent parts of the variance of the mean over S.

        Returns:
            Parts of the variance by its draws; their degrees of freedom; and parts of the variance
            by S and its draws, with one degree of freedom each.
        """
        visited = len(self.rows)
        # with few examples visited twice the noise may look small by chance: the caution accounts
        # for their few degrees of freedom
        noises = self._noise(columns, CAUTION)
        parts, once = [], 0.0
        for block, noise in zip(self._totals(columns), noises, strict=True):
            size, replicates = block.shape
            if replicates > 1:
                of_mean = block.mean(0).var() / replicates
                parts.append(((size / visited) ** 2 * of_mean.item(), replicates - 1.0))
            else:
                once += (size / visited**2 * noise.mean()).item()
        within, each = torch.tensor([*parts, (once, visited - 1.0)] if once else parts).double().T
        if visited == len(self.known):
            return within, each, within[:0]
        left = torch.cat([block.mean(1) for block in self._left(columns)])
        return within, each, (left - left.mean()).square() / (visited * (visited - 1))

    def error(self) -> StandardError:
        """Return the standard error of the mean bound."""
        each, monte_carlo = self._means().sum(1), self.stated()
        if len(each) == 1:
            return StandardError(math.nan, math.nan, monte_carlo)
        noises = self._noise(slice(None))
        counts = [block.shape[1] for block in self.costs]
        noise = torch.cat([w / n for w, n in zip(noises, counts, strict=True)]).mean()
        spread = (each.var() - noise).clamp(min=0) / len(self.known)
        data = spread.sqrt().item() * widened(len(each) - 1.0)
        return StandardError(math.hypot(data, monte_carlo), data, monte_carlo)

    def missing(self, error: float) -> dict[int, int]:
        """Return the blocks to visit, and their replicates, to reach a Monte Carlo error in nats.

        They are new blocks; if none are left, those with the fewest replicates again.
        """
        within, between, share = self._variances(slice(None))
        there, replicates = len(self.costs), [block.shape[1] for block in self.costs]
        if there == len(self.blocks):
            again = sum(replicates) * (within / error**2 - 1)
            least = sorted(range(there), key=lambda g: replicates[g])
            repeats = range(math.ceil(max(again, FURTHER * there)))
            return Counter(least[k % there] for k in repeats)
        # (1 - n/N) s²/n + w²/N = error², where s² and w² are of one example
        variance = error**2 + (between - within) * share
        wanted = there * (between / variance - 1) if variance > 0 else math.inf
        then = there + math.ceil(min(max(wanted, FURTHER * there), len(self.blocks) - there))
        often = repeated(then, len(self.blocks[0]), len(self.known))
        more = often - sum(r > 1 for r in replicates)
        return {g: min(replicates) + (g - there < more) for g in range(there, then)}

    def joined(self, costs: Mapping[int, Tensor]) -> "SurveyEstimate":
        """Return the estimate with the costs of further visits."""
        whole = dict(enumerate(self.costs))
        for g, more in costs.items():
            whole[g] = torch.cat([whole[g], more], 1) if g in whole else more
        first = self.made if self.costs and self.first is None else self.first
        return replace(self, costs=list(whole.values()), first=first)


def _without(values: Tensor) -> Tensor:
    """Return the variance without each of the values, (n,); of all values if they are too few."""
    n, square = len(values), (values - values.mean()).square()
    if n < 3:
        return values.var().expand(n)
    return (square.sum() - square * n / (n - 1)) / (n - 2)


BLOCKS = 32  # blocks of examples that share strata, if there are enough: degrees of freedom
BLOCK = 32  # examples in a block, at most
FEWEST = 64  # examples in the first sample, if there are as many
FEW = 8  # calls per example below which one visit is better than replicates, if there are ..
MANY = 100  # .. this many examples for each call, so that few of them need a second visit
PILOT = (1 / 8, 128)  # share of the calls for a pilot, and its rows per cell, at most; but ..
LEAST = 16  # .. this many rows per cell if they take no more than half of the calls
FIRST = 0.5  # share of the calls predicted for a target error in the first round of all examples
SCORED = 8  # replicates that give an example its own standard error


@dataclass(frozen=True)
class SamplingPlan:
    """Plan for the network calls of an evaluation of N examples.

    Args:
        visited: number of examples to visit first.
        block: number of examples that share strata.
        pilot: rows per cell of the pilot.
        replicates: R.
        draws: of each example in each replicate.
        repeated: number of blocks with one more replicate.
    """

    visited: int
    block: int
    pilot: int
    replicates: int
    draws: int
    repeated: int = 0


def plan(
    examples: int, calls: float, cells: int, scored: bool = False, kept: bool = False
) -> SamplingPlan:
    """Divide `calls` network calls per example, at most, between the pilot and the draws.

    Few calls are spent on one visit to each example, or each of a sample, and on second visits to
    some of them, for the error.

    Args:
        examples: N.
        calls: per example.
        cells: number of cells of a pilot.
        scored: whether each example needs an error of its own.
        kept: whether there is a pilot from before, which takes no calls now.

    Raises:
        ValueError: if there are fewer calls than an error requires.
    """
    least = 2.0 if scored else 2 * min(1.0, FEWEST / examples)
    if not least <= calls < math.inf:
        raise ValueError(
            f"calls must be at least {least:.2g} per example, to have an error bar"
            f"{' of each' if scored else ''}, and finite; got {calls}; try 24"
        )
    if calls < 2:
        return _sampled(SamplingPlan(examples, BLOCK, 0, 1, 2), examples, int(calls * examples))
    calls = int(calls)
    if kept and _once(examples, calls, scored):
        return _sampled(SamplingPlan(examples, BLOCK, 0, 1, calls), examples, calls * examples)
    rows = 0 if kept else _pilot_rows(examples * calls, cells)
    # the calls of the pilot are not available for the draws
    left = calls - math.ceil(rows * cells / examples)
    if left < max(2, calls / 2):
        rows, left = 0, calls
    piloted = bool(rows) or kept
    # two replicates, for the finest strata; more where the examples give too few degrees of
    # freedom, and without a pilot, so that more examples share strata, which replace it
    many = scored or not piloted or examples < 2 * BLOCKS
    replicates = min(left, SCORED if many else 2)
    if left == replicates + 1:
        replicates = left
    freedoms = 1 if piloted else replicates - 1
    block = max(1, min(BLOCK, examples * freedoms // BLOCKS))
    if not piloted:
        # without control variates, an incomplete last block would visit the cells unevenly
        block = min(range(block, block // 2, -1), key=lambda size: -examples % size)
    return SamplingPlan(examples, block, rows, replicates, left // replicates)


def _pilot_rows(calls: float, cells: int) -> int:
    """Return the rows per cell of a pilot, given the total number of calls of an evaluation."""
    return min(PILOT[1], max(LEAST, int(PILOT[0] * calls / cells)))


def first_round(
    way: SamplingPlan, examples: int, calls: float, cells: int, scored: bool
) -> SamplingPlan:
    """Return the plan of the first round for a target error that may take `calls` per example."""
    if not math.isfinite(calls):  # no number of calls is enough, and one round shows it
        calls = 0.0
    # a sample takes all predicted calls at once: the fewer rounds depend on costs seen before, the
    # smaller the bias that the weights have to remove
    first = max(FIRST * calls, min(calls, 2 - 1 / examples))
    least = max(2 * FEWEST, math.ceil(first * examples))
    if least < 2 * examples and not scored:
        return _sampled(replace(way, replicates=1, draws=2), examples, least)
    if not way.pilot and _once(examples, first, scored):
        return _sampled(replace(way, replicates=1, draws=int(first)), examples, least)
    replicates = way.replicates if way.draws == 1 else 2
    rows = _pilot_rows(examples * calls, cells) if way.pilot else 0
    draws = max(1, int(first / replicates))
    return replace(way, replicates=replicates, draws=draws, pilot=rows)


def _once(examples: int, calls: float, scored: bool) -> bool:
    """Return whether most examples get all their calls in one visit.

    Only after a kept pilot: after one of few rows some costs would be rare and large, which few
    second visits would not see.
    """
    return calls < FEW and examples >= MANY * calls and not scored


def _sampled(way: SamplingPlan, examples: int, calls: int) -> SamplingPlan:
    """Return the plan for a sample of N examples with at most `calls` in all, in whole blocks."""
    each = calls // way.draws
    block = max(1, min(way.block, each // BLOCKS))
    # the most blocks that leave enough calls for those visited twice
    blocks = (
        bisect_right(
            range(examples // block + 1),
            each // block,
            key=lambda blocks: blocks + repeated(blocks, block, examples),
        )
        - 1
    )
    more = repeated(blocks, block, examples)
    return replace(way, visited=blocks * block, block=block, repeated=more)
