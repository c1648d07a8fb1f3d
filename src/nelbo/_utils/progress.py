"""Progress bars on standard error, so that standard output stays clean; printable text."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from nelbo._utils.distributed import world

#: wraps an iterable to show the progress of an iteration
Track = Callable[[Iterable[int]], Iterable[int]]


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show a bar with the remaining time, and at the end the elapsed time; 80 columns suffice.

    Args:
        what: description of the work.
        total: number of steps.
        done: number of steps at the start.

    Yields:
        A function update(done, note).
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from nelbo._utils.terminal import Terminal

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Terminal(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def interactive() -> bool:
    """Return whether the error stream is a terminal; that of a notebook only says that it is."""
    return sys.stderr.isatty() and "ipykernel" not in sys.modules


def tracker(what: str) -> Track:
    """Return a `Track` that shows a bar, on rank 0 only."""

    def track(items: Iterable[int]) -> Iterator[int]:
        listed = list(items)
        if world()[0]:
            yield from listed
            return
        with progress_bar(what, len(listed)) as update:
            for i, item in enumerate(listed):
                yield item
                update(i + 1, "")

    return track


def increments(stack: ExitStack, what: str, total: int) -> Callable[[int], None]:
    """Open a bar on a stack; return a function to be called with each further amount done."""
    update, so_far = stack.enter_context(progress_bar(what, total)), [0]

    def advance(done: int) -> None:
        so_far[0] += done
        update(so_far[0], "")

    return advance


def tracks(progress: bool | None) -> Callable[[str], Track]:
    """Return a function from a description of work to its bar, or to none."""
    show = interactive() if progress is None else progress
    return tracker if show else lambda what: iter
