"""Search for the ways to code the examples of a block that make it short.

Before each example the coder pushes one of WAYS numbers, and all draws of its latents follow from
it. A choice of numbers for n examples is one of WAYSⁿ codes of the block, whose lengths vary about
the bound (with standard deviation s per example) and exceed -log P(x). A beam search looks for the
shortest: the `kept` shortest stacks so far are continued in all ways.

It beats the best of K = kept·WAYS for each example separately, which costs log K: a stack that is
a little longer now may become the shortest after the next example. With s = 3.7 bits, as for
digits at 25 steps, and normal lengths the best of 16 saves 2.5 bits per example, the beam of 4
stacks 3.0, one of 16 stacks 3.5, and the gap to -log P(x) is s² log(2)/2 = 4.7.

An example is put on the complete one before it, because its length is known only at its end: half
the variance of a length is undecided until the last quarter of the steps. So a decoder has `lanes`
side by side, each with a beam of its own.

All ways pass through the network in full batches. Its output in batches of another size differs in
the last digits, so the block is coded once more with the numbers found, in the batches in which it
will be decoded; any error of the search costs only bits.
"""

from collections.abc import Callable

import numpy as np

from nelbo.codec.coding.example import ExampleCode
from nelbo.codec.entropy.stack import SideBySide, Stack, constriction

WAYS = 4  # to code an example, with effort 2 and more; part of the format
ROOM = 1.1  # factor on the bits of an example: lanes except the lowest cannot borrow


Paths = list[tuple[Stack, tuple]]  # a stack and its choices, linked; shortest first


def push_way(stack: Stack | SideBySide, ways: np.ndarray) -> None:
    """Put the numbers before examples on a stack."""
    stack.push(ways, constriction().stream.model.Uniform(WAYS))


def pop_way(stack: SideBySide) -> None:
    """Remove the numbers before examples."""
    stack.pop(constriction().stream.model.Uniform(WAYS), count=len(stack.stacks))


def best_ways(
    code: ExampleCode,
    stack: Stack,
    x: np.ndarray,
    need: float,
    most: int,
    kept: int,
    batch: int,
    done: Callable[[int], None],
) -> tuple[np.ndarray, list[int]]:
    """Return a number for each of the examples x, (N,), that makes them short on the stack.

    Also return the sizes of the batches, each with one example per lane.

    Args:
        code: code of the examples.
        stack: the stack before the examples; it is not changed.
        x: the examples, (N, *shape).
        need: bits that a lane must have before its first example.
        most: maximal number of lanes.
        kept: stacks of a lane that are continued.
        batch: examples per network call, at most.
        done: called with the number of examples newly finished.
    """
    lanes: list[Paths] = [[(stack, ())]]
    at, sizes = 0, []
    while at < len(x):
        least = min(paths[0][0].bits for paths in lanes)
        if 2 * len(lanes) <= most and least >= 2 * ROOM * need:
            lanes = [half for paths in lanes for half in _halves(paths)]
        size = power_of_two(min(len(lanes), len(x) - at))
        lanes[:size] = _continued(code, lanes[:size], x, range(at, at + size), kept, batch)
        at += size
        sizes.append(size)
        done(size)
    ways = np.zeros(len(x), np.int64)
    for (_, path), *_ in lanes:
        while path:
            i, ways[i], path = path
    return ways, sizes


def power_of_two(most: float) -> int:
    """Return the largest power of two up to `most`; at least 1."""
    return 1 << (max(1, int(most)).bit_length() - 1)


def _continued(
    code: ExampleCode, lanes: list[Paths], x: np.ndarray, at: range, kept: int, batch: int
) -> list[Paths]:
    """Return the best ways to put an example on each lane; `at` are the indices of the
    examples."""
    tries = [
        [(one.copy(), (i, way, path)) for one, path in paths for way in range(WAYS)]
        for i, paths in zip(at, lanes, strict=True)
    ]
    rows = [row for of_lane in tries for row in of_lane]
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        stacks = SideBySide([one for one, _ in some])
        push_way(stacks, np.array([path[1] for _, path in some]))
        code.push(stacks, x[[path[0] for _, path in some]])
    return [sorted(of_lane, key=lambda found: found[0].length)[:kept] for of_lane in tries]


def _halves(paths: Paths) -> list[Paths]:
    """Cut a lane in two.

    The lower words are the same in most of the stacks. The stacks of the upper half still compete,
    except those that differ from the shortest in the lower half.
    """
    cut = [(*one.halves(), path) for one, path in paths]
    low, deep = cut[0][0], cut[0][0].words()
    same = [(high, path) for one, high, path in cut if np.array_equal(one.words(), deep)]
    return [[(low, ())], same]
