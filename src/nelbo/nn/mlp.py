"""Residual multilayer perceptrons, for vectors."""

import torch
from torch import Tensor, nn

from nelbo.nn.dropout import Dropout
from nelbo.nn.embedding import LevelEmbedding, zero


class Block(nn.Module):
    """h (B, width) and an embedded level (B, width) to h plus what two layers make of them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scale_shift = zero(nn.Linear(width, 2 * width))
        last = zero(nn.Linear(2 * width, width))
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), Dropout(dropout), last)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.scale_shift(level).chunk(2, -1)
        return h + self.layers(self.norm(h) * (1 + scale) + shift)


class Residual(nn.Module):
    """Inputs (B, inputs) and level (B,) to (B, outputs) through residual blocks.

    Args:
        inputs: numbers that enter.
        outputs: numbers that leave, at first zero.
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        conditions: numbers that a condition has.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, depth: int, dropout: float, conditions: int
    ) -> None:
        super().__init__()
        self.level = LevelEmbedding(width, conditions=conditions)
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zero(nn.Linear(width, outputs))

    def forward(self, inputs: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        h, level = self.first(inputs), self.level(level, condition)
        for block in self.blocks:
            h = block(h, level)
        output: Tensor = self.last(self.norm(h))
        return output


class MLP(Residual):
    """Examples of any shape as vectors: features (B, C, ...) and level (B,) to outputs.

    Args:
        shape: shape of one example.
        channels: features per dimension of the example.
        outputs: numbers per dimension of the example; 1 gives (B, *shape), more (…, outputs).
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        conditions: numbers that a condition has.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        outputs: int,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
        conditions: int = 1,
    ) -> None:
        dims = int(torch.Size(shape).numel())
        super().__init__(dims * channels, dims * outputs, width, depth, dropout, conditions)
        self.of_example = (*shape, *(() if outputs == 1 else (outputs,)))

    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(features.flatten(1), level, condition).reshape(-1, *self.of_example)
