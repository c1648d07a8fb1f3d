"""Examples that stay in their files until they are read, in bounded memory."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Generic, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

Value = TypeVar("Value")

CHUNK = 2**24  # numbers read at a time when all are read
WINDOW = 32  # blocks whose rows are shuffled together


class Rows(ABC):
    """N examples on disk; indexing or slicing reads them and returns a tensor.

    It can replace a tensor of stored examples that is only indexed, sliced and split.

    Args:
        shape: (N, *shape of an example).
        dtype: type in which they are stored.
    """

    #: number of examples that are read together, if single ones cannot be; see `batch_indices`
    block: int | None = None
    #: whether blocks can only be read in order
    sequential = False

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype

    @abstractmethod
    def read(self, rows: np.ndarray) -> Tensor:
        """Return the examples with these row numbers, (len(rows), *shape of an example)."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> Self:
        """Return a selection of these rows, without reading them."""

    @abstractmethod
    def join(self, others: Sequence[Self]) -> Self:
        """Return these examples followed by others, without reading them."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Tensor) -> Tensor:
        if isinstance(key, int):
            return self.read(np.array([range(len(self))[key]]))[0]
        if isinstance(key, slice):
            return self.read(np.arange(*key.indices(len(self))))
        return self.read(key.cpu().numpy())

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all examples in order, `size` at a time."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    def chunks(self) -> Iterator[Tensor]:
        """Yield all examples in order, as many at a time as memory allows."""
        return self.split(max(1, CHUNK // self.shape[1:].numel()))

    def few(self, count: int) -> Tensor:
        """Return some examples, for statistics needed before training; by default all."""
        return cast(Tensor, self)

    def warm(self, rows: np.ndarray) -> None:
        """Prepare for reading these rows soon; by default do nothing."""
        return

    def notes(self) -> list[str]:
        """Return notes on the examples that were read so far; by default none."""
        return []

    def fingerprint(self) -> bytes | None:
        """Return bytes that identify the examples, if available without reading all of them."""
        return None

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        found = [(int(x.min()), int(x.max())) for x in self.chunks()]
        return min(low for low, _ in found), max(high for _, high in found)

    def min(self) -> int:
        """Return the smallest value."""
        return self.limits[0]

    def max(self) -> int:
        """Return the largest value."""
        return self.limits[1]


class Ahead(Generic[Value]):
    """Call fetch(k), and start fetch(k + 1) at once in a thread, so that reading overlaps with
    work.

    Args:
        fetch: a function of the step alone, so that the order of reading does not matter.
        warm: prepares a step some time before, in a thread of its own.

    Attributes:
        waited: seconds that steps after the first waited for their examples.
    """

    def __init__(
        self, fetch: Callable[[int], Value], warm: Callable[[int], None] = lambda k: None
    ) -> None:
        self.fetch, self.pool = fetch, ThreadPoolExecutor(1)
        self.warm, self.stove = warm, ThreadPoolExecutor(1)
        self.next: tuple[int, Future[Value]] | None = None
        self.warming: Future[None] | None = None
        self.waited = 0.0

    def __call__(self, k: int) -> Value:
        """Return fetch(k), and start fetching k + 1."""
        if self.next is not None and self.next[0] == k:
            begun = time.perf_counter()
            value = self.next[1].result()
            self.waited += time.perf_counter() - begun
        else:
            value = self.fetch(k)
        self.next = k + 1, self.pool.submit(self.fetch, k + 1)
        if self.warming is None or self.warming.done():
            self.warming = self.stove.submit(self.warm, k + 1)
        return value
