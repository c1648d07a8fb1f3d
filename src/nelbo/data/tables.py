"""Tables: files into frames, frames into examples by a layout, and samples back into files.

Needs polars (extra: tables). Columns are matched by name, so their order does not matter.
"""

import csv
import io
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nelbo import _limits
from nelbo.data.layout import Column, Place, places
from nelbo.data.remote import here

if TYPE_CHECKING:
    from polars import DataFrame, Series

    Frame = DataFrame | Mapping[str, Iterable[object]]  # of pandas too

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}
FILES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".ipc")
#: what stands for a missing cell in text
NOTHING = ("", "na", "n/a", "nan", "null", "none", "?")
OTHER = "(other)"
_HELD = threading.Lock()  # by the one that holds the error stream


def read(path: Path) -> "DataFrame":
    """The table in a .csv, .tsv, .parquet, .arrow, .feather or .ipc file; text files as text.

    Raises:
        ValueError: if the file is damaged, ragged, not UTF-8, or has no rows or no headings.
    """
    pl = polars()
    suffix = path.suffix.lower()
    _limits.check_file(path, 2)
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
        ValueError: if it is none of these.
    """
    pl = polars()
    if hasattr(table, "to_polars"):  # of datasets
        table = table.to_polars()
    if isinstance(table, pl.LazyFrame):
        table = table.collect()
    if isinstance(table, pl.DataFrame):
        return checked(table, "the table")
    try:
        if isna := getattr(table, "isna", None):  # pandas has several ways to say: nothing here
            table = cast(Any, table).astype(object).where(~isna(), None)
        columns = {str(name): list(table[name]) for name in table}  # type: ignore[index]
        return checked(pl.DataFrame(columns, strict=False, nan_to_null=True), "the table")
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
        frame = pl.read_csv(path, separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from None
    if frame.height != rows:  # blank lines are no rows
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    if frame.height != rows or frame.columns != heading:
        raise ValueError(
            f"{path} is read as {rows} rows of text or as {frame.height}, by how its quotes are"
            " taken; quote every cell that has quotes or line ends in it"
        )
    return frame


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- cells


def texts(series: "Series") -> "Series":
    """The cells of a column as text without spaces around it; null where there is nothing.

    Raises:
        ValueError: a column of dates, lists or the like.
    """
    pl = polars()
    if series.dtype.is_float():
        whole = series.is_finite() & (series == series.round())
        integers = series.set(~whole.fill_null(False), None).cast(pl.Int64, strict=False)
        text = integers.cast(pl.String)
        text = text.zip_with(text.is_not_null(), series.fill_nan(None).cast(pl.String))
    elif series.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null) or (
        series.dtype.is_numeric()
    ):
        text = series.cast(pl.String).str.strip_chars()
    else:
        raise ValueError(
            f"the column {series.name!r} is of the type {series.dtype}; give numbers, text or"
            " booleans, or remove it"
        )
    return text.set(text.str.to_lowercase().is_in(NOTHING).fill_null(True), None)


def numbers(series: "Series", first: int = 0) -> np.ndarray:
    """The cells of a column as float64, shape (N,), NaN where there is nothing.

    Args:
        series: the column.
        first: row of the table that is its first.

    Raises:
        ValueError: a cell that is no number, or is infinite; it names the row.
    """
    pl = polars()
    if series.dtype.is_numeric():
        found = series.cast(pl.Float64)
    else:
        text = texts(series)
        found = text.cast(pl.Float64, strict=False)
        odd = text.is_not_null() & found.is_null()
        if odd.any():
            row = int(odd.arg_true()[0])
            raise ValueError(
                f"the column {series.name!r} holds numbers, but {text[row]!r} in row"
                f" {first + row + 1}; mend it, or declare the column a category with --schema"
            )
    values = found.to_numpy().astype(np.float64)
    values[found.is_null().to_numpy()] = np.nan
    infinite = np.isinf(values)
    if infinite.any():
        raise ValueError(
            f"the column {series.name!r} has {infinite.sum()} infinite values, the first in row"
            f" {first + infinite.argmax() + 1}; remove those rows, or leave the cells empty"
        )
    return values


def column_of(frame: "DataFrame", name: str, label: str) -> "Series":
    """A column by its name.

    Raises:
        ValueError: the table, which is called `label`, has none of this name.
    """
    if name not in frame.columns:
        others = ", ".join(map(repr, frame.columns))
        raise ValueError(f"{label} has no column {name!r}; it has {others}")
    return frame[name]


def label_cells(frame: "DataFrame", name: str, words: bool) -> np.ndarray:
    """The cells of a column that is a condition, (N,): as words, or else as numbers.

    No word is a class of its own, "".

    Raises:
        ValueError: no such column, or a cell that is no number.
    """
    series = column_of(frame, name, "the table")
    return np.array(texts(series).fill_null("").to_list(), str) if words else numbers(series)


# ---- examples


def encode(
    frame: "DataFrame",
    columns: Sequence[Column],
    label: str,
    rounding: bool = False,
    first: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """The rows as examples, (N, D) float64, and notes on what was not taken as it is.

    Args:
        frame: the table; columns that the layout does not name are left out.
        columns: the layout.
        label: names the table in messages.
        rounding: round numbers to the precision of their columns; else they must be so.
        first: row of the table that is the first of the frame.

    Raises:
        ValueError: a column is not there, or a cell cannot be one of its column.
    """
    absent = [column.name for column in columns if column.name not in frame.columns]
    if absent:
        others = ", ".join(map(repr, frame.columns))
        raise ValueError(f"{label} has no column {absent[0]!r}; it has {others}")
    known = {column.name for column in columns}
    extra = [name for name in frame.columns if name not in known]
    notes = [f"columns left out: {', '.join(extra)}"] if extra else []
    parts: list[np.ndarray] = []
    for place in places(columns):
        series = frame[place.column.name]
        if place.column.kind in ("category", "boolean"):
            parts.append(_symbols(series, place.column, first))
            continue
        values, moved = _numbers(series, place.column, rounding, first)
        if place.indicator:
            parts.append(np.where(np.isnan(values), 2.0, 1.0))
            continue
        if moved:
            precision = place.column.precision
            notes.append(f"{moved} values of {series.name} were rounded to {precision:g}")
        levels = place.column.group == "levels"
        parts.append(_levels(values, place.column) if levels else values)
    return np.stack(parts, 1), notes


def encode_holes(
    frame: "DataFrame", columns: Sequence[Column], label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of which any cell may be missing, as examples whose cells are all there.

    Args:
        frame: the table.
        columns: the layout, whether or not it has missing cells.
        label: names the table in messages.

    Returns:
        Examples (N, D), any value standing where a cell is missing, and which of their
        dimensions are known, (N, D). That a cell is not missing counts as known.

    Raises:
        ValueError: as `encode`.
    """
    whole, missing = frame, {}
    for column in columns:
        cells = texts(column_of(frame, column.name, label))
        missing[column.name] = cells.is_null().to_numpy()
        some = column.categories[0] if column.categories else str(column.low or 0.0)
        whole = whole.with_columns(cells.fill_null(some).alias(column.name))
    x, _ = encode(whole, columns, label)
    known = [place.indicator | ~missing[place.column.name] for place in places(columns)]
    return x, np.stack(known, 1)


def filled(frame: "DataFrame", drawn: "DataFrame") -> "DataFrame":
    """A table whose missing cells are those of another; the type of a column gives way to it."""
    pl = polars()
    for name in drawn.columns:
        cells, made = frame[name], drawn[name]
        hole = texts(cells).is_null()
        if not hole.any():
            continue
        if made.dtype == pl.String:
            made = texts(cells).zip_with(~hole, made)
        elif cells.dtype == pl.String:
            made = cells.zip_with(~hole, made.cast(pl.String))
        else:
            kind = cells.dtype if made.dtype.is_integer() else made.dtype
            made = cells.cast(kind).zip_with(~hole, made.cast(kind))
        frame = frame.with_columns(made.alias(name))
    return frame


def _symbols(series: "Series", column: Column, first: int) -> np.ndarray:
    text, pl = texts(series), polars()
    code = {category: i + 1.0 for i, category in enumerate(column.categories)}
    absent = float(len(code) + 1) if column.missing else 0.0
    found = text.replace_strict(code, default=0.0, return_dtype=pl.Float64).to_numpy()
    codes = np.where(text.is_null().to_numpy(), absent, found)
    if column.kind == "boolean":
        wrong = np.flatnonzero(codes == 0)
        if len(wrong):
            cell = text[int(wrong[0])]
            held = "nothing" if cell is None else repr(cell)
            raise ValueError(
                f"the column {column.name!r} is boolean, {' or '.join(column.categories)}; row"
                f" {first + wrong[0] + 1} holds {held}; mend it, or train with --schema where"
                " the column is a category"
            )
    return codes


def _numbers(
    series: "Series", column: Column, rounding: bool, first: int
) -> tuple[np.ndarray, int]:
    """The numbers of a column on its lattice, and how many were moved there."""
    values = numbers(series, first)
    absent = np.isnan(values)
    if absent.any() and not column.missing:
        raise ValueError(
            f"the column {column.name!r} has {absent.sum()} missing values, the first in row"
            f" {first + absent.argmax() + 1}, and had none in training; fill them, or train with"
            ' --schema where the column has "missing": true'
        )
    if column.kind == "real":
        return values, 0
    assert column.precision is not None and column.low is not None
    steps = np.rint((values - column.low) / column.precision)
    points = column.low + column.precision * steps
    moved = np.abs(values - points) > 1e-6 * column.precision + 1e-12 * np.abs(values)
    if moved.any() and not rounding:
        raise ValueError(
            f"the column {column.name!r} has the precision {column.precision:g}; row"
            f" {first + moved.argmax() + 1} holds {values[moved.argmax()]:g}; round it first"
        )
    return np.round(points, column.decimals), int(moved.sum())


def _levels(values: np.ndarray, column: Column) -> np.ndarray:
    assert column.precision is not None and column.low is not None
    code = np.rint((values - column.low) / column.precision) + 1
    code = np.clip(code, 0, column.points + 1)
    return np.where(np.isnan(values), column.points + 2, code)


def decode(x: np.ndarray, columns: Sequence[Column]) -> "DataFrame":
    """Examples (N, D) as a table with the columns, in their order.

    A number beyond the levels is written as the next point outside; a category that training did
    not have as "(other)".
    """
    pl = polars()
    at = places(columns)
    absent = {place.index: x[:, i] == 2 for i, place in enumerate(at) if place.indicator}
    made: dict[int, Series] = {}
    for i, place in enumerate(at):
        if not place.indicator:
            made[place.index] = _decoded(x[:, i], place, absent.get(place.index))
    return pl.DataFrame([made[index] for index in range(len(columns))])


def _decoded(x: np.ndarray, place: Place, absent: np.ndarray | None) -> "Series":
    pl = polars()
    column = place.column
    if column.kind in ("category", "boolean"):
        names = [OTHER, *column.categories, None]
        return pl.Series(column.name, [names[int(code)] for code in x], dtype=pl.String)
    if column.group == "levels":
        assert column.precision is not None and column.low is not None
        absent = x == column.points + 2
        x = column.low + column.precision * (x - 1)
    whole = column.kind == "rounded" and column.decimals == 0
    values = np.round(x, column.decimals) if column.kind == "rounded" else x
    none = np.zeros(len(x), bool) if absent is None else absent
    cells = [None if no else v for v, no in zip(values.tolist(), none, strict=True)]
    series = pl.Series(column.name, cells, dtype=pl.Float64)
    return series.cast(pl.Int64) if whole else series


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
