"""A residual multilayer perceptron for the columns of a table."""

import torch
from torch import Tensor
from typing_extensions import override

from nelbo.nn.mlp import Residual

FREQUENCIES = (0.5, 1.0, 2.0, 4.0)  # of the sines and cosines, in radians per standard deviation


class TableNet(Residual):
    """Network for the columns of a table: features (B, F) and level (B,) to (B, O).

    A number enters as itself and as sines and cosines, a symbol as its one-hot vector.

    Args:
        numbers: how many of the features are numbers; they come first. The others are the zeros
            and ones of one-hot symbols.
        features: F, of all columns.
        outputs: O, of all columns.
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        conditions: numbers in the condition of an example.
    """

    frequencies: Tensor

    def __init__(
        self,
        numbers: int,
        features: int,
        outputs: int,
        width: int = 256,
        depth: int = 3,
        dropout: float = 0.0,
        conditions: int = 1,
    ) -> None:
        inputs = features + 2 * len(FREQUENCIES) * numbers
        super().__init__(inputs, outputs, width, depth, dropout, conditions)
        self.numbers = numbers
        self.register_buffer("frequencies", torch.tensor(FREQUENCIES), persistent=False)

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        phase = (features[:, : self.numbers, None] * self.frequencies).flatten(1)
        inputs = torch.cat([features, phase.sin(), phase.cos()], 1)
        return super().forward(inputs, level, condition)
