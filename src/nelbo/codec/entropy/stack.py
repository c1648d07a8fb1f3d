r"""The stack of bits: constriction's ANS coder behind the checks that it leaves to its user.

Encoding pushes symbols, decoding pops them, and popping from bits that mean something else is how
latents are drawn ("bits back"). Three things the coder would do in silence are errors here:

    popping from an empty coder     an encoder puts further words of a known stream under the
                                    stack, only when they are needed; a decoder refuses
    parameters that are not finite  refused
    a panic of the Rust code        becomes the error of damaged data

The known stream is SHAKE-256 of a name, of which the data are a part, so that a decoder that
undoes everything ends with exactly those words: a check of the whole block that costs nothing.
"""

import hashlib
import math
from importlib.metadata import version
from types import ModuleType

import numpy as np

from nelbo.codec.errors import CorruptFileError

WORD = 32  # bits
PRECISION = 24  # bits of a probability
START = 2  # words without which the coder's state is too small for words to go under it
CHECK = 1  # words under a stack from which nothing is borrowed
EXTEND = 16  # a part of so many of what lies under goes there at a time, a word at least


def constriction() -> ModuleType:
    """The library of entropy coders.

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
    """Of the library of entropy coders."""
    return version("constriction")


class Bottom:
    """The words that an encoder puts under its stack: those of SHAKE-256 of a name."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()

    def words(self, count: int) -> np.ndarray:
        """The first `count` words, the last of them lowest, as they lie in a coder's array."""
        stream = np.frombuffer(hashlib.shake_256(self.name).digest(4 * count), "<u4")
        stream = stream.astype(np.uint32)
        stream[:1] |= np.uint32(1 << (WORD - 1))  # the top word of a coder is never zero
        return stream[::-1].copy()


class Stack:
    """Symbols on one ANS coder.

    Args:
        words: what lies on it, from the lowest; nothing where left out.
        bottom: an encoder's supply of further words; a decoder has none.
        floor: bits below which nothing may be popped: 32 where words lie under the coder's state.
        counts: whether `ideal` is kept, which a decoder does not need.
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
        #: nats that the pushed symbols cost less those that popped ones gave, by their densities
        self.ideal = 0.0
        #: fewest bits that were on the stack, those borrowed counted as missing
        self.least = self.bits

    @property
    def bits(self) -> float:
        """What is on the stack, in bits, without the borrowed ones; not rounded to words."""
        return self.length - WORD * self.borrowed

    @property
    def length(self) -> float:
        """What it would be in a file, in bits, not rounded to words."""
        words, state = self.coder.pos()
        return WORD * words + (math.log2(state) if state else 0.0)

    def copy(self) -> "Stack":
        """The same bits on a stack of its own."""
        other = object.__new__(Stack)
        other.__dict__ |= self.__dict__
        other.coder = self.coder.clone()
        return other

    def halves(self) -> tuple["Stack", "Stack"]:
        """Stacks of the lower and the upper half of its bits; the lower has the bottom."""
        words = self.words()
        cut = (self.borrowed + len(words)) // 2
        while not words[cut - 1]:  # the top of a stack is no zero
            cut += 1
        low, high = self.copy(), self.copy()
        low.coder, high.coder = self.coder_type(words[:cut]), self.coder_type(words[cut:])
        high.bottom, high.borrowed = None, 0
        return low, high

    def under(self, upper: "Stack") -> "Stack":
        """The stack of which these are the halves."""
        whole = self.copy()
        whole.coder = self.coder_type(np.concatenate([self.words(), upper.words()]))
        return whole

    def words(self) -> np.ndarray:
        """All that lies on it, from the lowest, uint32."""
        found: np.ndarray = self.coder.get_compressed()
        return found

    def push(self, symbols: np.ndarray, law: object, *parameters: np.ndarray) -> None:
        """Put symbols, (N,), on the stack so that `pop` gives them in their order."""
        symbols = np.ascontiguousarray(symbols, np.int32)
        _call(self.coder.encode_reverse, symbols, law, *parameters)

    def pop(self, law: object, *parameters: np.ndarray, count: int | None = None) -> np.ndarray:
        """Take symbols from the stack, (N,) int32; `count` for a law without parameters."""
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
        """Put those of the symbols, (N,), that are chosen by which, (N,) bool, on the stack."""
        if which.any():
            self.push(symbols[which], law)

    def pop_some(self, which: np.ndarray, law: object) -> np.ndarray:
        """Take what `push_some` put, in its places, (N,) int64; zero elsewhere."""
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
    """Stacks that each take an equal part of what is pushed and popped: rows of one batch.

    Args:
        stacks: of which `push` and `pop` are those of one that is wide.
        counts: whether `ideal` is kept, as of a stack.
    """

    def __init__(self, stacks: list[Stack], counts: bool = False) -> None:
        self.stacks, self.counts, self.ideal = stacks, counts, 0.0

    def push(self, symbols: np.ndarray, law: object, *parameters: np.ndarray) -> None:
        for one, part, *each in zip(self.stacks, *self._rows(symbols, *parameters), strict=True):
            one.push(part, law, *each)

    def pop(self, law: object, *parameters: np.ndarray, count: int | None = None) -> np.ndarray:
        each_count = None if count is None else count // len(self.stacks)
        parts = zip(self.stacks, *self._rows(*parameters), strict=True)
        return np.concatenate([one.pop(law, *each, count=each_count) for one, *each in parts])

    def push_some(self, symbols: np.ndarray, which: np.ndarray, law: object) -> None:
        for one, *each in zip(self.stacks, *self._rows(symbols, which), strict=True):
            one.push_some(*each, law)

    def pop_some(self, which: np.ndarray, law: object) -> np.ndarray:
        parts = zip(self.stacks, *self._rows(which), strict=True)
        return np.concatenate([one.pop_some(*each, law) for one, *each in parts])

    def _rows(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Each array by stack."""
        return [v.reshape(len(self.stacks), -1, *v.shape[1:]) for v in arrays]


def _call(method: object, *arguments: object) -> np.ndarray:
    try:
        return method(*arguments)  # type: ignore[operator]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust code is no Exception
        raise CorruptFileError(
            f"the coder refuses a symbol: {str(error).splitlines()[0]}"
        ) from None
