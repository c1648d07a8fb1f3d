"""Options in messages, written as they are typed, --gamma-min; read in Python as gamma_min."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

#: a whole command or words about one, which stay as they are, or an option
OPTION = re.compile(
    r"(?:(?:nelbo|pip|torchrun) [\w-]+|on the command line)[^;`]*|(?<![\w-])--([a-z][a-z-]*)"
)
_typed = False  # whether the process was called by the command line


@contextmanager
def of_command_line() -> Iterator[None]:
    """Inside, options are shown as they are typed."""
    global _typed
    before, _typed = _typed, True
    try:
        yield
    finally:
        _typed = before


def shown(text: str) -> str:
    """Return a message with its options as its reader writes them.

    >>> shown("train with --gamma-min of -20; or: nelbo train --out RUN")
    'train with gamma_min of -20; or: nelbo train --out RUN'
    """
    if _typed:
        return text
    return OPTION.sub(lambda m: m[1].replace("-", "_") if m[1] else m[0], text)


@contextmanager
def in_errors() -> Iterator[None]:
    """Show the messages of errors raised inside by `shown`."""
    try:
        yield
    except (ValueError, OSError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (shown(error.args[0]),)
        raise
