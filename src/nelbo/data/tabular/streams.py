"""Tables that need not fit in memory: rows are read from their files one block at a time.

A split is computed by arithmetic (`Share`), and the order of training follows from the seed and
the step alone (`training.batching.batch_indices`), so memory does not grow with the rows and a
stopped run continues where it was.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import derive_seed
from nelbo.data.columns import Column, places
from nelbo.data.conform import SALT
from nelbo.data.readers.walk import files_below
from nelbo.data.rows import WINDOW, Rows
from nelbo.data.splits import Declared, group, one_each
from nelbo.data.tabular import decoded, encoding, tables
from nelbo.data.tabular.frames import polars
from nelbo.data.tabular.merging import complete_columns, infer_merged

if TYPE_CHECKING:
    from polars import DataFrame, LazyFrame

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
IN_MEMORY = 2**25  # cells of one file, beyond which it is read in blocks
BLOCK = 2**15  # numbers in a block of examples
INFERRED = 2**19  # cells in a chunk from which columns are inferred
GOLDEN, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


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


class Files(Table):
    """The rows of Parquet or Arrow files, one file after another.

    Args:
        name: for messages.
        groups: the files of each split, or of "all".
        told: for each file, the columns that the names of its folders state, with their cell.
        notes: notes on guesses.

    Raises:
        ValueError: a file is damaged, or has other columns than the first.
    """

    def __init__(
        self,
        name: str,
        groups: Mapping[str, Sequence[Path]],
        told: Mapping[Path, Mapping[str, str | None]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.files = [file for files in groups.values() for file in files]
        self.told = [(told or {}).get(file, {}) for file in self.files]
        decoded.check(self.files)
        self.frames = [
            _scan(file, cells) for file, cells in zip(self.files, self.told, strict=True)
        ]
        names, counts = zip(*map(_size, self.files, self.frames), strict=True)
        for file, other in zip(self.files, names, strict=True):
            if set(other) != set(names[0]):
                raise ValueError(
                    f"{file} has the columns {', '.join(other)} where {self.files[0]} has"
                    f" {', '.join(names[0])}; shards must have the same"
                )
        self.first = np.concatenate([[0], np.cumsum(counts)])
        parts, at = {}, 0
        for part, files in groups.items():
            begin, at = at, at + len(files)
            parts[part] = int(self.first[begin]), int(self.first[at] - self.first[begin])
        super().__init__(name, parts, list(names[0]))
        columns = ", ".join(dict.fromkeys(k for cells in self.told for k in cells))
        self.notes = [*notes, *([f"columns named by folders: {columns}"] if columns else [])]
        self.stored = tables.stored_index(self.files[0])

    @override
    def read(self, begin: int, end: int, names: Sequence[str]) -> "DataFrame":
        import polars as pl

        found = []
        last = int(np.searchsorted(self.first, end, "left"))
        for i in range(int(np.searchsorted(self.first, begin, "right")) - 1, last):
            low, high = max(begin, int(self.first[i])), min(end, int(self.first[i + 1]))
            part = self.frames[i].slice(low - int(self.first[i]), high - low).select(names)
            found.append(_of_file(self.files[i], part))
        return pl.concat(found, how="vertical_relaxed")

    @override
    def identity(self) -> bytes:
        digest = hashlib.sha256()
        for path, cells in zip(self.files, self.told, strict=True):
            digest.update(repr(sorted(cells.items())).encode() if cells else b"")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.digest()


@dataclass(frozen=True)
class Share:
    """Some of the rows first..first+count-1, in order.

    `drawn` of every ten rows go to other splits, by the seed, and the others are the rest. An
    incomplete ten at the end belongs to the rest.

    Args:
        first: first row.
        count: number of rows.
        drawn: 0, 1 or 2.
        which: which of the drawn rows; None for the rest.
        seed: seed of the draw.
    """

    first: int
    count: int
    drawn: int = 0
    which: int | None = None
    seed: int = 0

    def __len__(self) -> int:
        tens = self.count // 10
        return self.count - tens * self.drawn if self.which is None else tens

    def rows(self, k: np.ndarray) -> np.ndarray:
        """Return the row numbers of the k-th rows of this share, increasing in k."""
        k = k.astype(np.int64)
        of_ten, tens = 10 - self.drawn, self.count // 10
        if self.which is not None:
            return self.first + 10 * k + self._places(k)[self.which]
        if not self.drawn:
            return self.first + k
        ten, place = np.divmod(k, of_ten)
        for taken in np.sort(self._places(ten)[: self.drawn], axis=0):
            place = place + (place >= taken)
        last = self.first + 10 * tens + (k - of_ten * tens)
        return np.where(k < of_ten * tens, self.first + 10 * ten + place, last)

    def _places(self, ten: np.ndarray) -> np.ndarray:
        """Return the places drawn in each ten, (2, len(ten)), distinct."""
        one = _hash(ten, self.seed, 0) % np.uint64(10)
        two = (one + np.uint64(1) + _hash(ten, self.seed, 1) % np.uint64(9)) % np.uint64(10)
        return np.stack([one, two]).astype(np.int64)


def _hash(k: np.ndarray, *seeds: int) -> np.ndarray:
    """Return pseudo-random bits, uint64, the same on every machine (splitmix64)."""
    x = k.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(derive_seed(SALT, *seeds))
    for shift, factor in zip((30, 27), MIX, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class TableRows(Rows):
    """Rows of a table as examples, read in blocks; the last blocks used are kept.

    Args:
        table: the table.
        columns: the columns to encode.
        share: the rows.
        rounding: as for `encoding.encode`.
    """

    def __init__(
        self, table: Table, columns: Sequence[Column], share: Share, rounding: bool = False
    ) -> None:
        width = len(places(columns))
        super().__init__((len(share), width), np.dtype(np.float64))
        self.table, self.columns, self.share = table.fork(), tuple(columns), share
        self.rounding = rounding
        self.per_block = self.block = max(1, BLOCK // width)
        self.sequential = table.sequential
        self.known: OrderedDict[int, Tensor] = OrderedDict()
        self.coming = 0  # the block after the last one read
        self.lock = threading.Lock()
        self.unseen, self.counted = encoding.Unseen(), np.zeros(-(-len(self) // self.block), bool)

    @override
    def read(self, rows: np.ndarray) -> Tensor:
        x = torch.empty((len(rows), *self.shape[1:]), dtype=torch.float64)
        block, place = np.divmod(rows, self.per_block)
        for b in np.unique(block).tolist():
            here = block == b
            x[torch.from_numpy(here)] = self._block(b)[torch.from_numpy(place[here])]
        return x

    @override
    def chunks(self) -> Iterator[Tensor]:
        return self.split(self.per_block)

    @override
    def warm(self, rows: np.ndarray) -> None:
        for b in np.unique(rows // self.per_block).tolist():
            self._block(b)

    @override
    def few(self, count: int) -> Tensor:
        """Return examples from blocks spread over the table, or the first ones of a stream."""
        blocks = np.arange(-(-len(self) // self.per_block))
        if not self.sequential:
            blocks = blocks[:: max(1, len(blocks) // WINDOW)][:WINDOW]
        each = max(1, count // len(blocks)) if not self.sequential else count
        rows = (blocks[:, None] * self.per_block + np.arange(min(each, self.per_block))).flatten()
        return self.read(rows[rows < len(self)][:count])

    @override
    def notes(self) -> list[str]:
        return self.unseen.notes()

    @override
    def fingerprint(self) -> bytes | None:
        content = self.table.identity()
        return content and repr((self.share, self.columns)).encode() + content

    @override
    def take(self, rows: np.ndarray) -> "TableRows":
        raise NotImplementedError("rows of a table are split by Share")

    @override
    def join(self, others: Sequence["TableRows"]) -> "TableRows":
        raise NotImplementedError("rows of a table are split by Share")

    def _block(self, b: int) -> Tensor:
        with self.lock:
            if b in self.known:
                self.known.move_to_end(b)
                return self.known[b]
            return self._load(b)

    def _load(self, b: int) -> Tensor:
        ahead = b - self.coming
        first = b
        if self.sequential and ahead:
            # earlier blocks of the window will be needed, and a stream cannot go back
            first = self.coming if 0 < ahead < 2 * WINDOW else b - b % WINDOW
        for each in range(first, b + 1):
            self._keep(each)
        self.coming = b + 1
        return self.known[b]

    def _keep(self, b: int) -> None:
        low, high = b * self.per_block, min((b + 1) * self.per_block, len(self))
        rows = self.share.rows(np.arange(low, high))
        begin, end = int(rows[0]), int(rows[-1]) + 1
        frame = self.table.read(begin, end, [column.name for column in self.columns])
        unseen = encoding.Unseen() if self.counted[b] else self.unseen
        self.counted[b] = True
        name, rounding = self.table.name, self.rounding
        x, _ = encoding.encode(frame, self.columns, name, rounding, begin, unseen)
        self.known[b] = torch.from_numpy(x[rows - begin])
        if len(self.known) > 2 * WINDOW + 2:
            self.known.popitem(last=False)


def find(source: Path, splits: Declared | None = None) -> Table | None:
    """Return the table if it is to be read in blocks: a folder of Parquet or Arrow files, or a
    large file.

    The names of files determine the splits, see `splits`.
    """
    if source.is_dir():
        files = shards_of(source)
        names = [file.relative_to(source).as_posix() for file in files]
        if not files:
            return None
        parts, rests, notes = group(names, source, splits)
        of_part = {part: [files[i] for i in few] for part, few in parts.items()}
        told = {files[i]: partitions(rests[i]) for i in range(len(files))}
        return Files(str(source), of_part, told, notes)
    if source.suffix.lower() not in SUFFIXES or not source.is_file():
        return None
    decoded.check([source])
    names, count = _size(source, _scan(source))
    return Files(str(source), {"all": [source]}) if len(names) * count > IN_MEMORY else None


def shards_of(folder: Path) -> list[Path]:
    """Return the Parquet or Arrow files below a folder, by name; [] if there are other files."""
    files = []
    for file in files_below(folder):
        if any(part[0] == "_" for part in file.relative_to(folder).parts):
            continue  # _SUCCESS, _metadata and the like
        if file.suffix.lower() not in SUFFIXES:
            return []
        files.append(file)
    return sorted(files, key=Path.as_posix)


def partitions(name: str) -> dict[str, str | None]:
    """Return the cells that the folders of a file state, as in Hive.

    >>> partitions("year=2020/city=S%C3%A3o/part-0.parquet")
    {'year': '2020', 'city': 'São'}
    """
    pairs = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {unquote(k): None if v == HIVE_NULL else unquote(v) for k, _, v in pairs}


def infer(table: Table, declared: object = None) -> tuple[list[Column], list[str]]:
    """Infer the columns of a table in one pass over its rows, with notes; see `inference`."""
    if declared is None:
        return infer_merged(table.chunks(), table.stored)
    return complete_columns(table.chunks(), declared)


def splits(
    table: Table, columns: Sequence[Column], seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return train, validation and test; a missing one is drawn, one row of every ten.

    Raises:
        ValueError: there are no training rows, or too few.
    """
    parts = table.parts
    train = parts.get("train", parts.get("all"))
    missing = [name for name in ("validation", "test") if name not in parts]
    if train is None:
        raise ValueError(f"{table.name} has only {', '.join(parts)}; name files train-..")
    if missing and train[1] < 10:
        raise ValueError(f"{table.name} has {train[1]} training rows; at least 10 are needed")
    share = partial(Share, *train, drawn=len(missing), seed=seed)
    shares = {"train": share()}
    for name in ("validation", "test"):
        own = name in parts
        shares[name] = Share(*parts[name]) if own else share(which=missing.index(name))
    made = {name: TableRows(table, columns, s, rounding=True) for name, s in shares.items()}
    sizes = ", ".join(f"{len(x)} {name}" for name, x in made.items())
    how = f"of each ten rows, {len(missing)} by seed {seed}: " if missing else ""
    return cast(dict[str, Tensor], made), [*table.notes, f"read in blocks of rows; {how}{sizes}"]


def measured(table: Table, columns: Sequence[Column]) -> dict[str, Tensor]:
    """Return the splits of a table, and "all", to evaluate a model of these columns on."""
    shares = {name: Share(*part) for name, part in table.parts.items()}
    shares["all"] = Share(0, table.count)
    made = {name: TableRows(table, columns, share) for name, share in shares.items()}
    return cast(dict[str, Tensor], made)


def _scan(file: Path, told: Mapping[str, str | None] | None = None) -> "LazyFrame":
    """Return the rows of a file, with columns that its folders state and that it lacks."""
    pl = polars()
    frame = tables.scan(file)
    if not told:
        return frame
    own = tables.of_file(file, frame.collect_schema)
    lacks = {name: cell for name, cell in told.items() if name not in own}
    return frame.with_columns(pl.lit(cell, pl.String).alias(name) for name, cell in lacks.items())


def _size(file: Path, frame: "LazyFrame") -> tuple[list[str], int]:
    import polars as pl

    count = int(_of_file(file, frame.select(pl.len())).item())
    names = frame.collect_schema().names()
    tables.checked(pl.DataFrame(schema=names), str(file), count)
    return names, count


def _of_file(file: Path, frame: "LazyFrame") -> "DataFrame":
    return tables.of_file(file, frame.collect)
