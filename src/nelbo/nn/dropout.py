"""Dropout whose masks do not depend on how a batch is divided."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from typing_extensions import override

from nelbo._utils.batch_rng import current, own_rows


class Dropout(nn.Dropout):
    """Dropout of torch whose masks for a shard are the shard's rows of the masks of the batch.

    See `nelbo._utils.batch_rng`.
    """

    @override
    def forward(self, h: Tensor) -> Tensor:
        # compiled masks differ from eager ones in any case
        shard = None if torch.compiler.is_compiling() else current(len(h))
        if shard is None or len(shard) == shard.batch or not self.training:
            return super().forward(h)
        # random fills follow the layout in memory, in which channels may come last
        order = sorted(range(h.ndim), key=h.stride, reverse=True)

        def mask(shape: Sequence[int]) -> Tensor:
            ones = torch.empty_permuted(shape, order, dtype=h.dtype, device=h.device).fill_(1)
            return dropout(ones, self.p)

        return h * own_rows(mask, h.shape, shard)
