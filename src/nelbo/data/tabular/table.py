"""Tables from which any range of rows can be read, whatever holds them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from nelbo.data.splits import group, one_each
from nelbo.data.tabular.frames import polars

if TYPE_CHECKING:
    from polars import DataFrame

INFERRED = 2**19  # cells in a chunk from which columns are inferred


class Table(ABC):
    """A table from which any range of rows can be read.

    Args:
        name: for messages.
        parts: the first row and the number of rows of each split, or of "all".
        names: names of the columns.
    """

    #: whether rows can be read efficiently only in order
    sequential = False
    #: notes on guessed splits, or on what is left out
    notes: Sequence[str] = ()
    #: columns that the source declares to be an index
    stored: Sequence[str] = ()

    def __init__(self, name: str, parts: Mapping[str, tuple[int, int]], names: list[str]) -> None:
        self.name, self.parts, self.names = name, parts, names

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(count for _, count in self.parts.values())

    @abstractmethod
    def read(self, begin: int, end: int, names: Sequence[str]) -> "DataFrame":
        """Return these columns of the rows begin..end-1."""

    def whole(self) -> "DataFrame":
        """Return all rows, in memory."""
        return self.read(0, self.count, self.names)

    def identity(self) -> bytes | None:
        """Return a digest of the content, if available without reading all rows."""
        return None

    def fork(self) -> "Table":
        """Return the same table, to be read independently."""
        return self

    def chunks(self) -> "Iterator[DataFrame]":
        """Yield all rows in order."""
        size = max(1, INFERRED // len(self.names))
        for begin in range(0, self.count, size):
            yield self.read(begin, min(begin + size, self.count), self.names)


class InSplits(Table):
    """The rows of frames in memory, one split after another.

    Args:
        frames: a frame for each name of a split.

    Raises:
        ValueError: a name is of no split, or the frames have different columns.
    """

    def __init__(self, frames: "Mapping[str, DataFrame]") -> None:
        pl, name = polars(), "the table"
        groups = group(list(frames), name, None, "beside the splits")
        found = {part: frames[k] for part, k in one_each(groups, list(frames), name).items()}
        first, *rest = found.values()
        if any(set(each.columns) != set(first.columns) for each in rest):
            several = " and ".join(", ".join(each.columns) for each in found.values())
            raise ValueError(f"the splits of a table must have the same columns; got {several}")
        try:
            self.frame = pl.concat(
                [each.select(first.columns) for each in found.values()], how="vertical_relaxed"
            )
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"the splits of a table must have the same types: {error}") from None
        parts, at = {}, 0
        for part, each in found.items():
            parts[part] = at, each.height
            at += each.height
        super().__init__(name, parts, first.columns)
        self.notes = groups.notes

    @override
    def read(self, begin: int, end: int, names: Sequence[str]) -> "DataFrame":
        return self.frame[begin:end].select(names)
