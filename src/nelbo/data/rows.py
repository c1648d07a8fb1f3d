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

CHUNK = 2**24  # numbers read at a time, where all are
WINDOW = 32  # blocks whose rows are shuffled together


class Rows(ABC):
    """N examples on disk; what is asked for by index or slice is read, and comes as a tensor.

    It stands wherever a tensor of stored examples does that is only indexed, sliced and split.

    Args:
        shape: (N, *shape of an example).
        dtype: how they are stored.
    """

    #: how many are read together, where one is not read for the price of one; see `batch_indices`
    block: int | None = None
    #: whether blocks are read in their order only
    sequential = False

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype

    @abstractmethod
    def read(self, rows: np.ndarray) -> Tensor:
        """The examples of these rows, (len(rows), *shape of an example)."""

    @abstractmethod
    def take(self, rows: np.ndarray) -> Self:
        """The same of these rows only, unread."""

    @abstractmethod
    def join(self, others: Sequence[Self]) -> Self:
        """The same and others after them, unread."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice | Tensor) -> Tensor:
        if isinstance(key, int):
            return self.read(np.array([range(len(self))[key]]))[0]
        if isinstance(key, slice):
            return self.read(np.arange(*key.indices(len(self))))
        return self.read(key.cpu().numpy())

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them in order, `size` at a time."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    def chunks(self) -> Iterator[Tensor]:
        """All of them in order, as many at a time as memory allows."""
        return self.split(max(1, CHUNK // self.shape[1:].numel()))

    def few(self, count: int) -> Tensor:
        """Some of them, of which to take what is known before training; by default all."""
        return cast(Tensor, self)

    def warm(self, rows: np.ndarray) -> None:
        """Do now what makes reading these rows later quick; by default nothing."""
        return

    def notes(self) -> list[str]:
        """What is to be said of the examples that were read so far; by default nothing."""
        return []

    def fingerprint(self) -> bytes | None:
        """Bytes that tell the examples, where these are had without reading all of them."""
        return None

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The least and the largest value."""
        found = [(int(x.min()), int(x.max())) for x in self.chunks()]
        return min(low for low, _ in found), max(high for _, high in found)

    def min(self) -> int:
        return self.limits[0]

    def max(self) -> int:
        return self.limits[1]


class Ahead(Generic[Value]):
    """fetch(k), where fetch(k + 1) begins at once, in a thread: reading waits for nobody.

    Args:
        fetch: of the step alone, so that the order of reading changes nothing.
        warm: makes ready for a step some time before, in a thread of its own.

    Attributes:
        waited: seconds that a step waited for its examples, of the steps after the first.
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
