"""Tables of `datasets`: rows that it has mapped into memory, or that come in a stream."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from nelbo.data.readers.hub import BATCH, Opened, find, type_of
from nelbo.data.splits import Declared
from nelbo.data.tabular.frames import polars
from nelbo.data.tabular.table import Table

if TYPE_CHECKING:
    from polars import DataFrame
    from pyarrow import Table as Arrow

    from nelbo.data.readers.hub import Split


def table(source: "str | Opened", declared: Declared | None = None) -> Table | None:
    """Return the data set as a table; None if it has images or text.

    Raises:
        ValueError: it has columns that a table cannot have.
    """
    found = find(source, declared)
    if found.image or found.is_text:
        return None
    for name, feature in found.features.items():
        if type_of(feature) not in ("Value", "ClassLabel"):
            raise ValueError(
                f"the column {name!r} of {found.name} holds {type_of(feature)}, where a table"
                " holds numbers, texts or booleans; remove it, or name a column of texts text"
            )
    return (Stream if found.streaming else Stored)(found)


class _Rows(Table):
    """The rows of all splits, one split after another, with classes as names."""

    def __init__(self, found: Opened) -> None:
        self.found, self.rows = found, list(found.splits.values())
        self.label_names = {
            name: list(feature.names)
            for name, feature in found.features.items()
            if type_of(feature) == "ClassLabel"
        }
        parts, first = {}, 0
        for split, rows in found.splits.items():
            parts[split] = first, self._count(rows)
            first += parts[split][1]
        super().__init__(found.name, parts, list(found.features))
        self.notes = found.notes
        if not first:
            raise ValueError(f"{found.name} has 0 rows; give at least 1")

    def _count(self, rows: "Split") -> int:
        return len(rows)

    @override
    def read(self, begin: int, end: int, names: Sequence[str]) -> "DataFrame":
        pl = polars()
        frames = []
        for i, (first, count) in enumerate(self.parts.values()):
            low, high = max(begin, first) - first, min(end, first + count) - first
            if low < high:
                frames.append(self._read(i, low, high).select(names))
        frame: DataFrame = pl.concat(frames)
        for name in set(names) & set(self.label_names):
            of_code = dict(enumerate(self.label_names[name]))
            frame = frame.with_columns(
                pl.col(name).replace_strict(of_code, default=None, return_dtype=pl.String)
            )
        return frame

    def _read(self, i: int, low: int, high: int) -> "DataFrame":
        raise NotImplementedError


class Stored(_Rows):
    """Rows that `datasets` has mapped into memory."""

    @override
    def _read(self, i: int, low: int, high: int) -> "DataFrame":
        return _frame(self.rows[i].with_format("arrow")[low:high])


class Stream(_Rows):
    """Rows that are read in order; going back means starting again."""

    sequential = True

    def __init__(self, found: Opened) -> None:
        super().__init__(found)
        self.at = 0, 0
        self.held: DataFrame | None = None
        self.coming: Iterator[Arrow] = iter(())

    @override
    def fork(self) -> "Stream":
        other = object.__new__(Stream)
        other.__dict__ |= self.__dict__
        other.at, other.held, other.coming = (0, 0), None, iter(())
        return other

    @override
    def _count(self, rows: "Split") -> int:
        return sum(map(len, rows.with_format("arrow").iter(batch_size=BATCH)))

    @override
    def _read(self, i: int, low: int, high: int) -> "DataFrame":
        pl = polars()
        part, begin = self.at
        held = self.held
        if held is None or part != i or low < begin:
            rows = self.rows[i].skip(low).with_format("arrow")
            self.coming, begin, held = rows.iter(batch_size=BATCH), low, None
        frames = [] if held is None else [held]
        have = begin + sum(map(len, frames))
        while have < high:
            frames.append(_frame(next(self.coming)))
            have += len(frames[-1])
        whole: DataFrame = pl.concat(frames)
        self.at, self.held = (i, high), whole[high - begin :]
        return whole[low - begin : high - begin]


def _frame(rows: "Arrow") -> "DataFrame":
    frame: DataFrame = polars().from_arrow(rows)
    return frame
