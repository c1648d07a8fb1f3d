"""Residual multilayer perceptrons for vectors."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo.nn.dropout import Dropout
from nelbo.nn.embedding import LevelEmbedding, zero


class Block(nn.Module):
    """Residual block of two layers on h, (B, width), given the embedded level, (B, width)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scale_shift = zero(nn.Linear(width, 2 * width))
        last = zero(nn.Linear(2 * width, width))
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), Dropout(dropout), last)

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.scale_shift(level).chunk(2, -1)
        return h + self.layers(self.norm(h) * (1 + scale) + shift)


class Residual(nn.Module):
    """Residual blocks on vectors: inputs (B, inputs) and level (B,) to (B, outputs).

    Args:
        inputs: numbers per example.
        outputs: numbers per example, zero before training.
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        conditions: numbers in the condition of an example.
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

    @override
    def forward(self, inputs: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        h, level = self.first(inputs), self.level(level, condition)
        for block in self.blocks:
            h = block(h, level)
        output: Tensor = self.last(self.norm(h))
        return output


class MLP(Residual):
    """Network for examples of any shape, flattened: features (B, C, ...) and level (B,).

    Args:
        shape: shape of one example.
        channels: features per dimension of the example.
        outputs: numbers per dimension of the example; the output has the shape (B, *shape) for 1
            and (B, *shape, outputs) for more.
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        conditions: numbers in the condition of an example.
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

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(features.flatten(1), level, condition).reshape(-1, *self.of_example)
