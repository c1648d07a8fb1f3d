"""Ctrl-C at a moment of our choosing; SIGTERM and SIGHUP, which end a process without a word."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

#: what ends a process: the latter where its terminal is closed
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came, and the run is saved."""


@contextmanager
def interruptible(twice: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C, SIGTERM or SIGHUP came.

    `twice` lets a second one act at once; under torchrun it may be the first one passed on.
    """
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if came and twice:
            raise KeyboardInterrupt
        came.append(number)

    with _handled(handler, signal.SIGINT, *ENDINGS):
        yield lambda: bool(came)


@contextmanager
def ended_tidily() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is inside as an error does, so that nothing half-written stays.

    Not one of several processes, which may wait for the others where no signal is heard.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one acts at once
        sys.exit(128 + number)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    with _handled(handler, *ENDINGS):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    """Inside, these signals go to the handler, but for those that the process ignores (nohup)."""
    before = {}
    with suppress(ValueError):  # not the main thread: signals arrive elsewhere
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
