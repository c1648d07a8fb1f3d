"""Event files of tensorboard, where it is installed: a copy of the metrics, never needed.

Tensorboard writes them in a thread of its own, of which a failure (a folder that is gone, a full
disk) would be a stack of its source on the error stream and, later, the end of the training. Here
it is one sentence, and the training goes on.
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
NAMES = ("train", "validation", "lr")  # of an event, those that are drawn

#: takes an event and its step
Add = Callable[[Mapping[str, object], int], None]


class Writer(Protocol):
    """What is asked of tensorboard's."""

    def add_scalar(self, name: str, value: object, step: int) -> None: ...

    def close(self) -> None: ...


@contextmanager
def written(run: Path, step: int, wanted: bool) -> Iterator[Add]:
    """Yields what writes an event of the run; earlier ones after `step` are dropped."""
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
    """Remove what was written, and nothing else."""
    folder = run / FOLDER
    if folder.is_symlink():
        return
    for path in folder.glob(FILES):
        path.unlink()
    with suppress(OSError):  # others are in it
        folder.rmdir()


@contextmanager
def _no_stack_of_its_thread() -> Iterator[None]:
    before = threading.excepthook

    def hook(about: threading.ExceptHookArgs) -> None:
        if not type(about.thread).__module__.startswith("tensorboard"):
            before(about)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
