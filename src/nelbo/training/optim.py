"""The recipe around the gradient: which rate, what decays, what is averaged."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nelbo._utils.sharding import divided_like, own, whole
from nelbo.diffusion.model import Model
from nelbo.training.config import TrainConfig

OUTER = {"first", "last", "level", "scale_shift"}  # names of layers from and to what is outside

_Tensors = tuple[Tensor, ...] | list[Tensor]


def learning_rate(t: TrainConfig, step: int) -> float:
    """Warm-up, then half a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / max(t.warmup, 1))
    return t.lr * warm * 0.5 * (1 + math.cos(math.pi * step / t.steps))


def optimizer(model: Model, t: TrainConfig) -> torch.optim.Optimizer:
    """Of all that is trained; the rate is set at each step, see `learning_rate`."""
    made = Muon if t.optimizer == "muon" else torch.optim.AdamW
    groups = parameter_groups(model, t.weight_decay)
    # also on a CPU, where it is not torch's own choice: the same bits, sooner
    return made(groups, lr=t.lr, betas=(0.9, 0.99), foreach=True)


def parameter_groups(model: Model, weight_decay: float) -> list[dict]:
    """The network's matrices and kernels decay; its vectors, schedule, head and decoder do not.

    Of the first, those that turn hidden units into hidden units come before all others. What
    the processes share out (`execution.shard`) and what each has whole are in groups apart.
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
    """AdamW, but for the first group, whose matrices M move along orthogonal ones.

        B ← 0.95 B + ∇,   M ← M − η ( 0.4 √max(m, n) orthogonal(∇ + 0.95 B) + λ M )

    so that all directions of a step count alike. Kernels are matrices with as many rows as they
    have outputs. Sources: Jordan et al. 2024 (Muon); Liu et al. 2025 (the factor, half as large,
    after which an η is one of AdamW). torch's own takes no kernels.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                # AdamW counts its steps, and looks for the count where a state is loaded
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            b = state["momentum"].mul_(0.95).add_(p.grad)
            direction = orthogonal(whole(p.grad + 0.95 * b).flatten(1))
            factor = group["lr"] * 0.4 * math.sqrt(max(direction.shape))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(factor * divided_like(p, direction.reshape(p.shape)))
            p.grad = None  # nothing is left of it for AdamW
        super().step()


def orthogonal(m: Tensor) -> Tensor:
    """About UVᵀ of m = USVᵀ, singular values between 0.6 and 1.3: five Newton-Schulz steps."""
    x = m.T if len(m) > m.shape[1] else m
    x = x / (x.norm() + 1e-20)
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if len(m) > m.shape[1] else x


def warmed_ema(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Decay min(decay, (1+i)/(10+i)): useful weights from the first steps on."""

    def average(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        i, averaged, current = int(count), [own(t) for t in averaged], [own(t) for t in current]
        get_ema_multi_avg_fn(min(decay, (1 + i) / (10 + i)))(averaged, current, count)

    return average
