"""Several networks as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean output of networks that were trained apart.

    In training each member takes its own part of the batch, so one loss trains them all and none
    sees what the others see. Otherwise all take all of it: a call costs as much as all members.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = (features, level) if condition is None else (features, level, condition)
        if not self.training:
            return torch.stack([member(*inputs) for member in self.members]).mean(0)
        parts = zip(*(x.chunk(len(self.members)) for x in inputs), strict=True)
        members = zip(self.members, parts, strict=False)  # a small batch has fewer parts
        return torch.cat([member(*part) for member, part in members])
