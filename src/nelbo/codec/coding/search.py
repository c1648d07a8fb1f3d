r"""Effort: which of the ways to code the examples of a block makes it short.

Before each example the coder pushes a number of WAYS, and all draws of its latents follow from it.
A choice of numbers for n examples is one of WAYSⁿ codes of the block, each of a length that varies
about the bound (standard deviation s for each example) and -log P(x) at the least. The shortest of
them is searched for with a beam: the `kept` shortest stacks so far are continued in all ways.

It beats the best of K = kept·WAYS for each example by itself, which costs log K: a stack that is a
little longer now may be the one that was lucky after the next example. With s = 3.7 bits, as of
digits at 25 steps, and normal lengths the best of 16 saves 2.5 bits of each example, the beam of 4
stacks 3.0, one of 16 stacks 3.5, and the gap to -log P(x) is s² log(2)/2 = 4.7.

An example goes upon the whole one before it, since what it is worth is known when it is finished:
of the variance of a length half is open until the last quarter of the steps. So it is `lanes` that
a decoder has side by side, each with a beam of its own.

All ways go through the network in batches that are full. Its answers in batches of another size
differ in their last digits, so the block is coded once more with the numbers that were found, in
the batches in which it will be decoded; a search that was wrong about it costs bits and nothing
else.
"""

from collections.abc import Callable

import numpy as np

from nelbo.codec.coding.example import ExampleCode
from nelbo.codec.entropy.stack import SideBySide, Stack, constriction

WAYS = 4  # part of the format: to code an example, of a file of effort 2 and more
ROOM = 1.1  # of what an example needs: lanes but the lowest cannot borrow


Paths = list[tuple[Stack, tuple]]  # shortest first: a stack, and its last choice with all before


def push_way(stack: Stack | SideBySide, ways: np.ndarray) -> None:
    """Put the numbers before examples on a stack."""
    stack.push(ways, constriction().stream.model.Uniform(WAYS))


def pop_way(stack: SideBySide) -> None:
    """Take them away again."""
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
    """A number for each of the examples x, (N,), with which they are short on the stack; and the
    sizes of batches of which each takes a lane for each example.

    Args:
        code: of the examples.
        stack: on which they are to go; it stays as it is.
        x: the examples, (N, *shape).
        need: bits that a lane must have before it gets its first example.
        most: lanes, at most.
        kept: stacks of a lane that are continued.
        batch: examples of a network call, at most.
        done: told how many examples are finished.
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
    """The largest one that is no more; 1 at least."""
    return 1 << (max(1, int(most)).bit_length() - 1)


def _continued(
    code: ExampleCode, lanes: list[Paths], x: np.ndarray, at: range, kept: int, batch: int
) -> list[Paths]:
    """The best ways to put an example on each lane, that of x at the lane's place."""
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
    """The lane cut in two. What lies deep is the same on most of the stacks: those of the upper
    half still compete, but for such as differ from the shortest in the lower one."""
    cut = [(*one.halves(), path) for one, path in paths]
    low, deep = cut[0][0], cut[0][0].words()
    same = [(high, path) for one, high, path in cut if np.array_equal(one.words(), deep)]
    return [[(low, ())], same]
