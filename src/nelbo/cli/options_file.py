"""Options from a file: `nelbo.toml` in the working folder, or `--config FILE`.

    [train]
    steps = 4000
    batch = 256

A table holds the options of the command of its name. Options on the command line take precedence.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Json, Toml, Yaml

from nelbo._utils.validation import validated
from nelbo.cli.common import say

DEFAULT = Path("nelbo.toml")
KINDS: dict[str, Any] = {".toml": Toml, ".yaml": Yaml, ".yml": Yaml, ".json": Json}

Fill = Callable[[App, tuple[str, ...], ArgumentCollection], None]


def options_from(path: Path | None, commands: Collection[str]) -> Fill:
    """Return a function by which cyclopts fills the options of a command that were not given.

    Args:
        path: the file; by default `nelbo.toml`, if there is one, which is not used for --resume.
        commands: names of the tables that the file may have.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: it cannot be read, or has another table.
    """
    place = DEFAULT if path is None else path
    if place.suffix.lower() not in KINDS:
        raise ValueError(f"--config reads a .toml, .yaml or .json file; got {place}")
    source = KINDS[place.suffix.lower()](place, must_exist=path is not None)
    try:
        document: Any = source.config
    except ModuleNotFoundError:
        raise ValueError(f"{place} is read by PyYAML; try: pip install pyyaml") from None
    except CycloptsError as error:
        raise ValueError(f"{place} cannot be read: {error}") from None
    known = ", ".join(f"[{name}]" for name in commands)
    for name in validated(dict[str, dict[str, object]], document, str(place)) if document else ():
        if name not in commands:
            raise ValueError(f"{place} has the table [{name}]; known are {known}")

    def fill(app: App, names: tuple[str, ...], arguments: ArgumentCollection) -> None:
        resumed = any(each.name == "--resume" and each.tokens for each in arguments)
        if not names or (path is None and resumed):
            return
        source(app, names, arguments)
        used = [a.name for a in arguments if any(t.source == source.source for t in a.tokens)]
        if used and os.environ.get("RANK", "0") == "0":
            say(f"options from {place}: {', '.join(used)}")

    return fill
