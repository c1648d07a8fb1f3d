"""The command line. Each command imports what it needs, so `nelbo --help` is quick."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cyclopts import App, CycloptsError

import nelbo
from nelbo.cli.common import say
from nelbo.cli.compress import compress, decompress
from nelbo.cli.evaluate import evaluate
from nelbo.cli.inspect import inspect
from nelbo.cli.report import report
from nelbo.cli.sample import sample
from nelbo.cli.score import score
from nelbo.cli.train import train

#: characters of an error, at most
LONGEST = 2000

__all__ = ["app", "main"]

app = App(
    name="nelbo",
    help="Diffusion models you can measure in bits.",
    version=f"nelbo {nelbo.__version__}",
)
for command in (train, inspect, evaluate, sample, score, compress, decompress, report):
    app.command(command)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the user can mend (ValueError, OSError, too little memory) is one line and exit code 2,
    or the one that the error has; Ctrl-C is 130, a reader that left 141; anything else is a
    defect and keeps its traceback."""
    try:
        yield
    except CycloptsError as error:
        _fail(str(error).strip())
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
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail(f"out of memory: {error}; try a smaller --batch or --width of train, --n of sample")
    except OverflowError as error:
        _fail(f"a number is beyond what a computer counts: {error}; try a smaller one")


def _fail(message: str, code: int = 2) -> None:
    line = " ".join(message.split())
    if len(line) > LONGEST:  # it repeats a value of a file; what to do stands at its end
        line = f"{line[: LONGEST // 2]} .. {line[-LONGEST // 2 :]}"
    say(f"nelbo: {line}")
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` in place of the process's own."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a symbol shows a ?
    with _one_line_errors():
        app(arguments, exit_on_error=False, print_error=False)
