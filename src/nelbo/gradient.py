"""The loss of a batch and its gradient, added up over the parts and the processes.

The loss of a part is its share (`objective.Loss`), so that sums are all it takes, also where the
parts are not of one size. They and the gradients go together after the backward pass, and all
wait for each other once a step, in place of torch's DistributedDataParallel: that wraps the one
`forward` of a module, and the loss calls the network inside a model.
"""

from collections.abc import Sequence

import torch
from torch import nn

from nelbo._processes import add, world
from nelbo.objective import Loss
from nelbo.parts import Part


def parts_of(batch: int, accumulate: int = 1) -> list[tuple[slice, Part]]:
    """What this process takes of a batch, in so many parts: which of its rows, and the part.

    Raises:
        ValueError: a part without an example.
    """
    rank, size = world()
    if batch < size * accumulate:
        raise ValueError(
            f"batch must be at least {size * accumulate}, one example for each part of"
            f" {size} process{'es' * (size > 1)}; got {batch}"
        )
    rows = torch.arange(batch)[rank::size]
    parts = [slice(k, None, accumulate) for k in range(accumulate)]
    return [(own, Part(rows[own], batch)) for own in parts]


def add_up(found: Sequence[tuple[Part, Loss]], parameters: Sequence[nn.Parameter]) -> Loss:
    """The loss of a batch from those of this process's parts, the same on all processes; and of
    each parameter that has a gradient on any of them, the sum of these on all."""
    batch, on = found[0][0].batch, found[0][1].loss.device
    loss = torch.zeros((), dtype=torch.float64, device=on)
    bound, each, rate = loss.clone(), loss.new_zeros(batch), loss.new_zeros(batch)
    for part, own in found:
        loss += own.loss.detach()
        bound += own.bound
        rows = part.rows.to(on)
        each[rows], rate[rows] = own.each.double(), own.rate.double()
    has = loss.new_tensor([p.grad is not None for p in parameters])
    whole = torch.cat([loss[None], bound[None], has, each, rate])
    if world()[1] > 1:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        kinds = list(dict.fromkeys(g.dtype for g in gradients))  # in one order on all processes
        alike = [[g for g in gradients if g.dtype == kind] for kind in kinds]
        flat = [torch.cat([g.flatten() for g in some]) for some in alike]
        add(whole, *flat)
        sums = {
            kind: iter(sums.split([g.numel() for g in some]))
            for kind, some, sums in zip(kinds, alike, flat, strict=True)
        }
        anywhere = whole[2 : 2 + len(has)].tolist()
        for p, g, count in zip(parameters, gradients, anywhere, strict=True):
            total = next(sums[g.dtype]).view_as(g)
            p.grad = total if count else None
    return Loss(whole[0], whole[1], *whole[2 + len(has) :].chunk(2))
