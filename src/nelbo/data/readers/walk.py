"""Find the files below a folder, with notes on those that are left out."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nelbo._utils import limits


class Walked(NamedTuple):
    """Result of `walk`.

    Args:
        files: files of the types looked for, by name.
        others: number of files of each other type.
        links: how each link to a folder was treated, by its name.
    """

    files: list[Path]
    others: Counter[str]
    links: dict[str, str]

    def notes(self) -> list[str]:
        """Return notes on links that were followed and files that are left out."""
        notes = [f"{name} is a link {what}" for name, what in self.links.items()]
        if self.others:
            each = ", ".join(f"{n} {kind}" for kind, n in self.others.most_common())
            notes.append(f"files of other types left out: {each}")
        return notes


def walk(folder: Path, suffixes: Sequence[str], what: str) -> Walked:
    """Find the files below a folder whose names end in one of the suffixes; skip hidden ones.

    Links to folders are followed, each folder once.

    Args:
        folder: where to look.
        suffixes: in lower case.
        what: what is looked for, for messages.

    Raises:
        ValueError: there are far more other files.
    """
    files: list[Path] = []
    others: Counter[str] = Counter()
    links: dict[str, str] = {}
    seen = 0
    for place, below, names in _folders(folder, links):
        seen += len(below) + len(names)
        # Hidden files include macOS's ._name.png, which is not an image.
        for name in names:
            if name.startswith("."):
                continue
            file = Path(place, name)
            if not name.lower().endswith(tuple(suffixes)):
                others[file.suffix.lower() or name] += 1
            elif file.is_file():
                files.append(file)
            else:
                others["that are not files"] += 1
        limits.check_search(folder, len(files), seen, what)
    return Walked(sorted(files, key=Path.as_posix), others, links)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder except hidden ones."""
    for place, _, names in _folders(folder, {}) if folder.is_dir() else ():
        for name in names:
            if not name.startswith(".") and Path(place, name).is_file():
                yield Path(place, name)


def _folders(folder: Path, links: dict[str, str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like os.walk, following links, but visit each folder once."""
    known: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        top = waiting.pop()
        for place, below, names in os.walk(top, onerror=_refuse):
            status = os.stat(place)
            key = status.st_dev, status.st_ino
            if key in known:
                below.clear()
            if top != folder and Path(place) == top:
                how = (
                    "left out, because its target is read already" if key in known else "followed"
                )
                links[top.relative_to(folder).as_posix()] = f"to {top.resolve()}: {how}"
            if key in known:
                continue
            known.add(key)
            below[:] = sorted(name for name in below if not name.startswith("."))
            waiting += [path for name in below if (path := Path(place, name)).is_symlink()]
            yield place, below, names


def _refuse(error: OSError) -> None:
    """Raise the error for a folder that cannot be listed, instead of skipping it."""
    raise error
