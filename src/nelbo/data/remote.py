"""Data at a URL that fsspec can read (extra: remote): copied once, then read as files.

    s3://bucket/rows/            all files below
    gs://bucket/train-*.tar      those whose names match
    https://host/images.npz      one file

Training accesses its data in random order and hashes all of them at the start, so each machine
keeps a copy on its disk: in a folder of the user's cache whose name is a hash of the URL, the
names, the sizes and other attributes of the files in the store. When these change, another folder
is used with new copies. An interrupted copy continues where it stopped. The copies are then read
like any untrusted files. Of the store's own statements, a size limits what is written, and a name
cannot lead out of the folder.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from nelbo._utils import cache
from nelbo._utils.distributed import gather, world
from nelbo._utils.files import part_of, tidy
from nelbo._utils.progress import progress_bar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

URL = re.compile(r"[a-z][a-z0-9+.-]+(://|::)", re.I)
OFFLINE = "NELBO_OFFLINE"  # an environment variable
CHUNK = 2**22  # bytes copied at a time
AT_ONCE = 16  # files copied in parallel, if the store supports it
MIB = 2**20
#: characters that are not allowed in file names on every system
FORBIDDEN = re.compile(r'[\x00-\x1f\\:*?"<>|]')

Source = TypeVar("Source")


def is_url(source: object) -> bool:
    """Return whether a source is a URL."""
    return isinstance(source, str) and URL.match(source) is not None


def here(source: Source) -> Source | str:
    """Return the path where a source can be read: a local copy of a URL, or the source itself.

    All processes call this together; one on each machine copies.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        ValueError: it cannot be read, or the copy cannot be stored.
    """
    if not isinstance(source, str) or not is_url(source):
        return source
    if world()[1] == 1:
        return str(_copied(source))
    found = [_copied(source)] if os.environ.get("LOCAL_RANK", "0") == "0" else []
    gather(None)  # wait until the copy is there
    return str(found[0] if found else _copied(source))


class File(NamedTuple):
    """The path of a file in its store, its name below the URL, and its size in bytes."""

    path: str
    name: PurePosixPath
    size: int


@dataclass(frozen=True)
class Listed:
    """The present contents of a URL.

    Args:
        url: the URL, for messages.
        store: the file system that has it.
        files: its files.
        single: whether the URL is that of a single file.
        version: a name that identifies these contents.
    """

    url: str
    store: "AbstractFileSystem"
    files: list[File]
    single: bool
    version: str


def _copied(url: str) -> Path:
    """Return the path of the copy of a URL, a file or a folder, after copying what is missing."""
    found = _list(url)
    folder = cache.folder() / found.version
    missing = [file for file in found.files if not _is_there(folder / file.name, file.size)]
    needed = sum(file.size for file in missing)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{url} takes {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} are free in"
            f" {folder.parent}, where its copy goes; set {cache.CACHE} to a folder on a larger"
            " disk"
        )
    if missing:
        _copy_all(found, folder, missing, needed)
    return folder / found.files[0].name if found.single else folder


def _list(url: str) -> Listed:
    store, path = _open(url)
    with _asking(url):
        single, pattern = False, re.search(r"[*\[]", path)
        if pattern:
            below = path[: pattern.start()].rpartition("/")[0]
            about = store.glob(path, detail=True)
        elif single := store.isfile(path):
            below, about = path.rpartition("/")[0], {path: store.info(path)}
        else:
            below, about = path.rstrip("/"), store.find(path, detail=True)
        of_files = [
            (where, each if each.get("size") is not None else store.info(where))
            for where, each in sorted(about.items())
            if each["type"] == "file" and not where.endswith("/")
        ]
        if not of_files:
            raise FileNotFoundError
        files = [File(k, _name(k, below), _size(k, each)) for k, each in of_files]
    listing = repr((url, [(where, sorted(each.items())) for where, each in of_files]))
    stem = re.sub(r"[^A-Za-z0-9]+", "-", below.rpartition("/")[2]).strip("-")[:32] or "data"
    version = f"{stem}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}"
    return Listed(url, store, files, single, version)


def _open(url: str) -> tuple["AbstractFileSystem", str]:
    """Return the store of a URL and the path in it.

    Raises:
        ValueError: fsspec or its driver for the URL is missing, or the network is forbidden.
    """
    if os.environ.get(OFFLINE) == "1":
        raise ValueError(f"{url} is remote, and {OFFLINE}=1 forbids the network; unset it")
    if "::" in url:
        raise ValueError(f"{url} is a chain of URLs; give the one where the files are")
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(
            f"{url} is read through fsspec; try: pip install 'nelbo[remote]'"
        ) from None
    with _asking(url):
        store, path = url_to_fs(url)
    return store, str(path)


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Turn any exception of a store's driver into a one-sentence ValueError or
    FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file at {url}") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, ImportError):
            reason += "; nelbo[remote] has the drivers of s3, gs and http"
        raise ValueError(f"{url} cannot be read: {reason}") from error


def _name(path: str, below: str) -> PurePosixPath:
    """Return the name of a file below the URL, which must also be a valid name here."""
    name = path.removeprefix(below).removeprefix("/")
    if any(part in ("", ".", "..") or FORBIDDEN.search(part) for part in name.split("/")):
        raise ValueError(f"{name!r} cannot be the name of a file here; rename it there")
    return PurePosixPath(name)


def _size(path: str, about: dict) -> int:
    size = about.get("size")
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"the size of {path} is unknown; copy it to a disk, and give that path")
    return size


def _is_there(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


def _copy_all(found: Listed, folder: Path, files: list[File], total: int) -> None:
    """Copy files with a progress bar, several in parallel if the store supports it."""
    for place in {(folder / file.name).parent for file in files}:
        tidy(place)
    lock, stop, done = threading.Lock(), threading.Event(), 0
    with progress_bar(f"copy {found.url}", -(-total // MIB)) as update:

        def advance(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                update(done // MIB, "MiB")
            if stop.is_set():
                raise InterruptedError("another file could not be copied")

        at_once = AT_ONCE if found.store.async_impl else 1
        with ThreadPoolExecutor(at_once) as pool:
            try:
                list(pool.map(lambda file: _copy(found, folder, file, advance), files))
            except BaseException:  # Ctrl-C too
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def _copy(found: Listed, folder: Path, file: File, advance: Callable[[int], None]) -> None:
    """Copy one file, completely or not at all, and no more bytes than its store states."""
    place, left = folder / file.name, file.size
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = part_of(place)
    try:
        with os.fdopen(handle, "wb") as out:
            with _asking(found.url):
                stream = found.store.open(file.path, "rb")
            with stream:
                while left >= 0:
                    with _asking(found.url):
                        chunk = stream.read(min(CHUNK, left + 1))
                    if not chunk:
                        break
                    out.write(chunk)
                    left -= len(chunk)
                    advance(len(chunk))
        if left:
            kind = "more" if left < 0 else "fewer"
            raise ValueError(
                f"{found.url} cannot be read: {file.path} has {kind} bytes than its store states"
            )
        os.replace(temporary, place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
