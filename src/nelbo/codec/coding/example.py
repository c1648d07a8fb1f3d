"""Interface of a code of examples, of which blocks are composed."""

import hashlib
from abc import ABC, abstractmethod

import numpy as np
from typing_extensions import override

from nelbo.codec.entropy.laws import Bits, SymbolModel


class ExampleCode(ABC):
    """Code batches of examples on a stack; `pop` undoes `push`, and the last batch comes first.

    The network is called with each batch unchanged, because the same batches give the same output.
    """

    #: whether it takes bits from the stack before it adds any
    borrows: bool

    @abstractmethod
    def push(self, stack: Bits, x: np.ndarray, place: int = 0) -> None:
        """Put examples x, (B, *shape) int64, on the stack; `place` is the index of the first."""

    @abstractmethod
    def pop(self, stack: Bits, count: int, place: int = 0) -> np.ndarray:
        """Take a batch of `count` examples from the stack, (B, *shape) int64."""

    @abstractmethod
    def answers(self, count: int) -> list[np.ndarray]:
        """Return the rounded output of the network for a known batch of `count` examples."""


class Static(ExampleCode):
    """Code every dimension by a fixed table, without a network: for the first examples of a block.

    Args:
        law: distribution of one example.
    """

    borrows = False

    def __init__(self, law: SymbolModel) -> None:
        self.law = law

    @override
    def push(self, stack: Bits, x: np.ndarray, place: int = 0) -> None:
        for i in range(len(x)):
            self.law.put(stack, x[i : i + 1])

    @override
    def pop(self, stack: Bits, count: int, place: int = 0) -> np.ndarray:
        return np.concatenate([self.law.take(stack) for _ in range(count)][::-1])

    @override
    def answers(self, count: int) -> list[np.ndarray]:
        return self.law.integers()


def known_numbers(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return 8-bit numbers that are the same on every machine, (count, *shape) int64."""
    size = count * int(np.prod(shape))
    stream = hashlib.shake_256(b"known answer").digest(size)
    return np.frombuffer(stream, np.uint8).astype(np.int64).reshape(count, *shape)
