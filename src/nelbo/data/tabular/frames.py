"""Convert frames of other libraries, and mappings, to columns of polars with the same types."""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nelbo.data.tabular.cells import raw_texts

if TYPE_CHECKING:
    from polars import DataFrame, Series

NUMBERS = "biuf"  # kinds of NumPy types that need no conversion


def columns_of(table: object) -> "list[Series]":
    """Return the columns of a pandas frame, a structured array, or a mapping of names to columns.

    Raises:
        ValueError: two columns have the same name, or it is an array without names.
        TypeError, KeyError: it is none of these.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        frame = cast(Any, table)
        found = [(str(name), frame.iloc[:, i]) for i, name in enumerate(frame.columns)]
    elif isinstance(table, np.ndarray) and table.dtype.names and table.ndim == 1:
        found = [(name, table[name]) for name in table.dtype.names]
    elif not isinstance(table, Mapping):
        kind = type(table).__name__
        also = ""
        if hasattr(table, "shape"):
            also = "; save an array with numpy.save and give its path, or name its columns"
        raise ValueError(
            f"a table is a polars or pandas frame or a mapping of columns; got {kind}{also}"
        )
    else:
        found = [(str(name), table[name]) for name in table]
        cells = next((name for name, column in found if np.isscalar(column)), None)
        if cells is not None:
            raise ValueError(
                f"the column {cells!r} of the table is the one value {table[cells]!r}; give a list"
                " for each column, or a list of records"
            )
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the table has two columns of the name {twice!r}; rename one")
    return [_column(name, values) for name, values in found]


def left_out(table: object) -> list[str]:
    """Return a note on a named index of a pandas frame, which is not one of its columns."""
    if not (hasattr(table, "iloc") and hasattr(table, "columns")):
        return []
    names = [str(name) for name in cast(Any, table).index.names if name is not None]
    if not names:
        return []
    return [f"the index of the frame, {', '.join(names)}, left out; reset_index() keeps it"]


def is_mixed(table: object) -> bool:
    """Return whether a table is a frame of pandas or polars with other cells than numbers.

    Truth values are no numbers here.
    """
    if hasattr(table, "iloc") and hasattr(table, "dtypes") and hasattr(table, "columns"):
        frame = cast(Any, table)
        kinds = (getattr(dtype, "kind", "O") for dtype in frame.dtypes)
        return any(kind not in "iuf" for kind in kinds) or bool(frame.isna().any(axis=None))
    if hasattr(table, "null_count") and hasattr(table, "schema"):
        frame = cast(Any, table)
        return not all(dtype.is_numeric() for dtype in frame.schema.values()) or any(
            frame.null_count().row(0)
        )
    return False


def dtypes_of(table: object) -> "dict[str, tuple[object, object]] | None":
    """Return the name and the type of each column of a pandas frame; None for other tables."""
    if not (hasattr(table, "iloc") and hasattr(table, "dtypes")):
        return None
    frame = cast(Any, table)
    return {str(n): (n, dtype) for n, dtype in zip(frame.columns, frame.dtypes, strict=True)}


def to_pandas(frame: "DataFrame", dtypes: "Mapping[str, tuple[object, object]]") -> Any:  # noqa: ANN401
    """Return a frame of polars as one of pandas, with the names and types of another.

    A column of whole numbers with missing cells is of the type Int64, unless it had another one.

    Args:
        frame: with the columns of the other, or some of them.
        dtypes: of the other frame, from `dtypes_of`.
    """
    pd, made = import_module("pandas"), frame.to_pandas()
    for name in frame.columns:
        column = frame[name]
        whole = column.dtype.is_integer() and column.null_count()
        dtype = dtypes[name][1] if name in dtypes else "Int64" if whole else made[name].dtype
        if made[name].dtype != dtype:
            made[name] = _of_dtype(pd, column.to_list(), dtype, made[name])
    return made.rename(columns={name: old for name, (old, _) in dtypes.items()})


def _of_dtype(pd: ModuleType, cells: list[object], dtype: Any, otherwise: object) -> object:  # noqa: ANN401
    """Return cells as a column of this type of pandas; `otherwise` if one of them does not fit."""
    if hasattr(dtype, "categories"):
        codes = {name: i for i, name in enumerate(_category_names(dtype.categories))}
        if any(cell is not None and cell not in codes for cell in cells):
            return otherwise
        found = [-1 if cell is None else codes[cell] for cell in cells]
        return pd.Categorical.from_codes(found, dtype=dtype)
    try:
        return pd.Series(cells, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        return otherwise


def _category_names(categories: Any) -> list[object]:  # noqa: ANN401
    """Return the texts that stand for the categories of a column of pandas."""
    series = import_module("polars").Series(categories.tolist(), strict=False)
    try:
        return cast(list[object], raw_texts(series).to_list())
    except ValueError:  # intervals, dates
        return [str(each) for each in categories]


def _column(name: str, values: object) -> "Series":
    """Convert one column; values that its library considers missing become null."""
    pl = import_module("polars")
    if isinstance(values, pl.Series):
        return values.rename(name)
    if hasattr(values, "detach"):
        values = cast(Any, values).detach().cpu().numpy()
    if hasattr(values, "iloc"):
        return _of_pandas(name, values)
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(
            f"the column {name!r} has the shape {values.shape}; give one number for each row"
        )
    if isinstance(values, np.ndarray) and values.dtype.kind in NUMBERS:
        return _of_numbers(name, values, np.zeros(len(values), bool))
    cells = values.tolist() if isinstance(values, np.ndarray) else list(cast(Any, values))
    return pl.Series(name, cells, strict=False, nan_to_null=True)


def _of_pandas(name: str, values: object) -> "Series":
    pl, series = import_module("polars"), cast(Any, values)
    missing, dtype = series.isna().to_numpy(), series.dtype
    if hasattr(dtype, "categories"):
        names = _category_names(dtype.categories)
        cells = [None if code < 0 else names[code] for code in series.cat.codes]
        return pl.Series(name, cells, dtype=pl.Categorical)
    plain = getattr(dtype, "numpy_dtype", dtype)
    if not isinstance(plain, np.dtype):
        plain = np.asarray(series).dtype
    if plain.kind in NUMBERS:
        masked = missing.any() and plain.kind != "f"
        found = series.to_numpy(dtype=plain, na_value=0) if masked else np.asarray(series, plain)
        return _of_numbers(name, found, missing)
    cells = [None if no else v for v, no in zip(series.astype(object), missing, strict=True)]
    return pl.Series(name, cells, strict=False, nan_to_null=True)


def _of_numbers(name: str, values: np.ndarray, missing: np.ndarray) -> "Series":
    pl = import_module("polars")
    if values.dtype.kind == "f":
        values = values.astype(np.float32 if values.dtype.itemsize <= 4 else np.float64)
        missing = missing | np.isnan(values)
    made = pl.Series(name, np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))
    return made.set(pl.Series(missing), None) if missing.any() else made


def column_of(frame: "DataFrame", name: str, label: str) -> "Series":
    """Return a column by its name.

    Raises:
        ValueError: the table, called `label`, has no such column.
    """
    if name not in frame.columns:
        others = ", ".join(map(repr, frame.columns))
        raise ValueError(f"{label} has no column {name!r}; it has {others}")
    return frame[name]


def polars() -> ModuleType:
    """Return the library, imported on demand."""
    try:
        return import_module("polars")
    except ImportError:
        raise ValueError("tables need polars; try: pip install 'nelbo[tables]'") from None
