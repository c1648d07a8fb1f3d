"""Options and small functions shared by several commands."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nelbo._utils import text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.times import TimeGrid
    from nelbo.runs.run import Run

RunFolder = Annotated[Path, Parameter(help="A run folder.")]
Seed = Annotated[int, Parameter(help="Seed of everything random.")]
Device = Annotated[
    str,
    Parameter(help="Where to run the network: cpu, cuda, cuda:1; auto is cuda, if there is one."),
]
Spacing = Literal["best", "uniform"]
Splits = Annotated[
    str,
    Parameter(
        help="Assign names in DATA (sub-folders, files, arrays or a hub's splits) to splits:"
        " train=A,validation=B,test=C, where patterns such as b* are allowed; or none, to draw all"
        " splits at random. By default the words train, validation and test in names decide."
    ),
]
Labels = Annotated[list[str], Parameter(negative="")]


def grid_of(run: "Run", steps: int, spacing: Spacing) -> "TimeGrid":
    """Return `steps` times: the best ones for the run, or uniform ones."""
    from nelbo._utils.progress import tracker
    from nelbo.diffusion.times import TimeGrid

    if spacing == "uniform":
        return TimeGrid(run.model.even_times(steps))
    return run.grid(steps, tracker("best times"))


def examples_of(
    run: "Run", data: str | None, split: str | None, tell: bool, splits: str | None = None
) -> "tuple[Batch, str]":
    """Return examples of `data`, or of the run's own data, and a name for them.

    If `data` turn out to be the run's own data, their place is remembered.
    """
    if data is not None and run.meet(data) and tell:
        say(f"{data} are the run's own data; from now on its commands read them from there")
    return run.batch(data, split, splits, (lambda line: say(f"note: {line}")) if tell else str)


def place_of(device: str, tell: bool) -> "torch.device":
    """Return the device of a name, and say which one auto has chosen if it is not the CPU."""
    from nelbo.diffusion.model import find_device

    place = find_device(device)
    if tell and device == "auto" and place.type != "cpu":
        say(f"running on {place}; --device cpu avoids it")
    return place


def say_of_formulas(out: Path, content: bytes) -> None:
    """Warn if a spreadsheet would execute cells of a table; the cells are not changed."""
    from nelbo.data.tabular.tables import SEPARATORS, formula_in

    if out.suffix.lower() in SEPARATORS and (cell := formula_in(content)) is not None:
        say(
            f"note: {out} has cells that a spreadsheet takes for formulas, such as {cell!r}; they"
            " are written as they are in the data: import the columns as text"
        )


def json_text(value: object) -> str:
    """Return JSON text; NaN raises ValueError, because JSON has no NaN."""
    return json.dumps(value, indent=2, allow_nan=False)


def say_notes(x: "Tensor") -> None:
    """Print the notes that arose while examples were read in blocks."""
    from nelbo.data.rows import Rows

    if isinstance(x, Rows):
        for note in x.notes():
            say(f"note: {note}")


def say(line: str) -> None:
    """Print a line for the reader on the error stream, so that standard output stays clean."""
    with suppress(OSError):  # the terminal is closed
        print(text.line(line), file=sys.stderr)
