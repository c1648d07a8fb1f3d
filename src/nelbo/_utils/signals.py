"""Handling of Ctrl-C at a chosen moment, and of SIGTERM and SIGHUP, which would end silently."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

#: signals that end a process; SIGHUP comes where its terminal is closed
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C, when the run is saved."""


@contextmanager
def interruptible(twice: bool) -> Iterator[Callable[[], bool]]:
    """Inside, record Ctrl-C, SIGTERM and SIGHUP; yield a function that returns whether one came.

    Args:
        twice: raise KeyboardInterrupt at the second signal. Under torchrun, which passes signals
            on, the second may be the first again.
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
    """Inside, let SIGTERM and SIGHUP raise SystemExit, so that temporary files are removed.

    Several processes are exempt, as one may wait for the others where no signal is handled.
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
    """Inside, handle these signals, except those that the process ignores (nohup)."""
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
