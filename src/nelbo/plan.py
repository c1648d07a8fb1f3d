"""How network calls are spent: on which examples, how often, and on a pilot."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from nelbo.visits import repeated

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
class Plan:
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
) -> Plan:
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
        return _sampled(Plan(examples, BLOCK, 0, 1, 2), examples, int(calls * examples))
    calls = int(calls)
    if kept and _once(examples, calls, scored):
        return _sampled(Plan(examples, BLOCK, 0, 1, calls), examples, calls * examples)
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
    return Plan(examples, block, rows, replicates, left // replicates)


def _pilot_rows(calls: float, cells: int) -> int:
    """Rows of each cell for a pilot of so many calls in all."""
    return min(PILOT[1], max(LEAST, int(PILOT[0] * calls / cells)))


def first_round(way: Plan, examples: int, calls: float, cells: int, scored: bool) -> Plan:
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


def _sampled(way: Plan, examples: int, calls: int) -> Plan:
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
