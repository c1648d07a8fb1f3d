"""Ctrl-C at a moment of our choosing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came, and the run is saved."""


@contextmanager
def interruptible(twice: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came.

    `twice` lets a second one act at once; under torchrun it may be the first one passed on.
    """
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if came and twice:
            raise KeyboardInterrupt
        came.append(number)

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals arrive elsewhere
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
