"""Find columns that identify rows and measure nothing: they are left out, with a note.

Their names or their cells reveal them: row numbers, integers beyond the precision of float64,
texts that hardly repeat. Distinct integers prove nothing: prices and populations are distinct,
too.
"""

import re
from importlib import import_module
from typing import TYPE_CHECKING, cast

from nelbo.data.tabular.cells import texts
from nelbo.data.tabular.spelling import NUMBER, codes, number_advice

if TYPE_CHECKING:
    from polars import Series

LARGEST = 2**53  # from here on float64 does not hold all integers
FEW = 20  # distinct values up to which a column with an identifier's name is kept
ROWS = 50  # rows up to which row numbers and texts are no evidence
COUNTED = 2**16  # distinct values up to which duplicates are found across pieces
LONG = 200  # rows from which consecutive numbers need not begin at 0 or 1
SHARE = 0.9  # fraction of rows with distinct texts, beyond which texts identify them
WORDS = {"id", "ids", "uid", "uuid", "guid", "identifier"}  # as first or last word of a name
WHOLE = {"index", "row", "rowid", "rownum", "rownumber", "rownames", "rowname", "recordnumber"}
#: names that pandas gives to an unnamed index: in Parquet, when reading CSV, and in CSV, like R
OF_PANDAS = re.compile(r"__index_level_\d+__|Unnamed: \d+(_level_\d+)?|")
CODE = r"^[+-]?0[0-9]|^[0-9]+[eE][0-9]+$"  # a possible code; see `spelling.codes`
KEEP = "name it in --schema to keep it"


class Evidence:
    """Evidence on whether a column identifies rows, from its cells in order, which may come in
    pieces.

    Args:
        name: name of the column.
        stored: whether the source declares it an index.
    """

    def __init__(self, name: str, stored: bool = False) -> None:
        self.name, self.stored = name, stored or bool(OF_PANDAS.fullmatch(name))
        self.pieces, self.rows, self.known, self.distinct = 0, 0, 0, 0
        self.values: set[object] = set()
        self.integers = self.words = self.follow = True
        self.large, self.ends = False, (0, 0)

    def add(self, series: "Series") -> "Evidence":
        """Take further cells into account; return self."""
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
        """Count distinct values, of all pieces together unless there are too many."""
        different = known.unique()
        if self.distinct + len(different) > COUNTED:
            self.distinct += len(different)
            return
        self.values.update(different.to_list())
        self.distinct = len(self.values)

    def _follow(self, numbers: "Series") -> None:
        """Update whether integers are large, and whether they are consecutive across pieces."""
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
        """Reason for which the column is left out; "" if it is kept."""
        if self.stored:
            name = self.name or "the column without a name"
            return f"{name} is the index that pandas stored: left out; {KEEP}"
        if not self.known:
            return ""
        if self.integers and self.large:
            return (
                f"{self.name} holds integers beyond 2^53, which float64 cannot tell apart: left"
                " out; declare it a category with --schema to keep it"
            )
        named = says_identifier(self.name)
        unique = self.distinct == self.known
        if named and (self.integers or self.words) and (unique or self.distinct > FEW):
            return (
                f"{self.name} has the name of an identifier, and its {self.distinct} values"
                f" differ: left out; {KEEP}"
            )
        long = self.rows > (ROWS if self.ends[0] in (0, 1) else LONG)
        if self.integers and self.follow and long:
            return f"{self.name} counts the rows: left out; {KEEP}"
        if self.words and name_rows(self.distinct, self.known):
            return (
                f"the column {self.name!r} has {self.distinct} different texts in {self.known}"
                f" rows, so it identifies the rows: left out; {KEEP}"
            )
        return ""

    @property
    def note(self) -> str:
        """Note on a column that is kept in spite of its name; "" if there is none."""
        if self.reason or not says_identifier(self.name) or not (self.integers or self.words):
            return ""
        return (
            f"{self.name} has the name of an identifier, but is kept because its {self.distinct}"
            " values repeat; a --schema without it leaves it out"
        )


def name_rows(different: int, rows: int) -> bool:
    """Return whether texts identify rows, given the number of distinct ones and of rows."""
    return different > max(ROWS, SHARE * rows)


def identifies(series: "Series") -> bool:
    """Return whether a column identifies rows."""
    return bool(Evidence(series.name).add(series).reason)


def says_identifier(name: str) -> bool:
    """Return whether the name of a column means that it identifies rows.

    >>> [says_identifier(n) for n in ("customerID", "id_order", "Row Number", "grid", "paid")]
    [True, True, True, False, False]
    """
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    return bool(words) and (bool(WORDS & {words[0], words[-1]}) or "".join(words) in WHOLE)


def _cells(series: "Series") -> "tuple[Series | None, Series | None]":
    """Return the cells of a column as integers, or else as words; None if they are not these.

    Integers that are too large for their type become real numbers, which suffice here.
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
