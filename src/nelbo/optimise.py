"""The recipe around the gradient: which examples, which rate, what decays, what is averaged."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nelbo._numerics import derive_seed
from nelbo.config import TrainConfig
from nelbo.data.rows import WINDOW
from nelbo.model import Model

_Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Blocks:
    """Examples that are shuffled in two stages: blocks of them, then those of WINDOW blocks.

    Args:
        size: examples of a block.
        sequential: the blocks keep their order.
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
    """Examples of a step: position step·batch in the stream of all shuffled epochs.

    Of `size` processes each takes its share, which together are those of one. With `blocks` the
    memory for it does not grow with the examples.
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
    """The shuffled examples of some blocks; the last, shorter block is in the last window."""
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


def learning_rate(t: TrainConfig, step: int) -> float:
    """Warm-up, then half a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / max(t.warmup, 1))
    return t.lr * warm * 0.5 * (1 + math.cos(math.pi * step / t.steps))


def parameter_groups(model: Model, weight_decay: float) -> list[dict]:
    """The network's matrices and kernels decay; its vectors, schedule, head and decoder do not."""
    decays = {
        id(module.weight)
        for module in model.network.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decays], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decays], "weight_decay": 0.0},
    ]


def warmed_ema(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Decay min(decay, (1+i)/(10+i)): useful weights from the first steps on."""

    def average(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        i = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + i) / (10 + i)))(averaged, current, count)

    return average
