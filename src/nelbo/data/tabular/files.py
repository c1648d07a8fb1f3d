"""Tables in Parquet or Arrow files, of which a range of rows is read."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
from typing_extensions import override

from nelbo.data.readers.walk import files_below
from nelbo.data.splits import Declared, group
from nelbo.data.tabular import decoded, tables
from nelbo.data.tabular.frames import polars
from nelbo.data.tabular.table import Table

if TYPE_CHECKING:
    from polars import DataFrame, LazyFrame

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")
IN_MEMORY = 2**25  # cells of one file, beyond which it is read in blocks


class Files(Table):
    """The rows of Parquet or Arrow files, one file after another.

    Args:
        name: for messages.
        groups: the files of each split, or of "all".
        stated: for each file, the columns that the names of its folders state, with their cell.
        notes: notes on guesses.

    Raises:
        ValueError: a file is damaged, or has other columns than the first.
    """

    def __init__(
        self,
        name: str,
        groups: Mapping[str, Sequence[Path]],
        stated: Mapping[Path, Mapping[str, str | None]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.files = [file for files in groups.values() for file in files]
        self.stated = [(stated or {}).get(file, {}) for file in self.files]
        decoded.check(self.files)
        self.frames = [
            _scan(file, cells) for file, cells in zip(self.files, self.stated, strict=True)
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
        columns = ", ".join(dict.fromkeys(k for cells in self.stated for k in cells))
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
        for path, cells in zip(self.files, self.stated, strict=True):
            digest.update(repr(sorted(cells.items())).encode() if cells else b"")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.digest()


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
        stated = {files[i]: partitions(rests[i]) for i in range(len(files))}
        return Files(str(source), of_part, stated, notes)
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


def _scan(file: Path, stated: Mapping[str, str | None] | None = None) -> "LazyFrame":
    """Return the rows of a file, with columns that its folders state and that it lacks."""
    pl = polars()
    frame = tables.scan(file)
    if not stated:
        return frame
    own = tables.of_file(file, frame.collect_schema)
    lacks = {name: cell for name, cell in stated.items() if name not in own}
    return frame.with_columns(pl.lit(cell, pl.String).alias(name) for name, cell in lacks.items())


def _size(file: Path, frame: "LazyFrame") -> tuple[list[str], int]:
    import polars as pl

    count = int(_of_file(file, frame.select(pl.len())).item())
    names = frame.collect_schema().names()
    tables.checked(pl.DataFrame(schema=names), str(file), count)
    return names, count


def _of_file(file: Path, frame: "LazyFrame") -> "DataFrame":
    return tables.of_file(file, frame.collect)
