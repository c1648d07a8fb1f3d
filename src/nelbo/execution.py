"""How a network is run while it trains: precision, memory, compiled or not, deterministic or not.

Nothing of it is in the model that is kept and measured: the averaged weights are copied before.
Only if they are sharded, these are too, by torch's `fully_shard` (FSDP2; Zhao et al. 2023): a
block's weights are gathered when it is called and again for its way back, after which the sums of
their gradients go to those who hold them. So all processes call a network equally often.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nelbo._processes import world
from nelbo.config import TrainConfig
from nelbo.model import Model
from nelbo.parts import again


def prepare(model: Model, t: TrainConfig) -> None:
    """Let a model's network run as the configuration says; its weights keep their names."""
    if t.checkpoint_activations:
        for block in blocks(model.network):
            # `__call__` looks it up here first
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=again
            )
    if t.compile:
        model.network.compile()
    if t.precision == "bf16":
        model.precision = torch.bfloat16


def shard(model: Model, device: torch.device) -> None:
    """Leave of a network, which may be larger than the device, the share of this process on it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # outputs are views, and nothing writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (world()[1],))
    model.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in (*blocks(model.network), model.network):
        made = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        made.set_gradient_divide_factor(1.0)  # losses are shares of the batch's, and add up
        made.set_force_sum_reduction_for_comms(True)  # the one that gloo has


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, whose inputs are all that is kept for the way back."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    every = [block for blocks in lists for block in blocks]
    return [b for b in every if not any(isinstance(m, nn.ModuleList) for m in b.modules())]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms that give the same bits again; an error where there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
