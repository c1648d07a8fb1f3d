"""The stack of bits: constriction's ANS coder with checks that it leaves to its user.

Encoding pushes symbols, decoding pops them, and popping from unrelated bits is how latents are
drawn ("bits back"). Three problems that the coder would pass over are handled here:

    popping from an empty coder     an encoder puts further words of a known stream under the
                                    stack, only when they are needed; a decoder raises an error
    parameters that are not finite  raise an error
    a panic of the Rust code        becomes the error of damaged data

The known stream is SHAKE-256 of a name that includes a hash of the data, so a decoder that undoes
everything ends with exactly these words: a check of the whole block that costs nothing.
"""

import hashlib
import math
from importlib.metadata import version
from types import ModuleType

import numpy as np

from nelbo.codec.errors import CorruptFileError

WORD = 32  # bits
PRECISION = 24  # bits of a probability
START = 2  # words that fill the coder's state, so that more can be put under it
CHECK = 1  # words under a stack that does not borrow
EXTEND = 16  # the words under a stack grow by this fraction, and by at least one


def constriction() -> ModuleType:
    """Return the library of entropy coders.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import constriction as library
    except ImportError:
        raise ValueError(
            "compression needs constriction; try: pip install 'nelbo[codec]'"
        ) from None
    return library


def coder_version() -> str:
    """Return the version of the library of entropy coders."""
    return version("constriction")


class Bottom:
    """The words that an encoder puts under its stack: SHAKE-256 of a name."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()

    def words(self, count: int) -> np.ndarray:
        """Return the first `count` words in the order of a coder's array, the last of them
        lowest."""
        stream = np.frombuffer(hashlib.shake_256(self.name).digest(4 * count), "<u4")
        stream = stream.astype(np.uint32)
        stream[:1] |= np.uint32(1 << (WORD - 1))  # the top word of a coder is never zero
        return stream[::-1].copy()


class Stack:
    """Symbols on one ANS coder.

    Args:
        words: initial words, from the lowest; by default none.
        bottom: an encoder's supply of further words; None for a decoder.
        floor: bits below which nothing may be popped: 32 if words lie under the coder's state.
        counts: whether `ideal` is updated, which a decoder does not need.
    """

    def __init__(
        self,
        words: np.ndarray | None = None,
        bottom: Bottom | None = None,
        floor: int = WORD,
        counts: bool = True,
    ) -> None:
        self.coder_type = constriction().stream.stack.AnsCoder
        self.bottom, self.borrowed, self.floor, self.counts = bottom, 0, floor, counts
        if bottom is not None:
            words, self.borrowed = bottom.words(START), START
        try:
            self.coder = self.coder_type() if words is None else self.coder_type(words)
        except ValueError:
            raise CorruptFileError("the coded words end in a zero") from None
        #: nats of pushed symbols minus those of popped ones, by their densities
        self.ideal = 0.0
        #: minimal bits on the stack so far, without the borrowed ones
        self.least = self.bits

    @property
    def bits(self) -> float:
        """Bits on the stack without the borrowed ones; not rounded to words."""
        return self.length - WORD * self.borrowed

    @property
    def length(self) -> float:
        """Bits in a file; not rounded to words."""
        words, state = self.coder.pos()
        return WORD * words + (math.log2(state) if state else 0.0)

    def copy(self) -> "Stack":
        """Return a copy of the stack."""
        other = object.__new__(Stack)
        other.__dict__ |= self.__dict__
        other.coder = self.coder.clone()
        return other

    def halves(self) -> tuple["Stack", "Stack"]:
        """Return stacks of the lower and the upper half of the bits; the lower one has the
        bottom."""
        words = self.words()
        cut = (self.borrowed + len(words)) // 2
        while not words[cut - 1]:  # the top word of a stack must not be zero
            cut += 1
        low, high = self.copy(), self.copy()
        low.coder, high.coder = self.coder_type(words[:cut]), self.coder_type(words[cut:])
        high.bottom, high.borrowed = None, 0
        return low, high

    def under(self, upper: "Stack") -> "Stack":
        """Return the stack of which these are the halves."""
        whole = self.copy()
        whole.coder = self.coder_type(np.concatenate([self.words(), upper.words()]))
        return whole

    def words(self) -> np.ndarray:
        """Return all words, from the lowest, uint32."""
        found: np.ndarray = self.coder.get_compressed()
        return found

    def push(self, symbols: np.ndarray, law: object, *parameters: np.ndarray) -> None:
        """Put symbols, (N,), on the stack so that `pop` returns them in the same order."""
        symbols = np.ascontiguousarray(symbols, np.int32)
        _call(self.coder.encode_reverse, symbols, law, *parameters)

    def pop(self, law: object, *parameters: np.ndarray, count: int | None = None) -> np.ndarray:
        """Take symbols from the stack, (N,) int32; give `count` for a model without parameters."""
        arguments = (law, *parameters) if count is None else (law, count)
        most = PRECISION * (len(parameters[0]) if count is None else count)
        while True:
            enough = self.coder.num_valid_bits() >= self.floor + most
            before = self.coder if enough else self.coder.clone()
            symbols: np.ndarray = _call(self.coder.decode, *arguments)
            if enough or self.coder.num_valid_bits() >= self.floor:
                self.least = min(self.least, self.bits)
                return symbols
            if self.bottom is None:
                raise CorruptFileError("the coded words end before the data do")
            self.coder = before
            self._borrow()

    def push_some(self, symbols: np.ndarray, which: np.ndarray, law: object) -> None:
        """Put the symbols, (N,), that the mask `which`, (N,), selects on the stack."""
        if which.any():
            self.push(symbols[which], law)

    def pop_some(self, which: np.ndarray, law: object) -> np.ndarray:
        """Take the symbols of `push_some`, in their places, (N,) int64; zero elsewhere."""
        symbols = np.zeros(len(which), np.int64)
        if which.any():
            symbols[which] = self.pop(law, count=int(which.sum()))
        return symbols

    def _borrow(self) -> None:
        """Put more of the known words under the stack."""
        assert self.bottom is not None
        more = self.borrowed + max(1, self.borrowed // EXTEND)
        under = self.bottom.words(more)[: more - self.borrowed]
        self.borrowed = more
        self.coder = self.coder_type(np.concatenate([under, self.words()]))


class SideBySide:
    """Stacks that each take an equal part of the symbols pushed and popped: the rows of a batch.

    Args:
        stacks: the stacks, used together like one wide stack.
        counts: whether `ideal` is updated, as for a stack.
    """

    def __init__(self, stacks: list[Stack], counts: bool = False) -> None:
        self.stacks, self.counts, self.ideal = stacks, counts, 0.0

    def push(self, symbols: np.ndarray, law: object, *parameters: np.ndarray) -> None:
        """Put symbols, (N,), on the stacks; see `Stack.push`."""
        for one, part, *each in zip(self.stacks, *self._rows(symbols, *parameters), strict=True):
            one.push(part, law, *each)

    def pop(self, law: object, *parameters: np.ndarray, count: int | None = None) -> np.ndarray:
        """Take symbols from the stacks, (N,) int32; see `Stack.pop`."""
        each_count = None if count is None else count // len(self.stacks)
        parts = zip(self.stacks, *self._rows(*parameters), strict=True)
        return np.concatenate([one.pop(law, *each, count=each_count) for one, *each in parts])

    def push_some(self, symbols: np.ndarray, which: np.ndarray, law: object) -> None:
        """Put selected symbols on the stacks; see `Stack.push_some`."""
        for one, *each in zip(self.stacks, *self._rows(symbols, which), strict=True):
            one.push_some(*each, law)

    def pop_some(self, which: np.ndarray, law: object) -> np.ndarray:
        """Take selected symbols from the stacks; see `Stack.pop_some`."""
        parts = zip(self.stacks, *self._rows(which), strict=True)
        return np.concatenate([one.pop_some(*each, law) for one, *each in parts])

    def _rows(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return each array divided by stack."""
        return [v.reshape(len(self.stacks), -1, *v.shape[1:]) for v in arrays]


def _call(method: object, *arguments: object) -> np.ndarray:
    try:
        return method(*arguments)  # type: ignore[operator]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust code is not an Exception
        raise CorruptFileError(
            f"the coder refuses a symbol: {str(error).splitlines()[0]}"
        ) from None
