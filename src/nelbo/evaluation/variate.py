"""A control variate: the interface of those of `gaussian_variates` and `symbol_variates`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.terms import TermDraw
from nelbo.evaluation.price import Work

#: smallest log-probability of a context, also for impossible levels
LEAST = math.log(torch.finfo(torch.float64).eps)


class ControlVariate:
    """Numbers that correlate with the costs of a model; none, unless a subclass has some."""

    #: the number of columns of `within`
    columns = 0
    #: whether a neighbouring draw gives them a context
    paired = False
    #: coefficient of each column of a pair where no pilot tells a better one
    usual = 0.0
    #: a sentence on what is left out
    note = ""

    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        """Return numbers of mean zero given x and t for each draw, shape (n, B, columns).

        Args:
            draws: one draw of each example, or two neighbouring ones.
        """
        return torch.stack([draw.cost.new_zeros(len(draw.x), 0) for draw in draws])

    def between(self, x: Tensor) -> list[Tensor]:
        """Return numbers of the examples alone, (B, S) for each stratum or (B, 1) for all."""
        return []


@dataclass(frozen=True)
class Candidate:
    """A control variate before it is fitted, with its price.

    Args:
        name: for the note where it is left out.
        work: passes over numbers, roughly, as measured.
        make: fits it.
    """

    name: str
    work: Work
    make: Callable[[], ControlVariate]


@singledispatch
def variates_of(
    process: ForwardProcess, model: Model, x: Tensor, edges: Tensor
) -> list[Candidate]:
    """Return the control variates of a model's process, to be fitted to examples x, (N, ...).

    Those that explain most for their price are first. A class of processes has none unless
    `@variates_of.register` adds them.
    """
    return []
