"""Dropout whose masks do not depend on how a batch is divided."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.batch_rng import shard_rng


class Dropout(nn.Dropout):
    """Dropout of torch whose masks for a shard are the shard's rows of the masks of the batch.

    See `nelbo._utils.batch_rng`.
    """

    @override
    def forward(self, h: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # compiled masks differ from eager ones in any case
            return super().forward(h)
        with shard_rng():
            return super().forward(h)
