"""Examples and their conditions: the x and the c of P(x|c)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo._utils.numerics import widened
from nelbo.diffusion.checks import as_tensor


@dataclass(frozen=True)
class Batch:
    """Examples and their conditions.

    Args:
        x: examples in the space of the data, (N, *shape).
        condition: c of P(x|c), (N, F); the bound is one of P(x) where left out.
        given: the names of c, for the record; those of the model where left out.

    Raises:
        ValueError: if the number of conditions is not that of the examples.
    """

    x: Tensor
    condition: Tensor | None = None
    given: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", as_tensor(self.x))
        if self.condition is not None:
            object.__setattr__(self, "condition", as_tensor(self.condition))
        if self.condition is not None and self.condition.ndim != 2:
            raise ValueError(
                "conditions are rows of numbers, (N, F), as run.batch() gives them; got the shape"
                f" {tuple(self.condition.shape)}"
            )
        check_count(self.condition, len(self.x))

    @staticmethod
    def of(x: "Tensor | Batch") -> "Batch":
        """Return a batch as it is, and a tensor of examples as a batch without conditions."""
        return x if isinstance(x, Batch) else Batch(x)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """Return some of the examples with their conditions."""
        return Batch(self.x[rows], rows_of(self.condition, rows), self.given)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, levels as int64 and real numbers as float64."""
        condition = None if self.condition is None else self.condition.to(device)
        return Batch(widened(self.x).to(device), condition, self.given)


def check_count(condition: Tensor | None, examples: int) -> None:
    """Raise a ValueError if conditions are those of more or fewer examples."""
    if condition is not None and len(condition) != examples:
        raise ValueError(
            f"each example has its own condition; got {len(condition)} conditions of"
            f" {examples} examples: choose the same rows of both, as batch[rows] does"
        )


def rows_of(condition: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """Return the conditions of some rows, None where there are no conditions."""
    return None if condition is None else condition[rows]
