"""Progress on the terminal's error stream, so that standard output stays clean."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from nelbo._processes import world
from nelbo._terminal import Terminal

#: wraps what is iterated over, to show how far it is
Track = Callable[[Iterable[int]], Iterable[int]]


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left, or in the end the time it took; yields update(done, note).

    On 80 columns there is room for it all.
    """
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


def tracker(what: str) -> Track:
    """A `track` argument that shows a bar while it iterates, on the first of the processes."""

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
