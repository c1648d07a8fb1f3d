"""The network of Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021, compatible with its weights.

It is a U-Net: each resolution has residual blocks, some with attention; their outputs are passed
to the blocks of the same resolution on the way up. Sources: the papers (appendix A; section 3) and
the names in published weights, which the names here must equal:

    time_embed.{0,2}                     sines of the time, two linear layers
    label_emb                            one row per class
    input_blocks.N.0                     convolution (N = 0), residual block, or op: a resampling
    input_blocks.N.1, middle_block.1     attention: norm, qkv, proj_out
    output_blocks.N.{0,1,2}              residual block, attention, conv: a resampling
    out.{0,2}                            norm and convolution

A residual block holds in_layers.{0,2}, emb_layers.1, out_layers.{0,3}, skip_connection.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

GROUPS = 32


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network, named as in the papers.

    Args:
        channels: channels of the first layer; the embedding has 4 times as many.
        outputs: channels of the output.
        blocks: residual blocks per resolution.
        multipliers: factor of the channels at each resolution.
        attention: factors of downsampling with attention.
        heads: number of attention heads on the way down.
        heads_up: number of attention heads on the way up.
        head_channels: channels per head, which override the number of heads; or None.
        scale_shift: whether the embedding scales and shifts after the norm, or else is added.
        updown: whether residual blocks resample, or else convolutions.
        qkv_first: whether channels are split into q, k, v before heads, or else after.
        classes: number of classes, or None.
        inputs: channels of the images.
    """

    channels: int
    outputs: int
    blocks: int
    multipliers: tuple[float, ...]
    attention: tuple[int, ...]
    heads: int
    heads_up: int
    head_channels: int | None
    scale_shift: bool
    updown: bool
    qkv_first: bool
    classes: int | None
    inputs: int = 3


def sines(time: Tensor, count: int) -> Tensor:
    """Return cos and sin of time at count/2 frequencies from 1 down to about 1/10000; (B,
    count)."""
    half = count // 2
    places = torch.arange(half, dtype=torch.float32, device=time.device)
    angle = time[:, None].float() * torch.exp(-math.log(10000) * places / half)
    return functional.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, count % 2))


class Up(nn.Module):
    """Double the size by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    @override
    def forward(self, h: Tensor) -> Tensor:
        return self.conv(functional.interpolate(h, scale_factor=2.0, mode="nearest"))


class Down(nn.Module):
    """Halve the size by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    @override
    def forward(self, h: Tensor) -> Tensor:
        return self.op(h)


class Residual(nn.Module):
    """Two convolutions with the embedding between them; `resize` scales the size by 1/2, 1 or
    2."""

    def __init__(self, a: Architecture, inputs: int, outputs: int, resize: float = 1.0) -> None:
        super().__init__()
        self.resize, self.scale_shift = resize, a.scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * a.channels, (1 + a.scale_shift) * outputs)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    @override
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self._resized(self.in_layers[:2](x))
        h, e = self.in_layers[2](h), self.emb_layers(embedding)[..., None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self._resized(x)) + h

    def _resized(self, h: Tensor) -> Tensor:
        if self.resize < 1:
            return functional.avg_pool2d(h, 2)
        if self.resize > 1:
            return functional.interpolate(h, scale_factor=2.0, mode="nearest")
        return h


class Attention(nn.Module):
    """Multi-head attention of every pixel to every pixel."""

    def __init__(self, a: Architecture, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads if a.head_channels is None else channels // a.head_channels
        self.qkv_first = a.qkv_first
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat)).transpose(1, 2)
        # channels are (3, heads, ·) or (heads, 3, ·)
        order = (3, self.heads) if self.qkv_first else (self.heads, 3)
        axes = (2, 0, 3, 1, 4) if self.qkv_first else (3, 0, 2, 1, 4)
        q, k, v = qkv.unflatten(2, (*order, -1)).permute(axes)
        h = functional.scaled_dot_product_attention(q, k, v)
        return (flat + self.proj_out(h.transpose(2, 3).flatten(1, 2))).reshape(x.shape)


class Stage(nn.ModuleList):
    """A sequence of layers, of which residual blocks also take the embedding."""

    @override
    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, Residual) else layer(h)
        return h


class UNet(nn.Module):
    """network(y (B, inputs, H, W), time (B,), label (B,) or None) -> (B, outputs, H, W)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        wide = 4 * a.channels
        self.time_embed = nn.Sequential(
            nn.Linear(a.channels, wide), nn.SiLU(), nn.Linear(wide, wide)
        )
        if a.classes is not None:
            self.label_emb = nn.Embedding(a.classes, wide)
        widths = [int(m * a.channels) for m in a.multipliers]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(a.inputs, widths[0], 3, padding=1)])])
        kept = [widths[0]]  # channels of the skip connections
        here, factor = widths[0], 1
        for level, width in enumerate(widths):
            for _ in range(a.blocks):
                layers: list[nn.Module] = [Residual(a, here, width)]
                if factor in a.attention:
                    layers.append(Attention(a, width, a.heads))
                self.input_blocks.append(Stage(layers))
                here = width
                kept.append(here)
            if level < len(widths) - 1:
                down = Residual(a, here, here, 0.5) if a.updown else Down(here)
                self.input_blocks.append(Stage([down]))
                kept.append(here)
                factor *= 2
        self.middle_block = Stage(
            [Residual(a, here, here), Attention(a, here, a.heads), Residual(a, here, here)]
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(a.blocks + 1):
                layers = [Residual(a, here + kept.pop(), width)]
                here = width
                if factor in a.attention:
                    layers.append(Attention(a, here, a.heads_up))
                if level and i == a.blocks:
                    layers.append(Residual(a, here, here, 2.0) if a.updown else Up(here))
                    factor //= 2
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, here), nn.SiLU(), nn.Conv2d(here, a.outputs, 3, padding=1)
        )

    @override
    def forward(self, y: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = self.time_embed(sines(time, self.architecture.channels).to(y.dtype))
        if label is not None:
            embedding = embedding + self.label_emb(label)
        h, outputs = y, []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            outputs.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, outputs.pop()], 1), embedding)
        return self.out(h)
