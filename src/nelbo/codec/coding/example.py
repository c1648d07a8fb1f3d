"""A code of examples: what a block is made of."""

import hashlib
from abc import ABC, abstractmethod

import numpy as np

from nelbo.codec.entropy.laws import Bits, SymbolModel


class ExampleCode(ABC):
    """Batches of examples on a stack; `pop` undoes `push`, and the last batch comes first.

    The network is called with the batch as it is: the same batches give the same answers.
    """

    #: whether it takes bits from the stack before it gives some, so that there must be some
    borrows: bool

    @abstractmethod
    def push(self, stack: Bits, x: np.ndarray, place: int = 0) -> None:
        """Put examples x, (B, *shape) int64, on the stack; the first is the place-th of all."""

    @abstractmethod
    def pop(self, stack: Bits, count: int, place: int = 0) -> np.ndarray:
        """Take a batch of `count` examples from the stack, (B, *shape) int64."""

    @abstractmethod
    def answers(self, count: int) -> list[np.ndarray]:
        """Rounded answers of the network to a known batch of `count` examples."""


class Static(ExampleCode):
    """Every dimension by a fixed table, no network: for the first examples of a block.

    Args:
        law: of one example.
    """

    borrows = False

    def __init__(self, law: SymbolModel) -> None:
        self.law = law

    def push(self, stack: Bits, x: np.ndarray, place: int = 0) -> None:
        for i in range(len(x)):
            self.law.put(stack, x[i : i + 1])

    def pop(self, stack: Bits, count: int, place: int = 0) -> np.ndarray:
        return np.concatenate([self.law.take(stack) for _ in range(count)][::-1])

    def answers(self, count: int) -> list[np.ndarray]:
        return self.law.integers()


def known_numbers(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """The same 8-bit numbers everywhere, (count, *shape) int64."""
    size = count * int(np.prod(shape))
    stream = hashlib.shake_256(b"known answer").digest(size)
    return np.frombuffer(stream, np.uint8).astype(np.int64).reshape(count, *shape)
