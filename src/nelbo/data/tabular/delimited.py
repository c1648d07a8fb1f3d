"""Read text tables: find the separator, the heading and the rows, or explain what is wrong.

A separator fits if every row has as many fields as the heading, at least two, respecting quotes.
If several fit, the first of tab, semicolon, bar and comma is taken, because a comma may be a
decimal comma.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nelbo.data.tabular.spelling import is_number

if TYPE_CHECKING:
    from polars import DataFrame

#: suffixes of text files, and the separator with which they are written
SUFFIXES = {".csv": ",", ".tsv": "\t"}
SEPARATORS = "\t;|,"
NO_HEADING = (
    "if that line holds data, put a line with the columns' names before it; if they are names,"
    " make them words, such as y2019"
)


@dataclass
class Layout:
    """Structure of a file for one separator.

    Args:
        separator: between fields.
        heading: the first line.
        rows: number of lines that are not blank.
        widths: the numbers of fields in rows, with the first line of each.
        blank: the first blank line followed by a row; 0 if there is none.
        error: an error in the quotes, or "".
    """

    separator: str
    heading: list[str]
    rows: int = 0
    widths: dict[int, int] = field(default_factory=dict)
    blank: int = 0
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether all rows have as many fields as the heading."""
        return not self.error and self.widths.keys() <= {len(self.heading)}


def read(path: Path, notes: list[str]) -> "DataFrame":
    """Read the table in a file, with all cells as text.

    Args:
        path: the file.
        notes: notes on guesses are appended.

    Raises:
        ValueError: it is ragged, is not UTF-8, or has no heading.
        polars.exceptions.PolarsError: polars cannot read it.
    """
    import polars as pl

    layout = _layout(path, notes)
    heading = [name.strip() for name in layout.heading]
    twice = [name for name, count in Counter(heading).items() if count > 1]
    if twice and not all(map(is_number, heading)):
        raise ValueError(f"{path} has two columns of the name {twice[0]!r}; rename one")
    if not layout.rows:
        return pl.DataFrame(schema=dict.fromkeys(heading, pl.String))
    # read the heading as a row, because polars keeps quotes in a heading
    frame = pl.read_csv(
        path,
        separator=layout.separator,
        infer_schema=False,
        has_header=False,
        eol_char=_line_end(path),
    )
    rows = layout.rows
    if frame.height != 1 + rows:  # drop blank lines
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    if frame.height != 1 + rows or [name or "" for name in frame.row(0)] != layout.heading:
        raise ValueError(
            f"the quotes of {path} can be read in two ways, giving {rows} or {frame.height - 1}"
            " rows; quote every cell that contains quotes or line ends"
        )
    if heading != layout.heading:
        blank = next(n for n, m in zip(layout.heading, heading, strict=True) if n != m)
        notes.append(f"{path} has headings such as {blank!r}: read without the blanks around them")
    frame = frame[1:]
    _check_heading(path, frame, heading, notes)
    return frame.rename(dict(zip(frame.columns, heading, strict=True)))


def _layout(path: Path, notes: list[str]) -> Layout:
    """Return the layout of a file for the separator that fits."""
    with _text(path) as file:
        first = file.readline().rstrip("\r\n")
    if re.fullmatch(r'"?sep=."?', first):
        raise ValueError(
            f"the first line of {path} is {first!r}, an instruction for spreadsheets; remove it"
        )
    default = SUFFIXES[path.suffix.lower()]
    tried = [_by(path, separator) for separator in SEPARATORS if separator in first]
    several = [layout for layout in tried if len(layout.heading) > 1]
    if not several:
        return _one_column(path, _by(path, default), notes)
    fitting = [layout for layout in several if layout.fits]
    if not fitting:
        _refuse(path, max(several, key=lambda layout: first.count(layout.separator)))
    if len(fitting) > 1:
        others = " or ".join(repr(layout.separator) for layout in fitting[1:])
        notes.append(f"{path} is separated by {fitting[0].separator!r}, though {others} fits too")
    return fitting[0]


def _one_column(path: Path, layout: Layout, notes: list[str]) -> Layout:
    """Return the layout of a file with one heading; raise ValueError if its rows hold more."""
    if not layout.heading and layout.rows:
        raise ValueError(f"the first line of {path} is blank; put the columns' names there")
    if layout.blank:
        raise ValueError(
            f'line {layout.blank} of {path} is blank; remove it, or write "" for an empty cell'
        )
    if not layout.fits:
        _refuse(path, layout)
    for separator in SEPARATORS:
        other = _by(path, separator)
        if layout.rows > 1 and len(other.widths) == 1 and max(other.widths) > 1:
            _refuse(path, other)
    words = layout.heading[0].split() if layout.heading else []
    with _text(path) as file:
        lines = [line.split() for line in file if line.strip()]
    if len(words) > 1 and len({len(line) for line in lines}) == 1 and layout.rows > 1:
        if all(is_number(word) for line in lines[1:] for word in line):
            raise ValueError(f"{path} is separated by blanks; separate it by commas")
        notes.append(
            f"{path} has one column, {layout.heading[0]!r}; if blanks separate its cells, write"
            " commas"
        )
    return layout


def _refuse(path: Path, layout: Layout) -> None:
    """Raise ValueError for rows whose number of fields differs from the heading."""
    if layout.error:
        raise ValueError(layout.error)
    wide = len(layout.heading)
    width, line = next((w, n) for w, n in layout.widths.items() if w != wide)
    advice = "fix that line"
    if wide == 1:
        mark = repr(layout.separator)
        advice = f"quote cells that hold {mark}, or name every column in the first line"
    raise ValueError(
        f"line {line} of {path} has {width} fields where the heading has {wide}; {advice}"
    )


def _by(path: Path, separator: str) -> Layout:
    """Return the layout of a file for a separator."""
    found, blank = Layout(separator, []), 0
    with _text(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            found.heading = next(reader, [])
            for row in reader:
                if not row:
                    blank = blank or reader.line_num
                    continue
                found.blank, found.rows = found.blank or blank, found.rows + 1
                found.widths.setdefault(len(row), reader.line_num)
        except csv.Error as error:
            found.error = f"line {reader.line_num} of {path} is not a row of text: {error}"
    return found


@contextmanager
def _text(path: Path) -> "Iterator":
    """Open the file as UTF-8 text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text: byte {error.start} is"
                f" {error.object[error.start]:#04x}; save it as UTF-8"
            ) from None


def _line_end(path: Path) -> str:
    """Return the character that ends lines: a carriage return if the file has no line feed."""
    with path.open("rb") as file:
        chunks = iter(lambda: file.read(1 << 20), b"")
        return "\n" if any(b"\n" in chunk for chunk in chunks) else "\r"


def _check_heading(path: Path, frame: "DataFrame", heading: list[str], notes: list[str]) -> None:
    """Raise ValueError if the first line seems to be a row; note a doubtful heading."""
    import polars as pl

    numbers = [name for name in heading if is_number(name.strip())]
    first = f"the first line of {path}"
    if len(numbers) == len(heading):
        raise ValueError(f"{first} holds numbers alone, {numbers[0]!r} and so on; {NO_HEADING}")
    same = [frame[column] == name for column, name in zip(frame.columns, heading, strict=True)]
    recurring = [name for name, s in zip(heading, same, strict=True) if s.any()]
    fractions = [name for name in numbers if not name.strip().lstrip("+-").isdecimal()]
    if numbers and (recurring or fractions):
        raise ValueError(
            f"{first} holds {(fractions or recurring)[0]!r} where a name should be; {NO_HEADING}"
        )
    again = pl.DataFrame([s.alias(str(i)) for i, s in enumerate(same)]).select(
        pl.all_horizontal(pl.all()).fill_null(False).arg_true()
    )
    if len(again) and len(heading) > 1:
        raise ValueError(
            f"row {again.item(0, 0) + 1} of {path} is its first line again; remove that row, or,"
            " if the first line holds data, put a line with the columns' names before it"
        )
    if len(recurring) == len(heading) > 1:
        raise ValueError(f"{first} holds {recurring[0]!r}, as other rows do; {NO_HEADING}")
    if numbers:
        notes.append(f"{first} is taken as the columns' names, though {numbers[0]!r} is a number")
