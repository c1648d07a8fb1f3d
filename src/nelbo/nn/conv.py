"""A small convolutional network for small images (prototype recipe; to be replaced)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from nelbo.nn.embedding import LevelEmbedding


class _Block(nn.Module):
    def __init__(self, width: int, cells: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.scale_shift = nn.Linear(width, 2 * width)
        self.norm2 = nn.GroupNorm(8, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.cells = cells
        self.mix = nn.Linear(width * cells**2, width * cells**2)
        for layer in (self.conv2, self.mix, self.scale_shift):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.scale_shift(level)[:, :, None, None].chunk(2, 1)
        r = self.conv1(
            self.norm1(h).nn_silu() if False else torch.nn.functional.silu(self.norm1(h))
        )
        r = torch.nn.functional.silu(self.norm2(r) * (1 + scale) + shift)
        h = h + self.conv2(self.dropout(r))
        pooled = adaptive_avg_pool2d(h, self.cells)
        mixed = self.mix(pooled.flatten(1)).reshape(pooled.shape)
        return h + interpolate(mixed, size=h.shape[-2:])


class ConvNet(nn.Module):
    """Images: features (B, C·channels, H, W) and level (B,) to outputs (B, C, H, W, outputs)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        outputs: int,
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        c, h, w = shape
        self.shape, self.outputs = shape, outputs
        self.level = LevelEmbedding(width)
        self.position = nn.Parameter(torch.randn(width, h, w) * 0.02)
        self.first = nn.Conv2d(c * channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, min(4, h, w), dropout) for _ in range(depth))
        self.norm = nn.GroupNorm(8, width)
        self.last = nn.Conv2d(width, c * outputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        h, level = self.first(features) + self.position, self.level(level)
        for block in self.blocks:
            h = block(h, level)
        out = self.last(torch.nn.functional.silu(self.norm(h)))
        c = self.shape[0]
        if self.outputs == 1:
            return out
        return out.reshape(len(out), c, self.outputs, *self.shape[1:]).movedim(2, -1)
