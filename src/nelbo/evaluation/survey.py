r"""From the costs of visited examples to the mean over all examples, with its error.

A visited example i of block g has the cost L_ir = prior_i + Σ_strata cost_ir in the replicates
r = 1..R_g. The draws of a replicate of a block are stratified together, so that only replicates
are independent. If all N examples are visited,

    mean           mean_i mean_r L_ir
    Monte Carlo²   Σ_g (n_g/N)² w_g²/R_g,  w_g² = var_r( mean_{i in g} L_ir )   another seed
    data²          ( var_i(mean_r L_ir) - mean_i(w_i²/R_g) ) / N,  w_i² = var_r( L_ir )  other data

data² is at least √(2/(N-1)) mean_i(w_i²/R_g)/N, which the noise may hide by chance.

If only a random sample S of n is, the known costs k_i, which need no network, are used for all
examples (the regression estimator in two stages: Cochran, Sampling Techniques, 1977, sections 7.1
and 10.4):

    mean           mean_{all i} k_i + mean_{i in S}( mean_r L_ir - k_i )
    Monte Carlo²   (1 - n/N) s²/n + n/N (that of the mean over S)², s² = var_S( mean_r L_ir - k_i )

Most examples of a sample have one replicate, R_g = 1. Their w_i² is s² times the share of noise,
which the examples with two replicates estimate (rare large costs raise both factors); if these are
few, a larger share is used. w_g² = w_i²/n_g. Their replicates may have but one of the draws, and
then more noise in proportion.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from nelbo.diffusion.elbo import Bound
from nelbo.evaluation.intervals import (
    OWN,
    beside_size,
    errors,
    freedoms_of,
    typical,
    widened,
    widenings,
)
from nelbo.evaluation.result import StandardError, TokenCosts

FREEDOMS = 32  # of an error, if there are enough examples; examples of a block, at most
FEWEST = 2 * FREEDOMS  # examples in a sample, at least, if there are as many
EACH = 4  # draws of a replicate of a single example without a pilot, at least, if there are enough


@dataclass(frozen=True)
class SurveyEstimate:
    """The costs of n of N examples, in nats, and estimates from them.

    Args:
        blocks: rows of all examples in blocks, of which the first are visited.
        costs: of each visited block the prior and all strata, the first of which is the
            reconstruction, in each replicate; shapes (n_g, R_g, 1 + S).
        known: known part of these costs for all examples, shape (N, 1 + S).
        size: of all examples, (N,), if their noise grows with it; 0 for costs without noise.
        share: of the draws of a single replicate, in one of several.
    """

    blocks: Sequence[Tensor]
    costs: Sequence[Tensor]
    known: Tensor
    size: Tensor | None = None
    share: float = 1.0

    @property
    def rows(self) -> Tensor:
        """Rows of the visited examples, (n,)."""
        return torch.cat(list(self.blocks[: len(self.costs)]))

    @property
    def bound(self) -> Bound:
        """The bound of each example, in the order of the data, (N,); NaN where not visited."""
        means = torch.cat([block.mean(1) for block in self.costs])
        return Bound(*map(self._in_order, (means[:, 0], means[:, 1], means[:, 2:].sum(1))))

    @property
    def error_of_each(self) -> Tensor:
        """The Monte Carlo error of each example's bound, likewise; NaN where it is unknown."""
        size = None if self.size is None else self.size[self.rows]
        left = [block[..., 0] for block in self._summed(slice(None))._left()]
        return self._in_order(errors(left, size, self.share))

    @property
    def exact(self) -> bool:
        """Return whether all examples are visited, and none has noise."""
        return self.size is not None and len(self.rows) == len(self.known) and not self.size.any()

    def _in_order(self, each: Tensor) -> Tensor:
        return each.new_full((len(self.known),), math.nan).index_put((self.rows,), each)

    def _summed(self, columns: slice) -> "SurveyEstimate":
        """Return the estimate of one column, the sum of these."""
        costs = [block[..., columns].sum(2, keepdim=True) for block in self.costs]
        return replace(self, costs=costs, known=self.known[:, columns].sum(1, keepdim=True))

    def _left(self) -> list[Tensor]:
        """Return the costs less their known part."""
        known = self.known[self.rows].split([len(block) for block in self.costs])
        return [block - part[:, None] for block, part in zip(self.costs, known, strict=True)]

    def _joined_left(self) -> list[Tensor]:
        """Return these for blocks of each shape together, (n, R_g, ...), in any order."""
        return [
            torch.cat([self.costs[g] for g in some])
            - self.known[torch.cat([self.blocks[g] for g in some])][:, None]
            for some in _alike(self.costs)
        ]

    @property
    def means(self) -> Tensor:
        """The mean of each column over all N examples, (1 + S,)."""
        left = self._joined_left()
        return self.known.mean(0) + torch.cat([group.mean(1) for group in left]).mean(0)

    def mean(self, columns: slice = slice(None)) -> float:
        """Return the mean of the sum of some columns."""
        return self._summed(columns).means.item()

    def _noise_of_one(self, caution: float = 0.0) -> Tensor:
        """Return w_i² of the examples with one replicate, (1 + S,); NaN if all have as many."""
        if len({block.shape[1] > 1 for block in self.costs}) < 2:
            return torch.full_like(self.known[0], math.nan)
        return typical(self._joined_left(), caution, self.share)[0]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return independent parts of the variance of the means over S.

        Returns:
            Parts of the variance by its draws, (P, 1 + S); their degrees of freedom, (P,); and
            parts of the variance by S and its draws, (n, 1 + S), with one degree of freedom each;
            none if all are visited.
        """
        visited = len(self.rows)
        # with few examples drawn twice the noise may look small by chance: the caution accounts
        # for their few degrees of freedom
        noise = self._noise_of_one(math.sqrt(FEWEST))
        sizes = self.size
        noisy = [
            block
            for block, rows in zip(self.costs, self.blocks, strict=False)
            if sizes is None or sizes[rows].any()
        ]
        parts, each = [self.known[:0]], [self.known.new_zeros(0)]  # none where nothing is noisy
        if once := sum(len(block) for block in noisy if block.shape[1] == 1):
            parts.append(once / visited**2 * noise[None])
            each.append(noise.new_full((1,), visited - 1.0))
        for group in _stacked([block for block in noisy if block.shape[1] > 1]):
            count, size, replicates = group.shape[:3]
            parts.append((size / visited) ** 2 * group.mean(1).var(1) / replicates)
            each.append(noise.new_full((count,), replicates - 1.0))
        within, freedom = torch.cat(parts), torch.cat(each)
        if visited == len(self.known):
            return within, freedom, within[:0]
        left = torch.cat([group.mean(1) for group in self._joined_left()])
        return within, freedom, (left - left.mean(0)).square() / (visited * (visited - 1))

    @property
    def stated_of_columns(self) -> Tensor:
        """The Monte Carlo error to state with each of `means`, (1 + S,); NaN where unknown."""
        if self.exact:
            return torch.zeros_like(self.known[0])
        within, each, between = self._parts()
        share = len(self.rows) / len(self.known)
        parts = torch.cat([share * within, (1 - share) * between])
        known = freedoms_of(parts, torch.cat([each, each.new_ones(len(between))]))
        if all(block.shape[1] > 1 for block in self.costs) and not len(between):
            # few draws see only part of a heavy tail, and where they do, the mean is off as well
            known = (known * (known / each.sum()).clamp(max=1)).clamp(min=1)
        error = parts.sum(0).sqrt()
        return torch.where(error > 0, error * widenings(known), math.nan)

    def stated(self, columns: slice = slice(None)) -> float:
        """Return the Monte Carlo error to state with this mean; NaN where it is unknown."""
        return self._summed(columns).stated_of_columns.item()

    def error(self, size: Tensor | None = None) -> StandardError:
        """Return the standard error of the mean bound.

        Args:
            size: numbers of tokens of all examples, (N,), of texts whose bound is one per token.
        """
        of_rows = None if size is None else size[self.rows]
        each, monte_carlo = beside_size(self.bound.elbo[self.rows], of_rows), self.stated()
        if len(each) == 1:
            return StandardError(math.nan, math.nan, monte_carlo)
        whole = self._summed(slice(None))
        alike = whole._noise_of_one()
        noise = torch.cat(
            [
                b.var(1) / b.shape[1] if b.shape[1] > 1 else alike.expand(len(b), 1)
                for b in whole.costs
            ]
        ).mean()
        hidden = noise * math.sqrt(2 / (len(each) - 1))
        spread = (each.var() - noise).maximum(hidden) / len(self.known)
        data = spread.sqrt().item() * widened(len(each) - 1.0)
        return StandardError(math.hypot(data, monte_carlo), data, monte_carlo)

    def further(self) -> dict[int, int]:
        """Return the blocks to draw in a further round, and one replicate of each.

        They are those with the fewest replicates, new ones first, and an eighth of all draws.
        """
        counts = [block.shape[1] for block in self.costs]
        counts += [0] * (len(self.blocks) - len(counts))
        order = sorted(range(len(counts)), key=lambda g: counts[g])
        return dict.fromkeys(order[: math.ceil(sum(counts) / 8)], 1)

    def joined(self, costs: Mapping[int, Tensor]) -> "SurveyEstimate":
        """Return the estimate with the costs of further draws."""
        whole = dict(enumerate(self.costs))
        for g, more in costs.items():
            whole[g] = torch.cat([whole[g], more], 1) if g in whole else more
        return replace(self, costs=list(whole.values()))


def _alike(blocks: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of the blocks of each shape."""
    found: dict[torch.Size, list[int]] = {}
    for g, block in enumerate(blocks):
        found.setdefault(block.shape, []).append(g)
    return list(found.values())


def _stacked(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return the blocks of each shape together, (G, n_g, R_g, ...)."""
    return [torch.stack([blocks[g] for g in some]) for some in _alike(blocks)]


@dataclass(frozen=True)
class Estimate:
    """An estimator's result for the examples.

    Args:
        costs: of the terms, nats.
        edges: times between the strata of the diffusion term, (S,).
        calls: network calls in all.
        notes: a sentence for each choice of the estimator.
        by_token: the costs of each token, where they are known.
    """

    costs: SurveyEstimate
    edges: Tensor
    calls: float
    notes: tuple[str, ...] = ()
    by_token: TokenCosts | None = None


def check_calls(calls: float, examples: int, each: bool) -> float:
    """Return the least calls per example, of N, that an error takes.

    Args:
        calls: that were given.
        examples: N.
        each: whether each example needs an error of its own.

    Raises:
        ValueError: they are fewer.
    """
    least = 2.0 if each else 2 * min(1.0, FEWEST / max(1, examples))
    if not least <= calls < math.inf:
        digit = 10.0 ** (math.floor(math.log10(least)) - 1)  # two digits, rounded up
        shown = math.ceil(least / digit - 1e-9) * digit
        raise ValueError(
            f"calls must be at least {shown:.2g} per example, to have an error bar"
            f"{' of each' if each else ''}, and finite; got {calls:g}; try 24"
        )
    return least


def drawn_again(visited: int, examples: int) -> int:
    """Return how many of the visited examples, of N, to draw twice.

    If all are visited, it is FREEDOMS; the noise of a draw, which these show, has the weight n/N
    in the variance of the mean.
    """
    return max(2, math.ceil(FREEDOMS * (visited / examples) ** 2))


@dataclass(frozen=True)
class SamplingPlan:
    """Plan for the draws of an evaluation of N examples.

    Args:
        sizes: number of examples in each block, which share strata; they add up to N.
        sampled: number of blocks to draw first.
        replicates: R, of each sampled block.
        repeated: number of blocks with one more replicate, or one for each of their draws.
        draws: of each example in each replicate.
        again: of each in each replicate of the repeated blocks.
    """

    sizes: Sequence[int]
    sampled: int
    replicates: int
    repeated: int
    draws: int
    again: int

    @property
    def counts(self) -> dict[int, int]:
        """The sampled blocks and their numbers of replicates."""
        repeated = max(self.replicates + 1, self.draws // self.again)
        return {g: repeated if g < self.repeated else self.replicates for g in range(self.sampled)}

    def draws_of(self, g: int) -> int:
        """Return the draws of each example in a replicate of a block."""
        return self.again if g < self.repeated else self.draws


def plan(
    examples: int, draws: float, many: bool, level: bool = False, rounds: bool = False
) -> SamplingPlan:
    """Divide the draws between examples and replicates.

    With few draws per example, each example of a sample has one replicate, and some of them a
    second one, for the error; or each draw of theirs is one, if this leaves no example out. Two
    replicates of all examples would need no sample, but the draws of a replicate are stratified.

    Args:
        examples: N.
        draws: per example, at most; FEWEST in all, or more.
        many: use more than two replicates if there are enough draws: for the errors of single
            examples, or without a pilot.
        level: whether blocks are to be of one size, even if smaller, so that equally many draws of
            each fall into a stratum of given probability.
        rounds: whether further rounds may follow, so that all replicates need as many draws.
    """
    if draws < 2 or (draws < 4 and not many and examples >= 4 * FEWEST):
        each = max(1, int(draws))
        most = int(draws * examples) // each
        most_visited = range(min(most, examples), 0, -1)
        visited = next(n for n in most_visited if n + drawn_again(n, examples) <= most)
        twice, of_twice = min(visited, most - visited), each
        if each > 1 and visited < examples and not rounds:
            visited, twice, of_twice = examples, drawn_again(examples, examples), 1
        parts = (twice, visited - twice, examples - visited)
        again, once, later = (_parts(n, FREEDOMS) for n in parts)
        first = len(again) + len(once)
        return SamplingPlan([*again, *once, *later], first, 1, len(again), each, of_twice)
    least = min(int(draws), OWN if many or examples < FEWEST else 2)
    # the number of replicates that uses the most draws
    replicates = max(range(least, 2 * least), key=lambda n: n * (int(draws) // n))
    of_block = max(1, min(FREEDOMS, examples * (replicates - 1) // FREEDOMS))
    # draws of one example in different strata are independent: few replicates are enough
    if level and of_block == 1 and draws >= OWN // 2 * EACH:
        fewer = range(OWN // 2, min(OWN, int(draws) // EACH + 1))
        replicates = max(fewer, key=lambda n: n * (int(draws) // n))
    if level:
        of_block = min(range(of_block, of_block // 2, -1), key=lambda size: -examples % size)
    sizes = _parts(examples, of_block)
    each = int(draws) // replicates
    # what is left is one more replicate of some blocks
    left = int(draws * examples) // each - replicates * examples
    repeated = sum(total <= left for total in accumulate(sizes))
    return SamplingPlan(sizes, len(sizes), replicates, repeated, each, each)


def _parts(examples: int, most: int) -> list[int]:
    """Return the sizes of as few blocks as hold these examples, none larger than `most`."""
    blocks = math.ceil(examples / most)
    return [examples // blocks + (g < examples % blocks) for g in range(blocks)]
