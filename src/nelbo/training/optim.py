"""The optimiser: learning rate, weight decay, and the moving average of the weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import override

from nelbo._utils.sharding import divided_like, own, whole
from nelbo.diffusion.model import Model
from nelbo.training.config import TrainConfig

OUTER = {"first", "last", "level", "scale_shift"}  # layers with inputs or outputs not hidden

_Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate(t: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: warm-up, and half a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / max(t.warmup, 1))
    return t.lr * warm * 0.5 * (1 + math.cos(math.pi * step / t.steps))


def optimizer(model: Model, t: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser of all trained parameters; `learning_rate` gives the rate per step."""
    made = Muon if t.optimizer == "muon" else torch.optim.AdamW
    groups = parameter_groups(model, t.weight_decay)
    # foreach is not torch's default on a CPU, but faster there too, with the same result
    return made(groups, lr=t.lr, betas=(0.9, 0.99), foreach=True)


def parameter_groups(model: Model, weight_decay: float) -> list[dict]:
    """Return the groups of parameters for an optimiser.

    Weights of linear and convolutional layers decay: first those from hidden to hidden units, then
    the others. The network's vectors do not decay, nor do the parameters of the schedule, the
    parametrization and the decoder. Sharded and replicated parameters are in separate groups.

    Args:
        model: whose parameters to group.
        weight_decay: of the groups that decay.
    """
    hidden: set[int] = set()
    outer: set[int] = set()
    for name, module in model.network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            single = getattr(module, "groups", 1) == 1
            kind = hidden if single and not OUTER & set(name.split(".")) else outer
            kind.add(id(module.weight))
    vectors = {id(p) for p in model.network.parameters()} - hidden - outer
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in hidden], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in outer], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in vectors], "weight_decay": 0.0},
        {
            "params": [p for p in parameters if id(p) not in hidden | outer | vectors],
            "weight_decay": 0.0,
        },
    ]


class Muon(torch.optim.AdamW):
    """Muon for the matrices M of the first group, AdamW for all others.

        B ← 0.95 B + ∇,   M ← M − η ( 0.4 √max(m, n) orthogonal(∇ + 0.95 B) + λ M )

    so that all directions of a step have equal weight. Convolution kernels count as matrices with
    one row per output channel; torch's own Muon takes no kernels. Sources: Jordan et al. 2024
    (Muon); Liu et al. 2025 (the factor, there 0.2, which makes η comparable to that of AdamW).
    """

    @torch.no_grad()
    @override
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                # AdamW expects a count of steps in a state that it loads
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            b = state["momentum"].mul_(0.95).add_(p.grad)
            direction = orthogonal(whole(p.grad + 0.95 * b).flatten(1))
            factor = group["lr"] * 0.4 * math.sqrt(max(direction.shape))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(factor * divided_like(p, direction.reshape(p.shape)))
            p.grad = None  # AdamW skips parameters without a gradient
        super().step()


def orthogonal(m: Tensor) -> Tensor:
    """Approximate UVᵀ of m = USVᵀ by five Newton-Schulz steps, to singular values 0.6 to 1.3."""
    x = m.T if len(m) > m.shape[1] else m
    x = x / (x.norm() + 1e-20)
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if len(m) > m.shape[1] else x


def warmed_ema(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Return a moving average with decay min(decay, (1+i)/(10+i)), useful from the first step."""

    def average(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        i, averaged, current = int(count), [own(t) for t in averaged], [own(t) for t in current]
        get_ema_multi_avg_fn(min(decay, (1 + i) / (10 + i)))(averaged, current, count)

    return average
