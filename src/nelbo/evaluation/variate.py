"""A control variate: the interface of those of `gaussian_variates` and `symbol_variates`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor
from typing_extensions import override

from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.terms import TermDraw
from nelbo.evaluation.price import Work

#: smallest log-probability of a context, also for impossible levels
LEAST = math.log(torch.finfo(torch.float64).eps)
WIDEST = 1024  # dimensions up to which covariances are estimated; above, those of each axis
TABLE = 2**23  # numbers in a table of symbols, at most
HELD = 2**20  # numbers that are computed together for such a table, 8 MiB
SMALL, FEW, MANY = 2**14, 2**8, 2**11  # numbers, and examples, that are computed together
CACHED = 2**18  # numbers with which to compute at a time: about what the cache of a CPU holds


class ControlVariate:
    """Numbers that correlate with the costs of a model; none, unless a subclass has some."""

    #: whether a neighbouring draw gives them a context
    paired = False
    #: coefficient of each column of `within` for a pair where no pilot tells a better one
    usual: tuple[float, ...] = ()
    #: a sentence on what is left out
    note = ""

    @property
    def columns(self) -> int:
        """The number of columns of `within`."""
        return len(self.usual)

    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        """Return numbers of mean zero given x and t for each draw, shape (n, B, columns).

        Args:
            draws: one draw of each example, or two neighbouring ones.
        """
        return torch.stack([draw.cost.new_zeros(len(draw.x), 0) for draw in draws])

    def between(self, x: Tensor) -> list[Tensor]:
        """Return numbers of the examples alone, (B, S) for each stratum or (B, 1) for all."""
        return []


class OfExamples(ControlVariate):
    """The numbers of a control variate that are of examples alone."""

    def __init__(self, of: ControlVariate) -> None:
        self.of = of

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        return self.of.between(x)


class OfDraws(ControlVariate):
    """The numbers of a control variate that are of draws."""

    def __init__(self, of: ControlVariate) -> None:
        self.of, self.paired, self.usual = of, of.paired, of.usual

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        return self.of.within(draws)


@dataclass(frozen=True)
class Candidate:
    """A control variate before it is fitted, with its price.

    Args:
        name: for the note where it is left out.
        work: passes over numbers, roughly, as measured.
        make: fits it.
        alone: whether it reduces the variance without a pilot: its usual coefficients are not 0.
    """

    name: str
    work: Work
    make: Callable[[], ControlVariate]
    alone: bool = False


@singledispatch
def variates_of(
    process: ForwardProcess, model: Model, x: Tensor, edges: Tensor
) -> list[Candidate]:
    """Return the control variates of a model's process, to be fitted to examples x, (N, ...).

    Those that explain most for their price are first. A class of processes has none unless
    `@variates_of.register` adds them.
    """
    return []


def together(dims: int) -> int:
    """Return the number of examples, or draws, to compute together: more of few dimensions."""
    return min(MANY, max(FEW, SMALL // dims))


def rows_cached(x: Tensor) -> int:
    """Return the number of examples of x, (N, ...), to compute with at a time."""
    return max(1, CACHED // x[0].numel()) if x.device.type == "cpu" else max(1, len(x))


def of_symbol(table: Tensor, x: Tensor) -> Tensor:
    """Return table_k at k = x_i of each element, shape of x."""
    return table.expand(*x.shape, table.shape[-1]).gather(-1, x[..., None])[..., 0]
