r"""A U-Net for images of 28x28 and more, which does most of its work at low resolution.

Each resolution has residual blocks before and after the next lower one:

    h ← blocks(h),   h ← h + up( scale( down(h) ) ),   h ← blocks(h)

down to about 8x8, where every position attends to every other. The inputs are z and sines of z at
scales down to the last bits (Kingma et al. 2021, appendix C), since the last bits can be regular
within an image: the ink of a digit of MNIST is 252, 253 or 254.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu
from typing_extensions import override

from nelbo.nn.conv import LevelNorm, Local, per_dimension
from nelbo.nn.embedding import LevelEmbedding, zero

SMALLEST = 8  # pixels; a shorter side of this or less is not halved
HEAD = 32  # channels of one head of attention, at least
OCTAVES = (2, 3, 4, 5, 6)  # n of the sines and cosines of 2^n · 2π z


class Attend(nn.Module):
    """Residual block in which every position of the image attends to every other."""

    def __init__(self, width: int, level_width: int) -> None:
        super().__init__()
        # the greatest number of heads of at least HEAD channels that divides the width
        self.heads = next(n for n in range(max(1, width // HEAD), 0, -1) if width % n == 0)
        self.norm = LevelNorm(width, level_width)
        self.query_key_value = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.mixed = zero(nn.Conv2d(width, width, 1))

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        qkv = self.query_key_value(self.norm(h, level)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        r = scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
        return h + self.mixed(r.reshape(h.shape))


class Scale(nn.Module):
    """The blocks of one resolution around those of the lower resolutions.

    Args:
        width: channels.
        level_width: features of the embedded noise level.
        side: the shorter side of the image, in pixels.
        depth: blocks before, and blocks after, the lower resolutions.
        dropout: share of hidden units dropped in training.
        wider: factor by which the next lower resolution has more channels.
    """

    def __init__(
        self, width: int, level_width: int, side: int, depth: int, dropout: float, wider: int = 2
    ) -> None:
        super().__init__()
        self.before = nn.ModuleList(Local(width, level_width, dropout) for _ in range(depth))
        self.after = nn.ModuleList(Local(width, level_width, dropout) for _ in range(depth))
        self.within: nn.Module
        if side > SMALLEST:
            lower = wider * width
            self.down, self.up = nn.Conv2d(width, lower, 1), zero(nn.Conv2d(lower, width, 1))
            self.within = Scale(lower, level_width, (side + 1) // 2, depth, dropout, wider=1)
        else:
            self.within = Attend(width, level_width)
        self.halved = side > SMALLEST

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        for block in self.before:
            h = block(h, level)
        if self.halved:
            r = self.within(self.down(avg_pool2d(h, 2, ceil_mode=True)), level)
            h = h + interpolate(self.up(r), scale_factor=2.0)[..., : h.shape[2], : h.shape[3]]
        else:
            h = self.within(h, level)
        for block in self.after:
            h = block(h, level)
        return h


class UNet(nn.Module):
    """Network for images: features (B, C·channels, H, W), level (B,) to (B, C, H, W[, outputs]).

    Args:
        shape: (C, H, W) of one example.
        channels: features per dimension of the example.
        outputs: numbers per dimension of the example.
        width: channels at full resolution, a multiple of 8; lower resolutions have twice as many.
        depth: residual blocks on the way down, and as many on the way up, of each resolution.
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
        depth: int = 1,
        dropout: float = 0.0,
        conditions: int = 1,
    ) -> None:
        super().__init__()
        if width % 8:
            raise ValueError(f"width must be a multiple of 8 for the network unet; got {width}")
        of_image, height, wide = shape
        self.outputs, self.octaves = outputs, OCTAVES if channels == 1 else ()
        level_width, inputs = 2 * width, of_image * channels * (1 + 2 * len(self.octaves))
        self.level = LevelEmbedding(level_width, conditions=conditions)
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.position = nn.Parameter(0.1 * torch.randn(width, height, wide))
        self.scale = Scale(width, level_width, min(height, wide), depth, dropout)
        self.norm = LevelNorm(width, level_width)
        self.last = zero(nn.Conv2d(width, of_image * outputs, 3, padding=1))
        # channels last is faster on a CPU
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        waves = []
        for omega in (2**n * 2 * math.pi for n in self.octaves):
            # E sin(ω(x + σε)) = exp(-ω²σ²/2) sin(ωx): waves that the noise hides fade out
            seen = torch.exp(-(omega**2) / 2 * level.sigmoid())[:, None, None, None]
            waves += [seen * (omega * features).sin(), seen * (omega * features).cos()]
        inputs = torch.cat([features, *waves], 1).contiguous(memory_format=torch.channels_last)
        h = self.first(inputs) + self.position
        level = self.level(level, condition)
        h = self.norm(self.scale(h, level), level)
        return per_dimension(self.last(silu(h)), self.outputs)
