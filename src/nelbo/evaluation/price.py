"""The prices of a pilot and of control variates beside that of a run, counted in passes.

    pass        over a float64 number, in the time of which a network makes PASS operations
    run         floating-point operations of the network, and what is done around its calls
    pilot       at most the share OF_PILOT of the calls, and its fit is one of the control variates
    variates    at most the share OF_VARIATES of the passes of a run

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
CALLS = 1.5e5  # passes in the time of the calls of functions of a formula, however few numbers
#: passes around a network's call: in CALLS, for each number of an example, and of its prediction
AROUND = 6.0, 20.0, 4.0
OF_PILOT, OF_VARIATES = 1 / 20, 1 / 32  # shares of a run; measured, up to a third more
DEARER = 1.25  # a call of a pilot, of which more are reconstructions, beside another
FREE = 2.0**24  # passes that a run of unknown length may take: a twentieth of a second
BRIEF = 2.0**21  # the same of a run too short for a pilot: six thousandths
LEAST = 1e-3  # price of a mask read by a surrogate, in network calls, at least


class Work(NamedTuple):
    """Passes over numbers, of a control variate or of several.

    Args:
        once: to fit it.
        example: for the numbers of an example.
        draw: for those of a draw.
    """

    once: float = 0.0
    example: float = 0.0
    draw: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(*map(sum, zip(self, other, strict=True)))


@dataclass
class Budget:
    """The passes that control variates, and the fit of their coefficients, may take in a run.

    Args:
        examples: for which their numbers are computed, an example as often as they are.
        draws: network calls of the run, without those that check how another library's network
            is read; if its length is unknown, those of a likely one.
        around: passes around a network call.
        operations: returns those of a network call; called at most once, and only if needed.
        free: passes that are never too many.
        endless: whether the length of the run is unknown.
    """

    examples: float
    draws: float
    around: float
    operations: Callable[[], float] = field(repr=False)
    free: float = 0.0
    endless: bool = False
    spent: Work = field(default=Work(), init=False)

    @cached_property
    def of_a_call(self) -> float:
        """Passes in the time of a network call, with what is around it."""
        return self.around + self.operations() / PASS

    def take(self, work: Work) -> bool:
        """Return whether the work is little beside the run, and take it if it is."""
        whole = self.spent.plus(work)
        # most often the operations need not be counted
        little = self._is_little(whole, self.around) or self._is_little(whole, self.of_a_call)
        if little:
            self.spent = whole
        return little

    def _is_little(self, work: Work, of_a_call: float) -> bool:
        share = OF_VARIATES * of_a_call
        little = self._fixed(work) + self.draws * work.draw <= max(self.free, self.draws * share)
        return little and not (self.endless and work.draw > share)

    def _fixed(self, work: Work) -> float:
        return work.once + self.examples * work.example

    def least(self, calls: float) -> float:
        """Return those of a run beside which a pilot of so many and what is taken are little."""
        fixed = DEARER * calls * self.of_a_call + self._fixed(self.spent)
        return fixed / ((OF_PILOT + OF_VARIATES) * self.of_a_call - self.spent.draw)


def fit_of(strata: int) -> Work:
    """Return the work of a pilot beside that of its calls: its steps, and a fit by stratum."""
    return Work(once=CALLS * (8 + strata / 2))


def around(dims: int, numbers: int, together: int) -> float:
    """Return the passes around a network call of an example of D dimensions, at least.

    Args:
        dims: D.
        numbers: that the network predicts for a dimension.
        together: number of examples that are computed together.
    """
    calls, of_example, of_prediction = AROUND
    return calls * CALLS / together + dims * (of_example + of_prediction * numbers)


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
