"""Types of a table's columns as text, so that samples can be returned in the types of the source.

    UInt8     Decimal[10, 2]     Enum["low", "high"]     Datetime["us", "UTC"]

The text is the name of a polars type, with its arguments as JSON in brackets.
"""

import json
from importlib import import_module
from typing import TYPE_CHECKING

from nelbo.data.tabular.cells import raw_texts

if TYPE_CHECKING:
    from polars import DataType, Series

PLAIN = ("Boolean", "String", "Categorical", "Float16", "Float32", "Float64", "Date", "Time")
INTEGERS = tuple(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64, 128))
#: arguments of the types with brackets
MADE_WITH = {
    "Decimal": ("precision", "scale"),
    "Enum": ("categories",),
    "Datetime": ("time_unit", "time_zone"),
    "Duration": ("time_unit",),
}


def describe(dtype: "DataType") -> str:
    """Return a type as text; "" for a nested one, such as a list."""
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
    """Return the type that `describe` described.

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
        raise ValueError(f"{text[:60]!r} is not a type of a column: {reason}") from None
    except pl.exceptions.PolarsError:
        pass
    raise ValueError(f"{text[:60]!r} is not a type of a column, such as 'UInt8'")


def categories_of(dtype: "DataType") -> list[str] | None:
    """Return the categories that a type lists; [] if it does not list them; None for other
    types."""
    name = type(dtype).__name__
    if name == "Enum":
        return [str(each) for each in dtype.categories]  # type: ignore[attr-defined]
    return [] if name == "Categorical" else None


def given_back(series: "Series", text: str) -> "Series":
    """Convert a column to its declared type; leave it unchanged if a cell does not fit."""
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
