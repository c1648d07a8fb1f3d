"""How a network is run while it trains: precision, memory, compiled or not, deterministic or not.

Nothing of it is in the model that is kept and measured: the averaged weights are copied before.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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
