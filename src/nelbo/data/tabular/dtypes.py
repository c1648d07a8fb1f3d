"""The types of a table's columns as text: what a source declares is kept, and given back.

    UInt8     Decimal[10, 2]     Enum["low", "high"]     Datetime["us", "UTC"]

A name of polars, and in brackets, as JSON, what it is made with.
"""

import json
from importlib import import_module
from typing import TYPE_CHECKING

from nelbo.data.tabular.cells import raw_texts

if TYPE_CHECKING:
    from polars import DataType, Series

PLAIN = ("Boolean", "String", "Categorical", "Float16", "Float32", "Float64", "Date", "Time")
INTEGERS = tuple(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64, 128))
#: what a type with brackets is made with
MADE_WITH = {
    "Decimal": ("precision", "scale"),
    "Enum": ("categories",),
    "Datetime": ("time_unit", "time_zone"),
    "Duration": ("time_unit",),
}


def describe(dtype: "DataType") -> str:
    """A type as text; "" for one that is not flat, such as a list."""
    name = type(dtype).__name__
    if name in (*PLAIN, *INTEGERS, "Null"):
        return name
    if name not in MADE_WITH:
        return ""
    values = [getattr(dtype, key) for key in MADE_WITH[name]]
    if name == "Enum":
        values = values[0].to_list()
    return f"{name}{json.dumps(values, ensure_ascii=False)}"


def parse(text: str) -> "DataType":
    """The type that `describe` gave.

    Raises:
        ValueError: there is no such type.
    """
    pl = import_module("polars")
    name, bracket, rest = text.partition("[")
    try:
        values = json.loads(bracket + rest) if bracket else []
        if name in MADE_WITH and isinstance(values, list):
            made: DataType = getattr(pl, name)(*([values] if name == "Enum" else values))
            digits = values if name == "Decimal" else [1, 0]
            possible = all(type(n) is int for n in digits) and 38 >= digits[0] >= digits[1] >= 0
            if possible and describe(pl.Series([], dtype=made).dtype) == text:
                return made
        if name in (*PLAIN, *INTEGERS, "Null") and not bracket:
            return getattr(pl, name)()
    except (ValueError, TypeError, OverflowError, IndexError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{text[:60]!r} is no type of a column: {reason}") from None
    except pl.exceptions.PolarsError:
        pass
    raise ValueError(f"{text[:60]!r} is no type of a column; a type is such as 'UInt8'")


def categories_of(dtype: "DataType") -> list[str] | None:
    """The categories that a type lists, whatever they look like; [] of one that has categories
    and does not list them; None of all others."""
    name = type(dtype).__name__
    if name == "Enum":
        return [str(each) for each in dtype.categories]  # type: ignore[attr-defined]
    return [] if name == "Categorical" else None


def given_back(series: "Series", text: str) -> "Series":
    """A column in its declared type; as it is where a cell has no place there."""
    pl = import_module("polars")
    dtype = parse(text)
    try:
        if dtype == pl.Boolean and series.dtype == pl.String:
            truth = {"true": True, "false": False}
            return series.replace_strict(truth, return_dtype=pl.Boolean)
        if dtype == pl.String and series.dtype.is_float():
            return raw_texts(series)
        return series.cast(dtype)
    except pl.exceptions.PolarsError:
        return series
