"""An ensemble of networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.batch_rng import current


class Ensemble(nn.Module):
    """The mean output of networks that are trained independently.

    In training each member takes its own part of the batch, so one loss trains all of them and no
    two members see the same examples of a batch. In evaluation every member takes the whole
    batch, so a call costs as much as all members together.

    Args:
        members: networks with the same inputs and outputs.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = (features, level) if condition is None else (features, level, condition)
        if not self.training:
            return torch.stack([member(*inputs) for member in self.members]).mean(0)
        part, outputs = current(len(features)), []
        rows = torch.arange(part.batch).chunk(len(self.members))
        # a batch of fewer rows than members has fewer chunks
        for member, its in zip(self.members, rows, strict=False):
            own, within, count = part.some(int(its[0]), int(its[-1]) + 1)
            with within:
                outputs.append(member(*(x[own] for x in inputs))[:count])
        return torch.cat(outputs)
