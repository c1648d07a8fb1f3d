"""Tables: files and frames of others into frames of polars, their cells, and files again.

Needs polars (extra: tables).
"""

import csv
import io
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from nelbo import _limits
from nelbo.data.frames import columns_of
from nelbo.data.remote import here
from nelbo.data.spelling import is_number

if TYPE_CHECKING:
    from polars import DataFrame, Series

    Frame = DataFrame | Mapping[str, Iterable[object]]  # of pandas too

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}
FILES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".ipc")
#: bytes of memory for each of a text file: a cell of two is a text of polars, and of Python
TEXT = 24
_HELD = threading.Lock()  # by the one that holds the error stream


def read(path: Path) -> "DataFrame":
    """The table in a .csv, .tsv, .parquet, .arrow, .feather or .ipc file; text files as text.

    Raises:
        ValueError: if the file is damaged, ragged, not UTF-8, or has no rows or no headings.
    """
    pl = polars()
    suffix = path.suffix.lower()
    _limits.check_file(path, TEXT if suffix in SEPARATORS else 2)
    if suffix in SEPARATORS:
        frame = _read_text(path, SEPARATORS[suffix])
    else:
        load: Callable[[Path], DataFrame] = (
            pl.read_parquet if suffix == ".parquet" else pl.read_ipc
        )
        frame = of_file(path, lambda: load(path))
    return checked(frame, str(path))


def of_file(path: Path, load: "Callable[[], DataFrame]") -> "DataFrame":
    """What polars makes of a file; of damage, on which it may panic, one ValueError.

    A panic is printed, with its stack, on the error stream that all threads share: what is printed
    in the meantime is held back, and dropped where there was one.
    """
    pl = polars()
    with _HELD, tempfile.TemporaryFile() as held:
        stream = os.dup(2)
        os.dup2(held.fileno(), 2)
        panic = False
        try:
            return load()
        except pl.exceptions.PanicException as error:
            panic = True
            raise _damaged(path, error) from None
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _damaged(path, error) from None
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            held.seek(0)
            if not panic and (others := held.read()):
                os.write(2, others)


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{path} cannot be read as a table: {reason}")


def find(source: "str | PathLike[str] | Frame") -> tuple[str, "DataFrame"]:
    """The table of that name, or which it is, and a name for messages."""
    if isinstance(source, str | PathLike):
        path = Path(here(source)).absolute()
        return str(path), read(path)
    return "the table", frame_of(source)


def frame_of(table: "Frame") -> "DataFrame":
    """A frame of polars, pandas or datasets, or a mapping of names to columns, as one of polars.

    Raises:
        ValueError: if it is none of these, or two columns have the same name.
    """
    pl = polars()
    if hasattr(table, "to_polars"):  # of datasets
        table = table.to_polars()
    if isinstance(table, pl.LazyFrame):
        table = table.collect()
    if isinstance(table, pl.DataFrame):
        return checked(table, "the table")
    try:
        if hasattr(table, "column_names") and hasattr(table, "to_pydict"):  # of pyarrow
            return checked(cast(Any, pl.from_arrow(cast(Any, table))), "the table")
        return checked(pl.DataFrame(columns_of(table)), "the table")
    except (TypeError, KeyError, pl.exceptions.PolarsError) as error:
        kind = type(table).__name__
        raise ValueError(
            f"a table is a polars or pandas frame or a mapping of columns; got {kind}: {error}"
        ) from None


def checked(frame: "DataFrame", label: str, rows: int | None = None) -> "DataFrame":
    """The frame; ValueError where it has no rows, or columns without a name.

    Args:
        frame: the table.
        label: names it in messages.
        rows: of the table, where the frame is but its heading.
    """
    rows = frame.height if rows is None else rows
    if not frame.width or not rows:
        raise ValueError(f"{label} has {rows} rows and {frame.width} columns; give at least 1")
    unnamed = [i + 1 for i, name in enumerate(frame.columns) if not name.strip()]
    if unnamed:
        raise ValueError(f"column {unnamed[0]} of {label} has no name; name it, or remove it")
    return frame


def _read_text(path: Path, separators: str) -> "DataFrame":
    """A text table whose every row has as many fields as the heading; all cells as text."""
    pl = polars()
    rows = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = max(separators, key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            heading = next(reader, [])
            for row in reader:
                if row and len(row) != len(heading):
                    raise ValueError(
                        f"line {reader.line_num} of {path} has {len(row)} fields where the heading"
                        f" has {len(heading)}; mend that line"
                    )
                rows += bool(row)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x};"
            " save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} is no row of text: {error}") from None
    twice = [name for name, count in Counter(heading).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has two columns of the name {twice[0]!r}; rename one")
    if heading and all(is_number(name) for name in heading):
        raise ValueError(
            f"the first line of {path} holds numbers; put a line with the columns' names before it"
        )
    if not rows:
        return pl.DataFrame(
            {name: [] for name in heading}, schema=dict.fromkeys(heading, pl.String)
        )
    try:
        # the heading as a row, for of one polars leaves quotes as they are
        frame = pl.read_csv(path, separator=separator, infer_schema=False, has_header=False)
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from None
    if frame.height != 1 + rows:  # blank lines are no rows
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    if frame.height != 1 + rows or [name or "" for name in frame.row(0)] != heading:
        raise ValueError(
            f"{path} is read as {rows} rows of text or as {frame.height - 1}, by how its quotes"
            " are taken; quote every cell that has quotes or line ends in it"
        )
    return frame[1:].rename(dict(zip(frame.columns, heading, strict=True)))


def column_of(frame: "DataFrame", name: str, label: str) -> "Series":
    """A column by its name.

    Raises:
        ValueError: the table, which is called `label`, has none of this name.
    """
    if name not in frame.columns:
        others = ", ".join(map(repr, frame.columns))
        raise ValueError(f"{label} has no column {name!r}; it has {others}")
    return frame[name]


def to_bytes(frame: "DataFrame", suffix: str) -> bytes:
    """A table as the content of a .csv, .tsv, .parquet or .arrow file."""
    file = io.BytesIO()
    if suffix in SEPARATORS:
        frame.write_csv(file, separator=SEPARATORS[suffix][0])
    elif suffix == ".parquet":
        frame.write_parquet(file)
    else:
        frame.write_ipc(file)
    return file.getvalue()


def polars() -> ModuleType:
    """The library, imported where it is used."""
    try:
        return import_module("polars")
    except ImportError:
        raise ValueError("tables need polars; try: pip install 'nelbo[tables]'") from None
