"""A residual multilayer perceptron for vectors."""

import torch
from torch import Tensor, nn

from nelbo.nn.embedding import LevelEmbedding, zero


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scale_shift = zero(nn.Linear(width, 2 * width))
        last = zero(nn.Linear(2 * width, width))
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), last
        )

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.scale_shift(level).chunk(2, -1)
        return h + self.layers(self.norm(h) * (1 + scale) + shift)


class MLP(nn.Module):
    """Examples of any shape as vectors: features (B, C, ...) and level (B,) to outputs.

    Args:
        shape: shape of one example.
        channels: features per dimension of the example.
        outputs: numbers per dimension of the example; 1 gives (B, *shape), more (…, outputs).
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        outputs: int,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape, self.outputs = shape, outputs
        dims = int(torch.Size(shape).numel())
        self.level = LevelEmbedding(width)
        self.first = nn.Linear(dims * channels, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zero(nn.Linear(width, dims * outputs))

    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        h, level = self.first(features.flatten(1)), self.level(level, condition)
        for block in self.blocks:
            h = block(h, level)
        output: Tensor = self.last(self.norm(h))
        extra = () if self.outputs == 1 else (self.outputs,)
        return output.reshape(-1, *self.shape, *extra)
