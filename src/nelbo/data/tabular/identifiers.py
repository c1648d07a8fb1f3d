"""Columns that tell rows apart and measure nothing: left out, with a note, unless asked for.

Their names say so, or their cells do: row numbers, integers that float64 cannot tell apart, texts
that hardly repeat. Integers that are all different say nothing: prices and populations are, too.
"""

import re
from importlib import import_module
from typing import TYPE_CHECKING, cast

from nelbo.data.tabular.cells import texts
from nelbo.data.tabular.spelling import NUMBER, codes, number_advice

if TYPE_CHECKING:
    from polars import Series

LARGEST = 2**53  # integers from here on are not all float64
FEW = 20  # different values up to which those of a column with an identifier's name are kept
ROWS = 50  # up to which row numbers and texts say nothing
COUNTED = 2**16  # values that are told apart over all pieces
LONG = 200  # rows from which numbers that follow each other need not begin at 0 or 1
SHARE = 0.9  # of the rows, beyond which different texts name them
WORDS = {"id", "ids", "uid", "uuid", "guid", "identifier"}  # first or last in a name
WHOLE = {"index", "row", "rowid", "rownum", "rownumber", "rownames", "rowname", "recordnumber"}
#: how pandas calls an index without a name: in Parquet, as it reads CSV, and in CSV, as R does
OF_PANDAS = re.compile(r"__index_level_\d+__|Unnamed: \d+(_level_\d+)?|")
CODE = r"^[+-]?0[0-9]|^[0-9]+[eE][0-9]+$"  # what may be a code; see `spelling.codes`
KEEP = "name it in --schema to keep it"


class Evidence:
    """Whether a column names rows, by its cells in their order, which may come in pieces.

    Args:
        name: of the column.
        stored: whether the source says that it is an index.
    """

    def __init__(self, name: str, stored: bool = False) -> None:
        self.name, self.stored = name, stored or bool(OF_PANDAS.fullmatch(name))
        self.pieces, self.rows, self.known, self.distinct = 0, 0, 0, 0
        self.values: set[object] = set()
        self.integers = self.words = self.follow = True
        self.large, self.ends = False, (0, 0)

    def add(self, series: "Series") -> "Evidence":
        """Look at further cells."""
        self.pieces += 1
        self.rows += len(series)
        if self.stored or not (self.integers or self.words):
            return self
        numbers, words = _cells(series)
        found = words if numbers is None else numbers
        if found is None:
            self.integers = self.words = False
            return self
        known = found.drop_nulls()
        if len(known):
            self.integers &= numbers is not None
            self.words &= words is not None
        self.known += len(known)
        self._count(known)
        if numbers is None or len(known) < len(numbers):
            self.follow = False
        if numbers is not None and len(known):
            self._follow(numbers)
        return self

    def _count(self, known: "Series") -> None:
        """Different values, of all pieces together as long as they are not too many."""
        different = known.unique()
        if self.distinct + len(different) > COUNTED:
            self.distinct += len(different)
            return
        self.values.update(different.to_list())
        self.distinct = len(self.values)

    def _follow(self, numbers: "Series") -> None:
        """Whether integers are large, and follow each other from piece to piece."""
        self.large |= bool((numbers.cast(float).abs() >= LARGEST).any())
        if self.large or not self.follow:
            self.follow = False
            return
        low, high = int(cast(int, numbers.min())), int(cast(int, numbers.max()))
        ordered = bool((numbers.diff().drop_nulls() == 1).all())
        if self.pieces == 1:
            # in any order, where the rows may have been shuffled
            shuffled = low in (0, 1) and high - low + 1 == len(numbers) == self.distinct
            self.follow, self.ends = ordered or shuffled, (low, high)
        else:
            self.follow = ordered and low == self.ends[1] + 1
            self.ends = self.ends[0], high

    @property
    def reason(self) -> str:
        """Why the column is left out; "" where it is not."""
        if self.stored:
            name = self.name or "the column without a name"
            return f"{name} is the index that pandas stored: left out; {KEEP}"
        if not self.known:
            return ""
        if self.integers and self.large:
            return (
                f"{self.name} holds integers beyond 2^53, which cannot be told apart as numbers:"
                " left out; declare it a category with --schema to keep it"
            )
        named = says_identifier(self.name)
        unique = self.distinct == self.known
        if named and (self.integers or self.words) and (unique or self.distinct > FEW):
            return (
                f"{self.name} is the name of an identifier, and its {self.distinct} values differ:"
                f" left out; {KEEP}"
            )
        long = self.rows > (ROWS if self.ends[0] in (0, 1) else LONG)
        if self.integers and self.follow and long:
            return f"{self.name} counts the rows: left out; {KEEP}"
        if self.words and name_rows(self.distinct, self.known):
            return (
                f"the column {self.name!r} has {self.distinct} different texts in {self.known}"
                f" rows, so that they name the rows: left out; {KEEP}"
            )
        return ""

    @property
    def note(self) -> str:
        """On a column that is kept in spite of its name; "" where there is nothing to say."""
        if self.reason or not says_identifier(self.name) or not (self.integers or self.words):
            return ""
        return (
            f"{self.name} is the name of an identifier, and kept, for its {self.distinct} values"
            " repeat; --schema without it leaves it out"
        )


def name_rows(different: int, rows: int) -> bool:
    """Whether texts of which so many are different in some rows name these."""
    return different > max(ROWS, SHARE * rows)


def identifies(series: "Series") -> bool:
    """Whether a column names the rows."""
    return bool(Evidence(series.name).add(series).reason)


def says_identifier(name: str) -> bool:
    """Whether the name of a column says that it identifies rows.

    >>> [says_identifier(n) for n in ("customerID", "id_order", "Row Number", "grid", "paid")]
    [True, True, True, False, False]
    """
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return bool(words) and (bool(WORDS & {words[0], words[-1]}) or "".join(words) in WHOLE)


def _cells(series: "Series") -> "tuple[Series | None, Series | None]":
    """The cells of a column as integers, or else as words; None where they are not these.

    Integers that are too large for a type are real numbers, which tell as much.
    """
    pl = import_module("polars")
    if series.dtype.is_integer():
        large = bool((series.cast(float).abs() >= LARGEST).any())
        return series.cast(float if large else pl.Int64), None
    if series.dtype.is_float():
        known = series.fill_nan(None)
        whole = ((known == known.round()) & (known.abs() < LARGEST)).all()
        return (known.cast(pl.Int64) if whole else None), None
    if not isinstance(series.dtype, pl.String | pl.Decimal):
        return None, None
    cells = texts(series)
    numbers = cells.str.contains(f"^(?:{NUMBER})$")
    if not numbers.any():
        values = cells.drop_nulls().unique().to_list()
        return None, None if values and number_advice(values) else cells  # these are numbers
    if cells.str.contains(CODE).any() and codes(cells.drop_nulls().unique()):
        return None, cells
    if not cells.str.contains(r"^[+-]?[0-9]+$").all():
        return None, None
    found = cells.cast(pl.Int64, strict=False)
    return found if found.null_count() == cells.null_count() else cells.cast(float), None
