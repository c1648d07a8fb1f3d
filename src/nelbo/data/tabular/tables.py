"""Read tables, from files or frames of other libraries, as frames of polars, and write files.

Needs polars (extra: tables).
"""

import io
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nelbo._utils import limits
from nelbo.data.remote import here
from nelbo.data.tabular import decoded, delimited
from nelbo.data.tabular.frames import columns_of, left_out, polars

if TYPE_CHECKING:
    from polars import DataFrame, LazyFrame

    Frame = DataFrame | Mapping[str, Iterable[object]]  # of pandas too

SEPARATORS = delimited.SUFFIXES
FILES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".ipc")
Result = TypeVar("Result")
#: bytes of memory per byte of a text file: a cell of two becomes a text of polars, and of Python
TEXT = 24
_HELD = threading.Lock()  # held while the error stream is redirected


def read(path: Path, notes: list[str] | None = None) -> "DataFrame":
    """Read the table in a .csv, .tsv, .parquet, .arrow, .feather or .ipc file; text files as text.

    Args:
        path: the file.
        notes: notes on guesses in a text file are appended.

    Raises:
        ValueError: the file is damaged, ragged, not UTF-8, or has no rows or no headings.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path of a table")
    limits.check_file(path, TEXT if suffix in SEPARATORS else 2)
    if suffix in SEPARATORS:
        notes = [] if notes is None else notes
        frame = of_file(path, lambda: delimited.read(path, notes))
    else:
        decoded.check([path])
        frame = of_file(path, scan(path).collect)
    return checked(frame, str(path))


def scan(path: Path) -> "LazyFrame":
    """Return the rows of a .parquet, .arrow, .feather or .ipc file, unread."""
    pl = polars()
    found = pl.scan_parquet if path.suffix.lower() == ".parquet" else pl.scan_ipc
    return cast("LazyFrame", found(path, hive_partitioning=False))


def of_file(path: Path, load: Callable[[], Result]) -> Result:
    """Call polars on a file, and turn damage, on which it may panic, into one ValueError.

    A panic prints its stack on the error stream that all threads share: all output in the meantime
    is held back, and dropped if there was a panic.
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


def find(source: object, notes: list[str] | None = None) -> tuple[str, "DataFrame"]:
    """Return the table in a file or frame, and a name for messages; notes as for `read`."""
    if isinstance(source, str | PathLike):
        path = Path(here(source)).absolute()
        return str(path), read(path, notes)
    if notes is not None:
        notes += left_out(source)
    return "the table", frame_of(source)


def frame_of(table: object) -> "DataFrame":
    """Convert a frame of polars, pandas or datasets, or a mapping of names to columns, to polars.

    Raises:
        ValueError: it is none of these, or two columns have the same name.
    """
    pl = polars()
    if hasattr(table, "to_polars"):  # a data set of datasets
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


def stored_index(path: Path) -> list[str]:
    """Return the columns of a Parquet file in which pandas stored its index, from its metadata."""
    pl = polars()
    if path.suffix.lower() != ".parquet" or not hasattr(pl, "read_parquet_metadata"):
        return []
    try:
        about = json.loads(pl.read_parquet_metadata(path).get("pandas", "{}"))
        return [name for name in about["index_columns"] if isinstance(name, str)]
    except (ValueError, TypeError, KeyError, RecursionError, pl.exceptions.PolarsError, OSError):
        return []


def checked(frame: "DataFrame", label: str, rows: int | None = None) -> "DataFrame":
    """Return the frame; raise ValueError if it has no rows, or unnamed columns except the first.

    Args:
        frame: the table.
        label: name of the table in messages.
        rows: number of rows, if the frame is only its heading.
    """
    rows = frame.height if rows is None else rows
    if not frame.width or not rows:
        raise ValueError(f"{label} has {rows} rows and {frame.width} columns; give at least 1")
    unnamed = [i + 1 for i, name in enumerate(frame.columns) if not name.strip()]
    if unnamed and (unnamed != [1] or frame.width == 1 or frame.columns[0]):  # 1 is an index
        raise ValueError(f"column {unnamed[0]} of {label} has no name; name it, or remove it")
    return frame


def to_bytes(frame: "DataFrame", suffix: str) -> bytes:
    """Return a table as the content of a .csv, .tsv, .parquet or .arrow file."""
    file = io.BytesIO()
    if suffix in SEPARATORS:
        # blank lines are not rows, so an empty cell of a single column must be quoted
        empty = '""' if frame.width == 1 else ""
        frame.write_csv(file, separator=SEPARATORS[suffix], null_value=empty)
    elif suffix == ".parquet":
        frame.write_parquet(file)
    else:
        frame.write_ipc(file)
    return file.getvalue()


#: a cell of a text table that a spreadsheet takes for a formula: like one, and not a number
FORMULA = re.compile(
    rb"(?:^|[,;\t\n])\"?((?:[=@]|[+-](?![\d.eE+-]*\"?(?:[,;\t\r\n]|$)))[^,;\t\r\n\"]{0,40})"
)


def formula_in(content: bytes) -> str | None:
    r"""Return the first cell of a text table that a spreadsheet would execute as a formula.

    >>> formula_in(b"a,b\n-1.5,=1+1\n")
    '=1+1'
    """
    found = FORMULA.search(content)
    return None if found is None else found[1].decode(errors="replace")
