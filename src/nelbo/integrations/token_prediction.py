"""Predictions of a model of tokens: logits of those that are present, and what is certain."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from nelbo.diffusion.parametrization import Parametrization
from nelbo.diffusion.prediction import Prediction, SymbolPrediction
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.symbols import WIDE, Predicted


class TokenLogits(Parametrization):
    """The meaning of the output of a `TokenNetwork`: logits of V ids.

    Args:
        count: the number V of ids.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.outputs = count

    @property
    @override
    def point(self) -> None:
        return None

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        dtype = torch.float64 if self.outputs <= WIDE else torch.float32
        return SymbolPrediction(output, None, dtype)


class TokenPrediction(Prediction):
    """P(x_i|z_t) of tokens, normalised where it is asked for; shown and absent ones are certain.

    Args:
        logits: of the tokens that are present, (..., V).
        z: z_t with the tokens that show, (B, L).
        row: of the logits of each place, (B, L); None if they are in order.
        never: ids of probability 0, (n,).
        certain: mask of the places whose tokens show or are absent, (B, L).
    """

    ends_with_block = True

    def __init__(
        self, logits: Tensor, z: Tensor, row: Tensor | None, never: Tensor, certain: Tensor
    ) -> None:
        self.logits, self.z, self.row, self.never = logits, z, row, never
        self.certain = certain

    @property
    def e_hat(self) -> Tensor:
        """The table log P(x_i = k|z_t) of all places, (B, L, V)."""
        return self.symbols(self.z, None).table()

    @override
    def symbols(self, z: Tensor, mask: int | None) -> Predicted:
        wide = self.logits.shape[-1] <= WIDE
        dtype = torch.float64 if wide else torch.float32
        more = self.row, dtype, self.never, self.certain
        return Predicted(self.logits, self.z, mask, None, *more)

    @override
    def map(self, f: Callable[[Tensor], Tensor]) -> "TokenPrediction":
        logits, row = self.logits, self.row
        if row is None:
            row = torch.arange(self.z.numel(), device=self.z.device).reshape(self.z.shape)
        return TokenPrediction(logits, f(self.z), f(row), self.never, f(self.certain))
