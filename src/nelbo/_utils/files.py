"""Files that are either complete or absent.

Every file is written under a temporary name, synced and renamed. Until then the process holds a
lock on it, which ends with the process, so that files left by killed processes can be recognised
and removed (`tidy`). Values that can be recomputed are kept in a JSON object (`kept`), which
counts as empty where it cannot be read.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nelbo._utils import limits

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]

PART = ".nelbo-part"  # suffix of files and folders that are not complete yet
#: pattern of the names that `part_of` gives
PARTS = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(PART)}", re.DOTALL)


def write(path: Path, content: bytes, before: Path | None = None) -> None:
    """Write the whole file or nothing: temporary name, fsync, rename.

    Args:
        path: the file.
        content: all of it.
        before: a name under which to keep the file that was at `path`; it is lost where left out.

    Raises:
        OSError: if it cannot be written; the error names `path`.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = part_of(path)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            if fcntl is None:
                file.close()
            if before is not None and path.exists():
                os.replace(path, before)
            os.replace(temporary, path)
        _sync_names(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def part_of(path: Path) -> tuple[int, str]:
    """Create a temporary file beside `path`; return its handle, locked until closed, and name."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=PART)
        _hold(handle, wait=True)
        if os.path.exists(name):  # no other process tidied up in between
            return handle, name
        os.close(handle)


@contextlib.contextmanager
def folder_part_of(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside `path`, locked inside and removed with its files after."""
    name = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=PART)
    handle = None if fcntl is None else os.open(name, os.O_RDONLY)
    try:
        if handle is not None:
            _hold(handle, wait=True)
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def is_part(path: Path) -> bool:
    """Return whether a path has the name of a file or folder that is not complete yet."""
    return PARTS.fullmatch(path.name) is not None


def tidy(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder, which no process locks."""
    with contextlib.suppress(OSError):
        for path in filter(is_part, list(folder.iterdir())):
            with contextlib.suppress(OSError):
                _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _hold(handle, wait=False):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    finally:
        os.close(handle)


def _hold(handle: int, wait: bool) -> bool:
    """Lock an open file or folder; return whether this succeeded."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, or a file system without locks
        return False
    return True


def _sync_names(folder: Path) -> None:
    """Sync a folder to the disk, without which a renaming may not last."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def kept(path: Path) -> dict[str, object]:
    """Return the JSON object in a file of a run.

    It is empty where the file is missing, damaged or a link out of its folder.
    """
    try:
        document = limits.read_json(limits.contained(path, path.parent))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def keep(path: Path, key: str, value: object) -> None:
    """Add a key to the object that is `kept` in a file, preserving all other keys.

    Raises:
        OSError: if it cannot be written, as in a folder that is read-only.
        ValueError: if a number is not finite.
    """
    document = kept(path) | {key: value}
    write(path, (json.dumps(document, allow_nan=False) + "\n").encode())


def check_writable(path: Path) -> None:
    """Check, before the work, that `write` can create the file; remove leftovers beside it.

    Raises:
        OSError: if it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    tidy(path.absolute().parent)
