"""What several commands share: types of options with their help, and small functions."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nelbo._utils import progress

if TYPE_CHECKING:
    from torch import Tensor

    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.times import TimeGrid
    from nelbo.runs.run import Run

RunFolder = Annotated[Path, Parameter(help="A run folder.")]
Seed = Annotated[int, Parameter(help="Everything random follows from it.")]
Device = Annotated[str, Parameter(help="Where to run the network.")]
Spacing = Literal["best", "uniform"]
Splits = Annotated[
    str,
    Parameter(
        help="Which names in DATA are of which split: train=A,validation=B,test=C, of sub-folders,"
        " files, arrays or a hub's splits, patterns such as b* too; or none, to draw all splits."
        " Left out, names that have the words tell."
    ),
]
Labels = Annotated[list[str], Parameter(negative="")]


def grid_of(run: "Run", steps: int, spacing: Spacing) -> "TimeGrid":
    """`steps` times: the best for the run, or uniform."""
    from nelbo._utils.progress import tracker
    from nelbo.diffusion.times import TimeGrid, even_times

    if spacing == "uniform":
        return TimeGrid(even_times(run.model.process.schedule, steps, steps))
    return run.grid(steps, tracker("grid"))


def examples_of(
    run: "Run", data: str | None, split: str | None, tell: bool, splits: str | None = None
) -> "tuple[Batch, str]":
    """Examples of `data`, or the run's own; data that are its own are known from then on."""
    if data is not None and run.meet(data) and tell:
        say(f"{data} are the run's own data; its commands read them there from now on")
    return run.batch(data, split, splits, say if tell else str)


def say_of_formulas(out: Path, content: bytes) -> None:
    """Say where a spreadsheet would run what a table holds; the cells stay what they are."""
    from nelbo.data.tabular.tables import SEPARATORS, formula_in

    if out.suffix.lower() in SEPARATORS and (cell := formula_in(content)) is not None:
        say(
            f"note: {out} has cells that a spreadsheet takes for formulas, such as {cell!r}; they"
            " are written as they are in the data: import the columns as text"
        )


def json_text(value: object) -> str:
    """JSON for people and programs; NaN is refused, for it is none."""
    return json.dumps(value, indent=2, allow_nan=False)


def say_notes(x: "Tensor") -> None:
    """Say what is to be known of examples that were read in blocks."""
    from nelbo.data.rows import Rows

    if isinstance(x, Rows):
        for note in x.notes():
            say(f"note: {note}")


def say(line: str) -> None:
    """What is for the reader, not for the next program: on the error stream."""
    with suppress(OSError):  # the terminal is closed
        print(progress.line(line), file=sys.stderr)
