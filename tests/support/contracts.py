"""The contract of a process of five symbols, whose e is x itself."""

import torch
from torch import Tensor

from nelbo.testing import ProcessContract


class SymbolContract(ProcessContract):
    @staticmethod
    def examples(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(5, shape)

    @staticmethod
    def guess(e: Tensor) -> Tensor:
        return torch.randn(*e.shape, 5, dtype=torch.float64).log_softmax(-1)
