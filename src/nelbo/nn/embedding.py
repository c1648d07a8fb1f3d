"""Embedding of the noise level and the condition; layers initialised to zero."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

Layer = TypeVar("Layer", bound=nn.Module)

FREQUENCIES = 16  # number of frequencies of the sines and cosines of the log-SNR


class LevelEmbedding(nn.Module):
    """Two layers on sines and cosines of the log-SNR and on the condition: (B,) to (B, width).

    The frequencies are log-spaced, so that the features resolve both the whole range of γ and
    steps of a tenth.

    Args:
        width: features of the embedding.
        conditions: numbers in the condition of an example; they are 0 where `forward` gets none.
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

    @override
    def forward(self, level: Tensor, condition: Tensor | None = None) -> Tensor:
        phase = level[:, None] * self.frequencies
        if condition is None:
            condition = level.new_zeros(len(level), self.conditions)
        if condition.shape[1] != self.conditions:
            raise ValueError(
                f"the network takes conditions of {self.conditions} numbers, (N,"
                f" {self.conditions}), as run.batch() gives them; got {tuple(condition.shape)}"
            )
        return self.layers(torch.cat([phase.sin(), phase.cos(), condition], 1))


def zero(layer: Layer) -> Layer:
    """Set all parameters of the layer to zero, so that its residual block starts as identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
