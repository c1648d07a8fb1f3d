"""Event files for tensorboard, if it is installed: an optional copy of the metrics.

Tensorboard writes in a thread of its own. If that thread fails (the folder is gone, the disk is
full), it would print a stack trace and later end the training. Here a failure becomes a one-line
warning, and the training goes on.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from nelbo._utils import limits

FOLDER = "tensorboard"
FILES = "events.out.tfevents.*"
NAMES = ("train", "validation", "lr")  # the values of an event that are plotted

#: adds an event at its step
Add = Callable[[Mapping[str, object], int], None]


class Writer(Protocol):
    """The part of tensorboard's SummaryWriter that is used here."""

    def add_scalar(self, name: str, value: object, step: int) -> None:
        """Add one value at a step."""

    def close(self) -> None:
        """Flush and close the file."""


@contextmanager
def written(run: Path, step: int, wanted: bool) -> Iterator[Add]:
    """Yield a function that writes an event of the run; drop earlier events after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda event, step: None
        return
    folder = limits.contained(run / FOLDER, run)
    with _no_stack_of_its_thread():
        writer: Writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        failed: list[Exception] = []

        def add(event: Mapping[str, object], step: int) -> None:
            if failed:
                return
            try:
                for name in NAMES:
                    writer.add_scalar(name, event[name], step)
            except Exception as error:
                failed.append(error)
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                warnings.warn(
                    f"events for tensorboard are no longer written: {reason}", stacklevel=2
                )

        try:
            yield add
        finally:
            with suppress(Exception):
                writer.close()


def remove(run: Path) -> None:
    """Remove the event files of the run and, if then empty, their folder."""
    folder = run / FOLDER
    if folder.is_symlink():
        return
    for path in folder.glob(FILES):
        path.unlink()
    with suppress(OSError):  # it contains other files
        folder.rmdir()


@contextmanager
def _no_stack_of_its_thread() -> Iterator[None]:
    """Keep exceptions in tensorboard's threads from printing a stack trace."""
    before = threading.excepthook

    def hook(about: threading.ExceptHookArgs) -> None:
        if not type(about.thread).__module__.startswith("tensorboard"):
            before(about)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
