"""The examples of each training step, in a shuffled order that follows from a seed."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.numerics import derive_seed
from nelbo.data.rows import WINDOW


@dataclass(frozen=True)
class Blocks:
    """Shuffling in two stages: first the blocks, then the examples of WINDOW blocks in a row.

    Args:
        size: examples in a block.
        sequential: whether the blocks keep their order.
    """

    size: int
    sequential: bool = False


def batch_indices(
    examples: int,
    batch: int,
    step: int,
    seed: int,
    rank: int = 0,
    size: int = 1,
    blocks: Blocks | None = None,
) -> Tensor:
    """Return the indices of a step's examples, from step·batch on in the stream of all epochs.

    Each of `size` processes gets the share of its rank; together they are the batch of a single
    process. With `blocks` the memory for the order does not grow with the data set.

    Args:
        examples: in the data set.
        batch: examples per step, on all processes together.
        step: from 0.
        seed: of the order.
        rank: of this process.
        size: number of processes.
        blocks: shuffle in two stages; all examples at once where left out.
    """
    position = step * batch
    parts = []
    while batch:
        epoch, start = divmod(position, examples)
        if blocks is None:
            part = _epoch_order(examples, seed, epoch)[start : start + batch]
        else:
            span = blocks.size * WINDOW
            window = min(start // span, max(0, examples // blocks.size - 1) // WINDOW)
            start -= window * span
            part = _window(examples, seed, epoch, window, blocks)[start : start + batch]
        parts.append(part)
        position, batch = position + len(part), batch - len(part)
    return torch.cat(parts)[rank::size]


@lru_cache(maxsize=4)
def _window(examples: int, seed: int, epoch: int, window: int, blocks: Blocks) -> Tensor:
    """Return the shuffled examples of a window; the last one includes the shorter last block."""
    whole = examples // blocks.size
    order = torch.arange(whole) if blocks.sequential else _epoch_order(whole, seed, epoch)
    some = order[window * WINDOW : (window + 1) * WINDOW]
    rows = (some[:, None] * blocks.size + torch.arange(blocks.size)).flatten()
    if (window + 1) * WINDOW >= whole:
        rows = torch.cat([rows, torch.arange(whole * blocks.size, examples)])
    generator = np.random.default_rng(derive_seed(seed, 1, epoch, window))
    return rows[torch.from_numpy(generator.permutation(len(rows)))]


@lru_cache(maxsize=2)
def _epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    generator = np.random.default_rng(derive_seed(seed, 1, epoch))
    return torch.from_numpy(generator.permutation(examples))
