"""The command line. Each command imports what it needs, so that `nelbo --help` is quick."""

import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from nelbo._utils.signals import ended_tidily
from nelbo._utils.spelling import of_command_line
from nelbo._version import __version__
from nelbo.cli.common import say
from nelbo.cli.compress import compress, decompress
from nelbo.cli.evaluate import evaluate
from nelbo.cli.explain import explain
from nelbo.cli.inspect import inspect
from nelbo.cli.mistakes import sentence
from nelbo.cli.options_file import options_from
from nelbo.cli.report import report
from nelbo.cli.sample import sample
from nelbo.cli.score import score
from nelbo.cli.train import train

TRACEBACK = "NELBO_TRACEBACK"  # an environment variable
FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

__all__ = ["app", "main"]

app = App(
    name="nelbo",
    help="Diffusion models you can measure in bits.",
    version=f"nelbo {__version__}",
    help_format="plaintext",  # one line each: markdown would take a quarter of the time
)
for command in (train, inspect, evaluate, sample, score, compress, decompress, report, explain):
    app.command(command, help_format="markdown")
COMMANDS = tuple(name for name in app if not name.startswith("-"))
app.register_install_completion_command(
    help="Install completion of commands and options in your shell: bash, zsh or fish."
)


@app.meta.default
def _launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
) -> None:
    """Run a command.

    Parameters
    ----------
    words
        The command and its arguments.
    config
        A .toml, .yaml or .json file with options, in a table for each command; by default
        nelbo.toml in this folder, if there is one.
    """
    try:
        app.config = options_from(config, COMMANDS)
        app(words, exit_on_error=False, print_error=False)
    finally:
        app.config = ()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn exceptions into one-line messages and exit codes.

    An error that the user can fix (ValueError, OSError, too little memory) exits with its own
    `exit_code` or 2, Ctrl-C with 130, and a closed output pipe with 141. Anything else is a bug,
    or a library that failed on the contents of a file: it exits with 1, and NELBO_TRACEBACK=1
    shows its traceback.
    """
    try:
        yield
    except CycloptsError as error:
        _fail(sentence(error, app))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(place + (error.strerror or str(error)))
    except ValueError as error:
        _fail(str(error), getattr(error, "exit_code", 2))
    except ImportError as error:
        if error.name is not None:  # one that nobody foresaw, so it names no package to install
            _fail_of_defect(error)
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            _fail_of_defect(error)
        _fail(
            f"out of memory: {error}; try a smaller --batch or --width of train, or a smaller"
            " --n of sample"
        )
    except OverflowError as error:
        _fail(f"a number is too large: {error}; try a smaller one")
    except BaseException as error:
        # polars raises panics, which are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _fail_of_defect(error)


def _fail_of_defect(error: BaseException) -> None:
    """Report an unforeseen error in one line, with the place where it was raised."""
    if os.environ.get(TRACEBACK) == "1":
        raise error
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = str(error).splitlines()[0] if str(error) else "no message"
    _fail(
        f"{type(error).__name__} in {Path(where.filename).stem}, line {where.lineno}: {reason};"
        " this is a bug, or a library failed on the contents of a file: please report it to the"
        f" authors with the output of {TRACEBACK}=1",
        1,
    )


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings as one-line notes, without source lines; hide those meant for programmers."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if not issubclass(category, FOR_PROGRAMMERS):
            say(f"note: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _fail(message: str, code: int = 2) -> None:
    say(f"nelbo: {' '.join(message.split())}")
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line with `arguments`, by default those of the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal shows ? for a missing symbol
    with of_command_line(), ended_tidily(), _one_line_errors(), _one_line_warnings():
        app.meta(arguments, exit_on_error=False, print_error=False)
