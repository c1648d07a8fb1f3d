"""Examples and their conditions: the x and the c of P(x|c)."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.numerics import widened
from nelbo.diffusion.checks import as_tensor

NUMBERS = 2**20  # that are hashed together


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

    @cached_property
    def order(self) -> Tensor:
        """The rows in an order that follows from the examples alone, whatever theirs is; (N,).

        It is that of hashes of the values of each example and its condition, so it says nothing
        about them; equal examples keep their order. Blocks of these rows, with a seed for each
        block, give an example the same random numbers wherever it stands.
        """
        hashes = [np.zeros(0, np.uint64)]
        size = max(1, NUMBERS // max(1, self.x.shape[1:].numel()))
        for start in range(0, len(self), size):
            few = self[slice(start, start + size)]
            parts = [few.x] if few.condition is None else [few.x, few.condition]
            # -0.0 becomes 0.0
            rows = torch.cat([v.detach().flatten(1).cpu().double() + 0.0 for v in parts], 1)
            each = (hashlib.blake2b(row, digest_size=8).digest() for row in rows.numpy())
            hashes.append(np.frombuffer(b"".join(each), "<u8"))
        return torch.from_numpy(np.concatenate(hashes).argsort(kind="stable"))

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
