"""Execution of a network in training: precision, memory, compilation, determinism, processes.

None of this affects the model that is kept and measured, since the averaged weights are copied
first. The exception is sharding, by torch's `fully_shard` (FSDP2; Zhao et al. 2023), which applies
to the averaged weights too: the weights of a block are gathered for its forward pass and again for
its backward pass, and the sums of their gradients go to the processes that hold them. So all
processes must call a network equally often.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nelbo._utils.batch_rng import BatchShard, again
from nelbo._utils.distributed import add, world
from nelbo.diffusion.model import Model
from nelbo.training.config import TrainConfig
from nelbo.training.objective import Loss


def prepare(model: Model, t: TrainConfig) -> None:
    """Set up a model's network to run as configured; the names of its weights stay the same."""
    if t.checkpoint_activations:
        for block in blocks(model.network):
            # `__call__` finds the attribute of the instance before the method
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=again
            )
    if t.compile:
        model.network.compile()
    if t.precision == "bf16":
        model.precision = torch.bfloat16


def shard(model: Model, device: torch.device) -> None:
    """Shard a model's network, which may exceed the memory of one device, over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # outputs may be views, as nothing writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (world()[1],))
    model.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in (*blocks(model.network), model.network):
        made = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        made.set_gradient_divide_factor(1.0)  # losses are shares of the batch's, and add up
        made.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network: the units of checkpointing and of sharding."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    every = [block for blocks in lists for block in blocks]
    return [b for b in every if not any(isinstance(m, nn.ModuleList) for m in b.modules())]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, allow only deterministic algorithms; torch raises where it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def parts_of(batch: int, accumulate: int = 1) -> list[tuple[slice, BatchShard]]:
    """Return the shards of a batch that this process computes one after the other.

    Args:
        batch: examples of the batch, on all processes together.
        accumulate: shards per process.

    Returns:
        For each shard a slice of this process's rows, and the shard.

    Raises:
        ValueError: if a shard would have no example.
    """
    rank, size = world()
    if batch < size * accumulate:
        raise ValueError(
            f"batch must be at least {size * accumulate}, one example for each part of"
            f" {size} process{'es' * (size > 1)}; got {batch}"
        )
    rows = torch.arange(batch)[rank::size]
    parts = [slice(k, None, accumulate) for k in range(accumulate)]
    return [(own, BatchShard(rows[own], batch)) for own in parts]


def add_up(found: Sequence[tuple[BatchShard, Loss]], parameters: Sequence[nn.Parameter]) -> Loss:
    """Add up the losses of all shards, and in place the gradients, over all processes.

    A parameter ends without a gradient only if it has none on any process.

    Args:
        found: the shards of this process and their losses.
        parameters: not sharded, whose gradients are added up.

    Returns:
        The loss of the whole batch, the same on all processes.
    """
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
