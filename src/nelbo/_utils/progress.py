"""Progress on the terminal's error stream, so that standard output stays clean."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unicodedata import category

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nelbo._utils.distributed import world

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


#: characters that are shown: of a value within a sentence, of a path or word, and of a sentence
VALUE, WORD, LINE = 200, 400, 4000


def printable(text: str) -> str:
    """The text with a mark in place of control, format and unassigned characters."""
    return re.sub(r"[^ -~\n\t]", lambda c: "\ufffd" if category(c[0])[0] == "C" else c[0], text)


def shortened(text: str, most: int = VALUE) -> str:
    """The text with a mark in place of its middle where it is longer than `most`.

    >>> shortened("0123456789", 5)
    '012…9'
    """
    if len(text) <= most:
        return text
    end = (most - 1) // 3
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def line(text: str) -> str:
    """The text for a reader: printable, its words and all of it of a length that can be read."""
    text = shortened(text, 100 * LINE)  # before each word is looked at
    return printable(shortened(re.sub(r"\S+", lambda w: shortened(w[0], WORD), text), LINE))


class Terminal(Console):
    """A console that obeys no codes in what it is given, and shows no endless words."""

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(line(text), **options)  # type: ignore[arg-type]
