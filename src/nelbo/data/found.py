"""A reader of a data format, and the data it finds, before they are conformed to a schema."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nelbo.data.rows import Rows

if TYPE_CHECKING:
    from nelbo.data.readers.encoded import Form
    from nelbo.data.splits import Declared
    from nelbo.data.tokenizer import Tokenizer

#: numbers of an array that are checked at a time
PIECE = 2**24

Stored = np.ndarray | Rows


@dataclass(frozen=True)
class Found:
    """Contents of a source, as found by a reader.

    Args:
        source: name of the source, for messages.
        parts: (N, *shape) booleans, integers, float32 or float64, finite and N > 0; named
            "train", "validation", "test" if the source has splits, else "all".
        levels: the number of levels, if the source states it.
        notes: notes on what the reader inferred.
        labels: labels that the examples may be conditioned on: name to the (N,) strings, integers
            or reals of each part, as they were found.
        alphabet: the alphabet of a text; see `Schema`.
        tokenizer: the tokenizer of a text; see `Schema`.
    """

    source: str
    parts: Mapping[str, Stored]
    levels: int | None = None
    notes: tuple[str, ...] = ()
    labels: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    alphabet: str | None = None
    tokenizer: "Tokenizer | None" = None

    def label(self, part: str) -> str:
        """Return the name of a part for messages."""
        return self.source if part == "all" else f"the {part} split of {self.source}"


def pieces(x: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array in pieces, so that nothing as large as a mapped file is made of it."""
    size = max(1, PIECE // max(1, math.prod(x.shape[1:])))
    return (x[i : i + size] for i in range(0, len(x), size))


class Reader(NamedTuple):
    """A kind of file or folder, and the function that reads it.

    Attributes:
        knows: whether a path is of that kind; the first reader that knows a path reads it.
        read: returns the contents, given the conversion of images and the declared splits.
        resizes: whether the reader accepts a size.
        parts: whether a file has splits that can be declared; a folder always has.
    """

    knows: Callable[[Path], bool]
    read: "Callable[[Path, Form, Declared | None], Found]"
    resizes: bool = False
    parts: bool = False


def is_file(suffix: str) -> Callable[[Path], bool]:
    """Return a function that says whether a path is a file with a suffix, such as .npy."""
    return lambda path: path.is_file() and path.suffix.lower() == suffix
