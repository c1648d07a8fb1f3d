"""The noise level as features."""

import math

import torch
from torch import Tensor, nn


class LevelEmbedding(nn.Module):
    """Sines and cosines of the log-SNR, then a layer: (B,) to (B, width).

    The frequencies are log-spaced so that the whole range of γ and steps of a hundredth both show.
    """

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
