"""The loss of a batch and its gradient, added up over the parts and the processes.

The loss of a part is its share (`objective.Loss`), so that sums are all it takes, also where the
parts are not of one size. The gradients go in one message after the backward pass, in place of
torch's DistributedDataParallel: that wraps the one `forward` of a module, and the loss calls the
network inside a model, not the same number of times in each part.
"""

from collections.abc import Iterable, Sequence

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


def summed(found: Sequence[tuple[Part, Loss]]) -> Loss:
    """The loss of a batch from those of this process's parts; on all processes the same."""
    batch, on = found[0][0].batch, found[0][1].loss.device
    loss = torch.zeros((), dtype=torch.float64, device=on)
    bound, each, rate = loss.clone(), loss.new_zeros(batch), loss.new_zeros(batch)
    for part, own in found:
        loss += own.loss.detach()
        bound += own.bound
        rows = part.rows.to(on)
        each[rows], rate[rows] = own.each.double(), own.rate.double()
    whole = torch.cat([loss[None], bound[None], each, rate])
    add(whole)
    return Loss(whole[0], whole[1], *whole[2:].chunk(2))


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of each parameter that has a gradient on any process, their sum on all processes."""
    every = [p for p in parameters if p.requires_grad]
    if world()[1] == 1 or not every:
        return
    has = torch.tensor([float(p.grad is not None) for p in every], device=every[0].device)
    add(has)
    some = [p for p, count in zip(every, has.tolist(), strict=True) if count]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
    for dtype in dict.fromkeys(g.dtype for g in gradients):  # in one order on all processes
        alike = [(p, g) for p, g in zip(some, gradients, strict=True) if g.dtype == dtype]
        flat = torch.cat([g.flatten() for _, g in alike])
        add(flat)
        sums = flat.split([g.numel() for _, g in alike])
        for (p, g), total in zip(alike, sums, strict=True):
            p.grad = total.view_as(g)
