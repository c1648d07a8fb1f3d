"""The folder of a run while it is trained: a new one, its lock, and its identity."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from os import PathLike
from pathlib import Path

from nelbo._utils import files, limits
from nelbo._utils.distributed import main_process_first
from nelbo.data.sources import Source
from nelbo.runs.config import LOCK, is_run


def new_folder(data: Source) -> Path:
    """Return a folder runs/NAME that does not exist yet, named after the data, and say so."""
    name = Path(data).name.partition(".")[0] if isinstance(data, str | PathLike) else "data"
    every = chain([Path("runs") / name], (Path("runs") / f"{name}-{i}" for i in count(2)))
    out = next(path for path in every if not path.exists())
    print(f"the run is in {out}", file=sys.stderr)
    return out


def check_new(out: Path) -> None:
    """Raise ValueError if a new run cannot be written to `out`."""
    if out.is_dir():
        others = [p for p in out.iterdir() if p.name != LOCK and not files.is_part(p)]
    if out.exists() and (not out.is_dir() or others):
        run = f"a run; continue it with --resume {out}, or"
        kind = run if is_run(out) else "not a run;"
        raise ValueError(f"{out} exists and is {kind} choose another --out")


@contextmanager
def alone_in(out: Path) -> Iterator[bool]:
    """Lock the run folder against other trainings; the lock ends with the process.

    Yield whether the folder was created here. Partial files of killed trainings are removed.

    Raises:
        OSError: the folder cannot be made.
        ValueError: another process trains the run, or the lock file is a link out of the run.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(limits.contained(out / LOCK, out), blocking=False)

    def acquire() -> bool:
        new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the run folder {out} cannot be made: {error.strerror}; choose another place"
            ) from None
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{out} is being trained by another process; wait for it, or stop it first"
            ) from None
        except (NotImplementedError, OSError):
            pass  # no locks or a read-only file system; writing will raise later
        files.tidy(out)
        return new

    made = main_process_first(acquire)
    try:
        yield made
    finally:
        lock.release()


def identity(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder; None if it does not exist."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
