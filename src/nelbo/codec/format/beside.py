"""Convert columns of a table to bytes exactly, to be stored beside the rows coded by a model.

Each column has one bit per cell that is set unless the cell is missing; then follow the numbers,
if cells have a fixed size, or the lengths of all cells as text, and their bytes.
"""

from typing import TYPE_CHECKING

import numpy as np

from nelbo.codec.errors import CorruptFileError
from nelbo.data.tabular.dtypes import describe, parse
from nelbo.data.tabular.frames import polars

if TYPE_CHECKING:
    from polars import DataType, Series

#: types whose cells are stored as text, which is exact
AS_TEXT = ("String", "Categorical", "Enum", "Decimal", "Int128", "UInt128")
#: number types for the cells of types that are not numeric
PHYSICAL = {"Boolean": "u1", "Date": "i4", "Time": "i8", "Datetime": "i8", "Duration": "i8"}


def to_bytes(series: "Series") -> bytes:
    """Return the cells of a column as bytes.

    Raises:
        ValueError: its type is nested.
    """
    pl = polars()
    name, numbers = _kind(series.dtype)
    if not name:
        raise ValueError(
            f"the column {series.name!r} is of the type {series.dtype}, which is not compressed;"
            " remove it"
        )
    there = np.packbits(series.is_not_null().to_numpy()).tobytes()
    if name == "Null":
        return there
    if name in AS_TEXT:
        texts = series.cast(pl.String).fill_null("")
        lengths = texts.str.len_bytes().to_numpy().astype("<u4")
        return there + lengths.tobytes() + "".join(texts).encode()
    plain = series.cast(pl.UInt8) if name == "Boolean" else series.to_physical()
    return there + plain.fill_null(0).to_numpy().astype(numbers).tobytes()


def of_bytes(name: str, dtype: str, count: int, data: bytes) -> "Series":
    """Return the column of `count` cells of a type (`dtypes`) from its bytes.

    Raises:
        CorruptFileError: these are not such bytes.
    """
    pl = polars()
    made = parse(dtype)
    kind, numbers = _kind(made)
    begin = -(-count // 8)
    if len(data) < begin:
        raise CorruptFileError(f"the cells of the column {name!r} are truncated")
    there = np.unpackbits(np.frombuffer(data[:begin], np.uint8), count=count).astype(bool)
    rest = data[begin:]
    try:
        if kind == "Null":
            return pl.Series(name, [None] * count, dtype=pl.Null)
        if kind in AS_TEXT:
            lengths = np.frombuffer(rest[: 4 * count], "<u4").astype(np.int64)
            ends, text = np.cumsum(lengths), rest[4 * count :]
            if len(lengths) != count or (ends[-1] if count else 0) != len(text):
                raise CorruptFileError(f"the cells of the column {name!r} are truncated")
            cells = [
                text[end - size : end].decode() if known else None
                for end, size, known in zip(ends, lengths, there, strict=True)
            ]
            return pl.Series(name, cells, dtype=pl.String).cast(made)
        values = np.frombuffer(rest, numbers)
        if len(values) != count:
            raise CorruptFileError(f"the cells of the column {name!r} are truncated")
        plain = pl.Series(name, values.astype(values.dtype.newbyteorder("=")))
        return plain.cast(made).set(pl.Series(~there), None)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"the column {name!r} cannot be rebuilt from its cells: {error}"
        ) from None


def equal_cells(a: "Series", b: "Series") -> np.ndarray:
    """Return a mask of the cells that are equal to the bit in two columns of one type, (N,)."""
    pl = polars()
    if a.dtype.is_float():
        both = (a.is_null() & b.is_null()).to_numpy()
        one = (a.is_null() ^ b.is_null()).to_numpy()
        bits = [s.fill_null(0).to_numpy().astype(_kind(a.dtype)[1]) for s in (a, b)]
        unsigned = f"u{bits[0].dtype.itemsize}"
        return both | (~one & (bits[0].view(unsigned) == bits[1].view(unsigned)))
    if _kind(a.dtype)[0] in ("Categorical", "Enum"):
        a, b = a.cast(pl.String), b.cast(pl.String)
    return a.eq_missing(b).to_numpy()


def _kind(dtype: "DataType") -> tuple[str, str]:
    """Return the name of a type without its brackets, and the NumPy type of its cells or ""."""
    name = describe(dtype).partition("[")[0]
    if name in PHYSICAL:
        return name, f"<{PHYSICAL[name]}"
    for word, letter in (("UInt", "u"), ("Int", "i"), ("Float", "f")):
        if name.startswith(word) and name not in AS_TEXT:
            return name, f"<{letter}{int(name.removeprefix(word)) // 8}"
    return name, ""
