r"""From what visited examples cost to the mean of all, with its error.

Each example that is visited costs L_ir = prior_i + Σ_cells cost_ir in replicates r = 1..R_g. They
are stratified within blocks g of examples, so neighbours share strata, and the replicates of a
block are what is independent. Where all N are visited,

    mean           mean_i mean_r L_ir
    Monte Carlo²   Σ_g (n_g/N)² w_g²/R_g,  w_g² = var_r( mean_{i in g} L_ir )   another seed
    data²          ( var_i(mean_r L_ir) - mean_i(w_i²/R_g) ) / N,  w_i² = var_r( L_ir )  other data

Where a random sample S of n is, k_i, which is known of every example without the network, stands
for the others (the regression estimator in two stages: Cochran, Sampling Techniques, 1977,
sections 7.1 and 10.4):

    mean           mean_{all i} k_i + mean_{i in S}( mean_r L_ir - k_i )
    Monte Carlo²   (1 - n/N) s²/n + n/N (that of the mean over S)², s² = var_S( mean_r L_ir - k_i )

Where further rounds follow from the spread of those before, they end the sooner the less was seen
of what is rare and large, and a plain mean is too low: E mean = μ - cov(mean, s²)/s². So each
visit's weight is one over the number of visits that would have been made had its own cost not been
seen, n_{-i} ∝ s²_{-i}, which it does not sway: E[y_i / n_{-i}] = μ E[1 / n_{-i}].

Of a sample most is visited once, R_g = 1: there w_i² is s² times the share of it that is noise in
those visited twice (a rare large cost is in both of its parts), with some caution where they are
few, and w_g² = w_i²/n_g.
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

FURTHER = 1 / 32  # of the blocks visited: by no fewer grows a sample
TWICE = (8, 1 / 32, 32)  # examples of a sample, visited twice: at least; of it; of one that is all
CAUTION = 8  # where so many are visited twice, that w² is no more than s² counts for as many


def repeated(blocks: int, block: int, examples: int) -> int:
    """How many of a sample's blocks to visit twice: w², which they tell, counts for n/N."""
    least, share, most = TWICE
    visited = min(blocks * block, examples)
    return max(1, round(max(least, share * visited, most * (visited / examples) ** 2) / block))


@dataclass(frozen=True)
class SurveyEstimate:
    """What n of N examples cost, nats.

    Args:
        blocks: the rows of all examples, in parts; the first of them are visited.
        costs: of each of these the prior and all cells, the first of which is the reconstruction,
            in each replicate; shapes (n_g, R_g, 1 + C).
        known: of these costs without the network, of all examples, shape (N, 1 + C).
        first: visits that were made whatever they would cost; left out, all of them.
    """

    blocks: Sequence[Tensor]
    costs: Sequence[Tensor]
    known: Tensor
    first: int | None = None

    @property
    def rows(self) -> Tensor:
        """Which examples, (n,)."""
        return torch.cat(list(self.blocks[: len(self.costs)]))

    @property
    def bound(self) -> Bound:
        """Of each example, in the order of the data, (N,); NaN where it was not visited."""
        prior, reconstruction, *diffusion = self._means().unbind(1)
        terms = prior, reconstruction, sum(diffusion, torch.zeros_like(prior))
        return Bound(*map(self._in_order, terms))

    @property
    def error_of_each(self) -> Tensor:
        """The Monte Carlo error of each example's bound, as there; NaN where it is not known."""
        return self._in_order(errors(self._left(slice(None))))

    @property
    def made(self) -> int:
        """Visits, of all examples."""
        return sum(block.shape[0] * block.shape[1] for block in self.costs)

    def _means(self) -> Tensor:
        """Over the replicates, (n, 1 + C)."""
        parts = zip(self.costs, self._of_replicates(), strict=True)
        return torch.cat([(block * weight[:, None]).sum(1) for block, weight in parts])

    def _of_replicates(self) -> list[Tensor]:
        """The weights of the replicates of each block, (R_g,), which add up to 1."""
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
        """The weights of the examples of a sample, (n,), which add up to 1."""
        left = torch.cat([block.mean(1) for block in self._left(slice(None))])
        if self.first is None:
            return torch.full_like(left, 1 / len(left))
        within, between, share = self._variances(slice(None))
        ratio = _without(left) / left.var()
        # as many more as the error asks for: (1 - n/N) s²/n + w²/N
        rest = share * (between - within)
        return self._weights(ratio * between / (between + (ratio - 1) * rest))

    def _weights(self, ratio: Tensor) -> Tensor:
        """Of visits without each of which there would have been this share of them, (n,)."""
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        weight = 1 / (len(ratio) * ratio.clamp(min=(self.first or self.made) / self.made))
        return weight + (1 - weight.sum()) / len(weight)

    def _totals(self, columns: slice) -> list[Tensor]:
        """Some of the costs of each example and replicate, (n_g, R_g) of each block."""
        return [block[..., columns].sum(2) for block in self.costs]

    def _left(self, columns: slice) -> list[Tensor]:
        """The same less what is known of them."""
        known = self.known[:, columns].sum(1)
        parts = zip(self._totals(columns), self.blocks, strict=False)
        return [total - known[rows, None] for total, rows in parts]

    def _noise(self, columns: slice, caution: float = 0.0) -> list[Tensor]:
        """w_i² of each example, (n_g,) of each block."""
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
        """Of some of the costs, over all N examples."""
        means = self._means()[:, columns].sum(1)
        if len(self.rows) == len(self.known):
            return means.mean().item()
        known = self.known[:, columns].sum(1)
        return (known.mean() + self._of_examples() @ (means - known[self.rows])).item()

    def monte_carlo(self, columns: slice = slice(None)) -> float:
        """The root of the estimated Monte Carlo variance of that mean."""
        within, between, share = self._variances(columns)
        return math.sqrt((1 - share) * between + share * within)

    def stated(self, columns: slice = slice(None)) -> float:
        """The Monte Carlo error that may be stated of that mean; NaN where it is not known."""
        within, each, between = self._parts(columns)
        share = len(self.rows) / len(self.known)
        parts = torch.cat([share * within, (1 - share) * between])
        error = parts.sum().sqrt().item()
        each = torch.cat([each, torch.ones_like(between)])
        known = freedoms(parts, each)
        drawn_again = all(block.shape[1] > 1 for block in self.costs) and not len(between)
        if drawn_again and not math.isnan(known):
            # few draws of heavy tails see a part of them, and where they do the mean is amiss too
            known = max(1.0, known * min(1.0, known / each.sum().item()))
        return error * widened(known) if error > 0 else math.nan

    def _variances(self, columns: slice) -> tuple[float, float, float]:
        """Of the mean over S: by its draws alone, by S and its draws; and n/N."""
        within, _, between = self._parts(columns)
        return within.sum().item(), between.sum().item(), len(self.rows) / len(self.known)

    def _parts(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Independent parts of the variance of the mean over S: of that by its draws alone, with
        the degrees of freedom of each; and of that by S and its draws, of one degree each."""
        visited = len(self.rows)
        # few tell the noise, and the error would be least where they tell the least: the caution
        # stands for their degrees of freedom
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
        """Of the mean bound."""
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
        """The blocks to visit, and in how many replicates, to bring the Monte Carlo error down to
        this, in nats: others; or, where none are left, those again that were least."""
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
        """With what blocks cost that were missing."""
        whole = dict(enumerate(self.costs))
        for g, more in costs.items():
            whole[g] = torch.cat([whole[g], more], 1) if g in whole else more
        first = self.made if self.costs and self.first is None else self.first
        return replace(self, costs=list(whole.values()), first=first)


def _without(values: Tensor) -> Tensor:
    """The variance of all but each of the values, (n,); where they are too few, that of all."""
    n, square = len(values), (values - values.mean()).square()
    if n < 3:
        return values.var().expand(n)
    return (square.sum() - square * n / (n - 1)) / (n - 2)


BLOCKS = 32  # of examples that share strata, where there are enough: degrees of freedom
BLOCK = 32  # examples in one, at most
FEWEST = 64  # examples that a sample begins with, where there are as many
FEW = 8  # calls of each, below which draws of one visit gain by each other, if there are ..
MANY = 100  # .. so many examples for each, so that second visits to some of them cost less
PILOT = (1 / 8, 128)  # share of the calls, and rows of each cell, at most; but ..
LEAST = 16  # .. so many rows of each cell, where they take no more than half of the calls
FIRST = 0.5  # share of the calls foreseen for a target error, spent at once, where all are visited
SCORED = 8  # replicates that give an example its own standard error


@dataclass(frozen=True)
class SamplingPlan:
    """How the calls for N examples are spent.

    Args:
        visited: examples, to begin with.
        block: of them, as share strata.
        pilot: rows in each cell of the pilot.
        replicates: R.
        draws: of each example in each replicate.
        repeated: blocks that get one replicate more.
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
    """Spend `calls` network calls per example, at most, on the pilot and on the draws.

    A few are spent on one visit to each, or to each of a sample, and on second visits to some of
    it, for an error bar.

    Args:
        examples: N.
        calls: per example.
        cells: that a pilot looks into.
        scored: each example shall have an error of its own.
        kept: there was a pilot before, which costs nothing now.

    Raises:
        ValueError: fewer calls than an error bar needs.
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
    # what the pilot takes is not left for the draws
    left = calls - math.ceil(rows * cells / examples)
    if left < max(2, calls / 2):
        rows, left = 0, calls
    piloted = bool(rows) or kept
    # two, for strata as fine as can be; more, where examples alone give too few freedoms, ..
    # .. and without a pilot: more examples can share strata then, which do what it would
    many = scored or not piloted or examples < 2 * BLOCKS
    replicates = min(left, SCORED if many else 2)
    if left == replicates + 1:
        replicates = left
    freedoms = 1 if piloted else replicates - 1
    block = max(1, min(BLOCK, examples * freedoms // BLOCKS))
    if not piloted:
        # no level is taken off, and a last block that is not whole would meet cells unevenly
        block = min(range(block, block // 2, -1), key=lambda size: -examples % size)
    return SamplingPlan(examples, block, rows, replicates, left // replicates)


def _pilot_rows(calls: float, cells: int) -> int:
    """Rows of each cell for a pilot of so many calls in all."""
    return min(PILOT[1], max(LEAST, int(PILOT[0] * calls / cells)))


def first_round(
    way: SamplingPlan, examples: int, calls: float, cells: int, scored: bool
) -> SamplingPlan:
    """The plan of the first draws for a target that may take so many calls per example."""
    if not math.isfinite(calls):  # no number of calls will do, and one round shows it
        calls = 0.0
    # a sample is spent as foreseen: the fewer rounds follow from what was seen, the less of what
    # is rare is missed by those that end (`visits`)
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
    """Whether most examples get all of their calls in one visit; after a pilot of few rows some
    costs would be rare and large, and few second visits would not see them."""
    return calls < FEW and examples >= MANY * calls and not scored


def _sampled(way: SamplingPlan, examples: int, calls: int) -> SamplingPlan:
    """The plan for a sample of N examples by so many calls, or a few less: blocks are whole."""
    each = calls // way.draws
    block = max(1, min(way.block, each // BLOCKS))
    # as many as leave enough for those that are visited twice
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
