"""What a network is told beside z, as features; layers that start at zero."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)

FREQUENCIES = 16  # of the sines and cosines of the log-SNR


class LevelEmbedding(nn.Module):
    """Sines and cosines of the log-SNR, and a condition, then two layers: (B,) to (B, width).

    The frequencies are log-spaced so that the whole range of γ and steps of a tenth both show.
    A condition is `conditions` numbers per example, (B, conditions); left out, they are 0.
    """

    frequencies: Tensor

    def __init__(self, width: int, conditions: int = 1) -> None:
        super().__init__()
        self.conditions = conditions
        spaced = torch.logspace(math.log10(0.05), math.log10(4.0), FREQUENCIES)
        self.register_buffer("frequencies", spaced, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 * FREQUENCIES + conditions, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )

    def forward(self, level: Tensor, condition: Tensor | None = None) -> Tensor:
        phase = level[:, None] * self.frequencies
        if condition is None:
            condition = level.new_zeros(len(level), self.conditions)
        return self.layers(torch.cat([phase.sin(), phase.cos(), condition], 1))


def zero(layer: Layer) -> Layer:
    """The layer with all its parameters zero: what it feeds is at first left as it is."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
