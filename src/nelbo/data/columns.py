"""Columns of a table, and the place of each in an example x.

An example is a vector of numbers. Columns are arranged in groups (`groups`), because columns of
the same kind share a process:

    numbers   a real number, which has a density, or one on a lattice with too many points to
              enumerate, which has the probability of its cell: the number itself
    levels    a number on a lattice of few points, as a code: 0 for anything below `low`, then
              the points low, low + precision, .., high; one code for anything above; and, last,
              one for missing
    symbols   a category, as a code: 0 for any category that training did not have, then the
              categories; and, last, one for missing

A number that may be missing is NaN if it is, and is accompanied by a symbol that indicates this: 1
if the number is known, 2 if it is missing.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Literal, get_args

from annotated_types import Gt
from typing_extensions import override

from nelbo._utils.validation import Record

Kind = Literal["real", "rounded", "category", "boolean"]
Transform = Literal["standardise", "log", "quantile"]
GroupKind = Literal["numbers", "levels", "symbols"]

#: maximal points of a lattice that is modelled as levels; beyond, as numbers
MOST_POINTS = 254
#: sizes of groups of codes; several, so that a code of 2 values is not padded to 200
SIZES = (4, 16, 64, 256, 1024, 4096, 16384, 65536)


#: maximal points of a lattice: beyond, float64 skips some
POINTS = 2**53


@dataclass(frozen=True)
class Column(Record):
    """One column of a table.

    Args:
        name: its heading.
        kind: a real number; a number rounded to `precision` (1 for integers); a category; or a
            boolean, which has exactly two values.
        precision: distance between the values of a rounded number.
        low: the smallest value in training.
        high: the largest value in training.
        categories: the values of a category or boolean, as text.
        missing: whether cells may be missing.
        transform: the scale in which a number is modelled; see `MonotoneTransform`. Units stay the
            same: a density is one of the column as it is.
        missing_words: words that mean a missing cell; the usual ones (NA, null, ..) if None.
            An empty cell is always missing, and a word among the categories never is.
        rounds: whether numbers off the lattice are rounded to it, as those of training were.
        range: the smallest and the largest value of a real number in training; None if unknown.
        dtype: type of the cells in the source, to which samples are converted; see `dtypes`. ""
            for the type in which they are read, as for text files. Neither the range nor the type
            is part of the model.

    Raises:
        ValueError: these values contradict each other.
    """

    name: str
    kind: Kind
    precision: Annotated[float, Gt(0)] | None = None
    low: float | None = None
    high: float | None = None
    categories: tuple[str, ...] = ()
    missing: bool = False
    transform: Transform = "standardise"
    missing_words: tuple[str, ...] | None = None
    rounds: bool = field(default=False, compare=False)
    range: tuple[float, float] | None = field(default=None, compare=False, repr=False)
    dtype: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"of the column {self.name!r}"
        lattice = (self.precision, self.low, self.high)
        if self.kind != "rounded" and lattice != (None, None, None):
            raise ValueError(f"precision, low and high {where} are for the kind rounded")
        if self.kind == "rounded":
            precision, low, high = lattice
            if precision is None or low is None or high is None:
                raise ValueError(f"precision, low and high {where} must be numbers; got {lattice}")
            if not low <= high:
                raise ValueError(f"low {where} must be at most high; got {low:g} and {high:g}")
            if not high / precision - low / precision < POINTS:
                raise ValueError(
                    f"precision {where} is {precision:g}, too fine for the numbers {low:g} to"
                    f" {high:g}; give a coarser one, or take the column as real"
                )
        categories = list(self.categories)
        if self.kind in ("category", "boolean"):
            if not categories or len({*categories}) < len(categories):
                raise ValueError(
                    f"categories {where} must be different strings; got {categories!r}"
                )
            if self.kind == "boolean" and len(categories) != 2:
                raise ValueError(f"a boolean has two categories; {where[3:]} has {categories!r}")
            if len(categories) > SIZES[-1] - 2:
                raise ValueError(f"categories {where} are {len(categories)}, too many")
        elif categories:
            raise ValueError(f"categories {where} are for the kinds category and boolean")
        both = sorted({*(self.missing_words or ())} & {*categories})
        if both:
            raise ValueError(f"{both[0]!r} {where} is a category and a missing word; choose one")
        if self.range is not None and (self.kind != "real" or self.range[0] > self.range[1]):
            raise ValueError(
                f"the range {where} must be two numbers, the least first, and is for the kind"
                f" real; got {self.range!r}"
            )
        if self.transform != "standardise" and self.group in ("levels", "symbols"):
            raise ValueError(
                f"transform {where} is for real numbers and those on a lattice of more than"
                f" {MOST_POINTS} points; leave it out"
            )

    @property
    def points(self) -> int:
        """Number of points in the lattice of a rounded number, from low to high."""
        assert self.precision is not None and self.low is not None and self.high is not None
        return round((self.high - self.low) / self.precision) + 1

    @property
    def decimals(self) -> int:
        """Number of decimals that show a rounded number exactly; at most 12."""
        assert self.precision is not None and self.low is not None
        numbers = self.precision, self.low
        return next(
            (d for d in range(12) if all(abs(v - round(v, d)) <= 1e-9 * abs(v) for v in numbers)),
            12,
        )

    @property
    def ends(self) -> tuple[float, float] | None:
        """The smallest and largest number in training; None if it is not a number, or if
        unknown."""
        return self.range if self.low is None or self.high is None else (self.low, self.high)

    @property
    def group(self) -> GroupKind:
        """The kind of group to which the column belongs."""
        if self.kind == "rounded":
            return "levels" if self.points <= MOST_POINTS else "numbers"
        return "numbers" if self.kind == "real" else "symbols"

    @property
    def codes(self) -> int:
        """Number of codes of a column of levels or symbols."""
        if self.group == "levels":
            return self.points + 2 + self.missing
        return len(self.categories) + 1 + self.missing

    @property
    def indicated(self) -> bool:
        """Whether an additional symbol indicates that the number is missing."""
        return self.missing and self.group == "numbers"

    @override
    def to_dict(self) -> dict[str, object]:
        """Return the values for JSON, without those at their default."""
        values = {f.name: f.default for f in fields(self)}
        plain = {k: v for k, v in asdict(self).items() if v != values[k]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


@dataclass(frozen=True)
class Place:
    """One dimension of an example: a column, or the symbol that indicates a missing number."""

    column: Column
    index: int
    indicator: bool = False

    @property
    def codes(self) -> int:
        """Number of codes of this dimension."""
        return 3 if self.indicator else self.column.codes


@dataclass(frozen=True)
class Group:
    """Columns of the same kind, adjacent in x; each has at most `size` codes."""

    kind: GroupKind
    size: int
    places: tuple[Place, ...]


def groups(columns: Iterable[Column]) -> list[Group]:
    """Return the groups of an example in order: numbers first, then codes, small ones first."""
    places: dict[tuple[int, int], list[Place]] = {}
    order = get_args(GroupKind)
    for index, column in enumerate(columns):
        for indicator in (False, True) if column.indicated else (False,):
            place = Place(column, index, indicator)
            kind = "symbols" if indicator else column.group
            size = 1 if kind == "numbers" else _size(place.codes)
            places.setdefault((order.index(kind), size), []).append(place)
    return [Group(order[key[0]], key[1], tuple(places[key])) for key in sorted(places)]


def places(columns: Iterable[Column]) -> list[Place]:
    """Return the meaning of each dimension of an example."""
    return [place for group in groups(columns) for place in group.places]


def log_cells(columns: Iterable[Column]) -> float:
    """Return Σ log precision over the rounded columns.

    A probability P of rounded numbers, spread evenly over their cells, is a density in the units
    of the columns: -log density = -log P + log_cells. It can be compared with a density model of
    the same columns, if the other columns are the same for both.
    """
    return sum(math.log(c.precision) for c in columns if c.precision is not None)


def _size(codes: int) -> int:
    return next(size for size in SIZES if size >= codes)
