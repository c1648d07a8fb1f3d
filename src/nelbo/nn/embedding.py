"""The noise level as features; layers that start at zero."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class LevelEmbedding(nn.Module):
    """Sines and cosines of the log-SNR, then a layer: (B,) to (B, width).

    The frequencies are log-spaced so that the whole range of γ and steps of a hundredth both show.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        spaced = torch.linspace(math.log(0.05), math.log(4.0), frequencies).exp()
        self.register_buffer("frequencies", spaced, persistent=False)
        self.layer = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, level: Tensor) -> Tensor:
        phase = level[:, None] * self.frequencies
        return self.layer(torch.cat([phase.sin(), phase.cos()], 1))


def zero(layer: Layer) -> Layer:
    """The layer with all its parameters zero: what it feeds is at first left as it is."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
