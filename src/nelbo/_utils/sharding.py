"""Sharded tensors, torch's `DTensor`: each process holds its share of the rows.

These are the weights of a network that `nelbo.training.parallel.shard` has divided, and tensors
elementwise with them: gradients, moments of the optimiser, averages. All other tensors are assumed
to be whole on every process.
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
    """Return whether each process holds only its share of the tensor's rows."""
    return hasattr(tensor, "full_tensor")  # importing DTensor takes half a second


def own(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds, as a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all rows, on every process; all processes must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def divided_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Shard a tensor that is whole on every process as `like`, if that is sharded and alike.

    Args:
        like: a parameter, sharded or not.
        tensor: returned as it is if `like` is not sharded, or of another shape.
    """
    if not is_sharded(like) or like.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all rows, in main memory, on rank 0; on other processes, which must call it, nothing.

    Args:
        tensors: by name, sharded or not.
    """
    found = {}
    for name, tensor in tensors.items():  # one at a time, as a device may not hold them all
        full = whole(tensor.detach())
        if world()[0] == 0:
            found[name] = full.cpu()
    return found


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Clip the norm of all gradients to `largest`; return the norm before."""
    some = [p for p in parameters if p.grad is not None]
    kinds = [p for p in some if is_sharded(p)], [p for p in some if not is_sharded(p)]
    found = [[p.grad for p in kind if p.grad is not None] for kind in kinds]
    norms = [whole(get_total_norm(gradients)) for gradients in found if gradients]
    norm = norms[0] if len(norms) == 1 else torch.hypot(*norms)
    for kind in kinds:
        clip_grads_with_norm_(kind, largest, norm)
    return norm


def check_finite(module: nn.Module, where: str) -> None:
    """Raise a ValueError if a parameter is not finite, or a buffer or `log_..` parameter is NaN.

    The latter may be infinite, as log 0 is.

    Args:
        module: whose state dict to check.
        where: it comes from, for the message.
    """
    learned = {n for n, _ in module.named_parameters() if not n.split(".")[-1].startswith("log_")}
    for name, tensor in module.state_dict().items():
        of_it = own(tensor)
        if not of_it.is_floating_point() or not of_it.numel():
            continue
        ends = torch.stack(list(of_it.aminmax()))  # NaN if any is; one pass, no memory
        if (~ends.isfinite() if name in learned else ends.isnan()).any():
            raise ValueError(
                f"{where} has values in {name} that are not finite, so it gives no result;"
                " restore the weights from a copy, or train again"
            )
