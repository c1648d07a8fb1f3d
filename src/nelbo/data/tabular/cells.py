"""Convert the cells of a column to text and to numbers, in one way for all callers."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nelbo.data.tabular.spelling import NUMBER

if TYPE_CHECKING:
    from polars import Series

#: words that mean a missing cell unless others are declared, in lower case
MISSING_WORDS = ("na", "n/a", "nan", "null", "none", "?")
#: advice on a column that cannot be modelled
LEAVE_OUT = "remove it, or leave it out with --schema"


def texts(
    series: "Series", words: Collection[str] | None = None, keep: Collection[str] = ()
) -> "Series":
    """Return the cells of a column as stripped text; null if a cell is missing.

    Args:
        series: the column.
        words: words that mean a missing cell, as written; if None the usual ones, in any case.
        keep: texts that are values although they are such words.

    Raises:
        ValueError: a column of dates, lists or the like.
    """
    text = raw_texts(series)
    return text.set(_missing(text, words, keep), None)


def raw_texts(series: "Series") -> "Series":
    """Return the cells of a column as text, null only if a cell is empty; as for `texts`."""
    import polars as pl

    if series.dtype.is_float():
        whole = series.is_finite() & (series == series.round())
        integers = series.set(~whole.fill_null(False), None).cast(pl.Int64, strict=False)
        text = integers.cast(pl.String)
        return text.zip_with(text.is_not_null(), series.fill_nan(None).cast(pl.String))
    if series.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null) or (
        series.dtype.is_numeric()
    ):
        return series.cast(pl.String).str.strip_chars()
    raise ValueError(
        f"the column {series.name!r} is of the type {series.dtype}; give numbers, text or"
        f" booleans, {LEAVE_OUT}"
    )


def missing_words(
    series: "Series", words: Collection[str] | None = None, keep: Collection[str] = ()
) -> list[str]:
    """Return the words in a column that count as missing cells; arguments as for `texts`."""
    if words is None and not _has_words(series):
        return []
    text = raw_texts(series)
    found = text.filter(_missing(text, words, keep) & (text != "").fill_null(False))
    return sorted(found.unique().to_list())


def words_note(name: str, words: Sequence[str]) -> str:
    """Return the note on a column in which words count as missing cells."""
    many = len(words) > 1
    listed = ", ".join(map(repr, words))
    return (
        f"{name}: the word{'s' * many} {listed} mean{'s' * (not many)} a missing cell; if"
        f" {'they are values' if many else 'it is a value'}, declare"
        ' "missing_words": [] for the column with --schema'
    )


def _missing(text: "Series", words: Collection[str] | None, keep: Collection[str]) -> "Series":
    if words is None:
        missing = text.str.to_lowercase().is_in([*MISSING_WORDS, ""])
    else:
        missing = text.is_in([*words, ""])
    if keep:
        missing &= ~text.is_in(list(keep))
    return missing.fill_null(True)


def _has_words(series: "Series") -> bool:
    """Return whether a column has a type that can hold words."""
    import polars as pl

    return series.dtype in (pl.String, pl.Categorical, pl.Enum)


def numbers(series: "Series", first: int = 0, words: Collection[str] | None = None) -> np.ndarray:
    """Return the cells of a column as float64, shape (N,), NaN if a cell is missing.

    Args:
        series: the column.
        first: row of the table at which the column begins.
        words: as for `texts`.

    Raises:
        ValueError: a cell is not a number, or is infinite; the message names the row.
    """
    import polars as pl

    if series.dtype.is_numeric():
        found = series.cast(pl.Float64)
        if words:
            found = found.set(texts(series, words).is_null(), None)
    else:
        text = texts(series, words)
        number = text.str.contains(f"^(?:{NUMBER})$")
        found = text.set(~number, None).cast(pl.Float64, strict=False)
        odd = number.fill_null(True).not_()
        if odd.any():
            row = int(odd.arg_true()[0])
            raise ValueError(
                f"the column {series.name!r} holds numbers, but {text[row]!r} in row"
                f" {first + row + 1}; fix it, or declare with --schema that the column is a"
                ' category, or that the word is among its "missing_words"'
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


def slack(values: np.ndarray, precision: float) -> np.ndarray:
    """Return the tolerance between numbers and the points of a lattice that they stand for.

    A number that float32 holds exactly is treated as float32, whose decimals are inexact: 136.3 is
    136.30000305 there. If this error is not far below the precision, it is not allowed for, and
    the number must be on its point.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32) == values
    coarse = np.where(single, 2.0**-23 * np.abs(values), 0.0)
    return np.where(coarse <= precision / 16, coarse, 0.0)


def off_lattice(values: np.ndarray, precision: float, low: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest points of a lattice, and a mask of the numbers that are off the
    lattice."""
    points = low + precision * np.rint((values - low) / precision)
    allowed = 1e-6 * precision + 1e-12 * np.abs(values) + slack(values, precision)
    return points, np.abs(values - points) > allowed
