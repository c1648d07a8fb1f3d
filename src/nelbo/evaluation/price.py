"""The price of control variates beside that of the network, counted in operations.

    network     floating-point operations of a call of one row, times the calls
    variates    passes over float64 numbers, one of which takes the time of PASS such operations

No clock is read: what is left out, and so the result, does not depend on how busy a machine is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model

#: operations of a network in the time of a pass over one number: of the fastest convolutions, 110
#: GFLOP/s, on a core that takes 3 ns for a number; in a product of matrices two for each of both
PASS = 330.0
SHARE = 1 / 32  # of the operations of the network, for control variates
FREE = 2.0**23  # passes that are never left out: a fortieth of a second
LEAST = 1e-3  # price of a mask read by a surrogate, in network calls, at least


class Work(NamedTuple):
    """Passes of a control variate over numbers.

    Args:
        once: to fit it.
        example: for the numbers of an example.
        draw: for those of a draw.
    """

    once: float
    example: float
    draw: float


@dataclass(frozen=True)
class Budget:
    """The passes that control variates may take in a measurement.

    Args:
        examples: for which their numbers are computed, an example as often as they are.
        draws: network calls of the measurement, without those that check how another library's
            network is read.
        operations: returns those of a network call; called at most once, and only if needed.
    """

    examples: float
    draws: float
    operations: Callable[[], float] = field(repr=False)

    @cached_property
    def passes(self) -> float:
        """The passes beside the calls of the network."""
        return SHARE * self.draws * self.operations() / PASS

    def price(self, work: Work) -> float:
        """Return the passes of a control variate."""
        return work.once + self.examples * work.example + self.draws * work.draw

    def allows(self, passes: float) -> bool:
        """Return whether they are few, by themselves or beside the network."""
        return passes <= FREE or passes <= self.passes


def operations(call: Callable[[], object]) -> float:
    """Return the floating-point operations in products of matrices and convolutions of a call.

    Two for each product of two numbers. What is compiled or scripted is not seen.
    """
    # `torch.utils.flop_counter` counts the same, and imports sympy, a second
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # in which functions are not seen
        with _Counter() as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return 2.0 * counter.products


class _Counter(TorchFunctionMode):
    """Inside, count the products of numbers in functions of torch."""

    products = 0

    @override
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in PRODUCTS:
            values = [*args, *(kwargs or {}).values()]
            tensors = [v for v in values if isinstance(v, Tensor)]
            self.products += PRODUCTS[name](values[0], tensors, found)
        return found


def _einsum(equation: str, operands: Sequence[Tensor]) -> int:
    letters = [part.strip() for part in equation.split("->")[0].split(",")]
    sizes: dict[str, int] = {}
    for of, each in zip(letters, operands, strict=True):
        sizes |= dict(zip(reversed(of.replace("...", "")), reversed(each.shape), strict=False))
    return math.prod(sizes.values())


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of (.., L, E), (.., S, E) and (.., S, F)."""
    rows = query.numel() // query.shape[-1] * key.shape[-2]
    return rows * (query.shape[-1] + value.shape[-1])


def _multi_head(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of (L, B, E), (S, B, E) twice, with the four maps of E to E."""
    width, places = query.shape[-1], query.numel() + key.numel() + value.numel()
    return width * (places + query.numel()) + 2 * query.numel() * len(key)


#: products of numbers in a function of torch, from its first argument, tensors and result
PRODUCTS: dict[str, Callable[[Any, Sequence[Tensor], Any], int]] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"), lambda _, v, found: found.numel() * v[1][0].numel()
    ),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        lambda _, v, found: v[0].numel() * v[1][0].numel(),
    ),
    **dict.fromkeys(
        ("linear", "matmul", "mm", "bmm"), lambda _, v, found: found.numel() * v[0].shape[-1]
    ),
    **dict.fromkeys(("addmm", "baddbmm"), lambda _, v, found: found.numel() * v[1].shape[-1]),
    "einsum": lambda equation, v, _: _einsum(equation, v),
    "scaled_dot_product_attention": lambda _, v, found: _attention(*v[:3]),
    "multi_head_attention_forward": lambda _, v, found: _multi_head(*v[:3]),
}


def price_of(model: Model, surrogate: Model, batch: Batch) -> float:
    """Return the price of a mask read by the surrogate, in calls of the model.

    It is the share of the floating-point operations of a call, and at least LEAST; at half the
    time, when block diffusion reads half of a text.
    """
    counts, one = [], batch[torch.zeros(1, dtype=torch.long)]
    for each in (model, surrogate):
        part = one.to(each.device)
        t = torch.full((1,), 0.5, dtype=torch.float64, device=each.device)
        z = torch.full_like(part.x, each.process.codes)
        counts.append(operations(partial(each.predict, z, t, part.condition)))
    return max(LEAST, counts[1] / max(counts[0], 1))
