"""Dropout whose masks do not depend on how a batch is divided."""

import torch
from torch import Tensor, nn

from nelbo._utils.batch_rng import shard_rng


class Dropout(nn.Dropout):
    """torch's, but a part of a batch has its rows of the masks of the whole (`batch_rng`)."""

    def forward(self, h: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # compiled masks are other ones in any case
            return super().forward(h)
        with shard_rng():
            return super().forward(h)
