"""Examples and what a model is given of each: the x and the c of P(x|c)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.diffusion.checks import as_tensor


@dataclass(frozen=True)
class Batch:
    """Examples, and the condition of each.

    Args:
        x: examples in the space of the data, (N, *shape).
        condition: c of P(x|c), (N, F); left out, the model is asked for P(x).
        given: the names of c, for the record; those that the model knows where left out.

    Raises:
        ValueError: conditions of more or fewer examples.
    """

    x: Tensor
    condition: Tensor | None = None
    given: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", as_tensor(self.x))
        if self.condition is not None and len(self.condition) != len(self.x):
            raise ValueError(
                f"each example has its own condition; got {len(self.condition)} conditions of"
                f" {len(self.x)} examples: choose the same rows of both, as batch[rows] does"
            )

    @staticmethod
    def of(x: "Tensor | Batch") -> "Batch":
        """Return a batch as it is, and examples alone as a batch without conditions."""
        return x if isinstance(x, Batch) else Batch(x)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """Return some of the examples with their conditions."""
        return Batch(self.x[rows], rows_of(self.condition, rows), self.given)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, levels as int64 and real numbers as float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x.long()
        condition = None if self.condition is None else self.condition.to(device)
        return Batch(x.to(device), condition, self.given)


def rows_of(condition: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """Return the conditions of some rows, none where there are none."""
    return None if condition is None else condition[rows]
