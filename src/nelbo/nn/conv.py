"""A small convolutional network for small images."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, silu
from typing_extensions import override

from nelbo.nn.dropout import Dropout
from nelbo.nn.embedding import LevelEmbedding, zero


def per_dimension(output: Tensor, outputs: int) -> Tensor:
    """Return numbers of each dimension, (B, C·outputs, H, W), as (B, C, H, W[, outputs])."""
    return output if outputs == 1 else output.unflatten(1, (-1, outputs)).movedim(2, -1)


class LevelNorm(nn.Module):
    """Group normalisation whose scale and shift depend on the noise level.

    Args:
        width: channels, a multiple of 8.
        level_width: features of the embedded noise level.
    """

    def __init__(self, width: int, level_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.scale_shift = zero(nn.Linear(level_width, 2 * width))

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.scale_shift(level)[:, :, None, None].chunk(2, 1)
        return self.norm(h) * (1 + scale) + shift


class Local(nn.Module):
    """Residual block of two 3x3 convolutions, for structure that is local."""

    def __init__(self, width: int, level_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = LevelNorm(width, level_width), LevelNorm(width, level_width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(width, width, 3, padding=1))
        self.dropout = Dropout(dropout)

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        r = self.conv1(silu(self.norm1(h, level)))
        return h + self.conv2(self.dropout(silu(self.norm2(r, level))))


class Global(nn.Module):
    """Residual block over the whole image: two dense layers on the image pooled to 4x4 cells."""

    cells = 4

    def __init__(self, width: int, level_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = LevelNorm(width, level_width)
        self.down = nn.Linear(width * self.cells**2, 2 * width)
        self.up = zero(nn.Linear(2 * width, width * self.cells**2))
        self.dropout = Dropout(dropout)

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        r = adaptive_avg_pool2d(self.norm(h, level), self.cells).flatten(1)
        r = self.up(self.dropout(silu(self.down(self.dropout(r)))))
        r = r.unflatten(1, (-1, self.cells, self.cells))
        return h + interpolate(r, size=h.shape[-2:], mode="bilinear")


class ConvNet(nn.Module):
    """Network for images: features (B, C·channels, H, W), level (B,) to (B, C, H, W[, outputs]).

    Args:
        shape: (C, H, W) of one example.
        channels: features per dimension of the example.
        outputs: numbers per dimension of the example.
        width: channels of the hidden layers, a multiple of 8.
        depth: pairs of a local and a global block.
        dropout: share of hidden units dropped in training.
        conditions: numbers in the condition of an example.

    Raises:
        ValueError: if the width is not a multiple of 8.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        outputs: int,
        width: int = 32,
        depth: int = 3,
        dropout: float = 0.1,
        conditions: int = 1,
    ) -> None:
        super().__init__()
        if width % 8:
            raise ValueError(f"width must be a multiple of 8 for the network conv; got {width}")
        of_image, height, wide = shape
        self.outputs, level_width = outputs, 2 * width
        self.level = LevelEmbedding(level_width, conditions=conditions)
        self.first = nn.Conv2d(of_image * channels, width, 3, padding=1)
        self.position = nn.Parameter(0.1 * torch.randn(width, height, wide))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks += [
                Local(width, level_width, dropout),
                Global(width, level_width, dropout),
            ]
        self.norm = LevelNorm(width, level_width)
        self.last = zero(nn.Conv2d(width, of_image * outputs, 3, padding=1))

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        h, level = self.first(features) + self.position, self.level(level, condition)
        for block in self.blocks:
            h = block(h, level)
        return per_dimension(self.last(silu(self.norm(h, level))), self.outputs)
