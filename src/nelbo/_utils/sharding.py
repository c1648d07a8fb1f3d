"""Tensors of which each process holds its share of the rows, torch's `DTensor`s.

Those of a network that `execution.shard` has divided, and what is elementwise with them: gradient,
moments of the optimiser, averages. All other tensors are taken to be whole on every process.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nelbo._utils.distributed import world

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "full_tensor")  # importing DTensor takes half a second


def own(tensor: Tensor) -> Tensor:
    """The rows that this process holds, which share its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every process; all ask for them together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def divided_like(like: Tensor, tensor: Tensor) -> Tensor:
    """The own rows of what every process holds, where `like` is sharded and of its shape."""
    if not is_sharded(like) or like.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All rows, in the memory of the first process; the others, that ask with it, get nothing."""
    found = {}
    for name, tensor in tensors.items():  # one after the other: a device may not hold them all
        full = whole(tensor.detach())
        if world()[0] == 0:
            found[name] = full.cpu()
    return found


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Cut the norm of all gradients down to `largest`; what it was."""
    some = [p for p in parameters if p.grad is not None]
    kinds = [p for p in some if is_sharded(p)], [p for p in some if not is_sharded(p)]
    found = [[p.grad for p in kind if p.grad is not None] for kind in kinds]
    norms = [whole(get_total_norm(gradients)) for gradients in found if gradients]
    norm = norms[0] if len(norms) == 1 else torch.hypot(*norms)
    for kind in kinds:
        clip_grads_with_norm_(kind, largest, norm)
    return norm
