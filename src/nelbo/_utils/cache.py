"""The user's cache: results of earlier commands, in a folder without untrusted files.

    copies of files at URLs                        `data.remote`
    pilots, which allocate draws to times           `runs.pilot_cache`
    paths of the data that this user trained on    `runs.config`

An entry is a JSON file, named by the hash of its key, so that processes that write at the same
time do not collide. An entry that is damaged, of another key or of another user counts as missing.
The cache may be removed at any time, and is then rebuilt. Where it cannot be written, an entry
lasts as long as the process.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from nelbo._utils import limits
from nelbo._utils.files import tidy, write

CACHE = "NELBO_CACHE"  # environment variable

_unwritten: dict[tuple[str, str], object] = {}


def folder() -> Path:
    """Return the folder of the cache: NELBO_CACHE, or nelbo in XDG_CACHE_HOME or ~/.cache.

    Raises:
        OSError: if the user has no home folder.
    """
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nelbo"
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return Path(os.environ.get(CACHE) or default).absolute()


def get(kind: str, key: str) -> object:
    """Return the value of a key, None where there is none."""
    if (kind, key) in _unwritten:
        return _unwritten[kind, key]
    with contextlib.suppress(OSError, ValueError):
        path = _path(kind, key)
        if _is_mine(path):
            document = limits.read_json(path)
            if isinstance(document, dict) and document.get("key") == key:
                return document.get("value")
    return None


def put(kind: str, key: str, value: object) -> None:
    """Store a value.

    Raises:
        OSError: if it cannot be written; then it lasts as long as the process.
        ValueError: if a number is not finite.
    """
    content = (json.dumps({"key": key, "value": value}, allow_nan=False) + "\n").encode()
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        tidy(_path(kind, key).parent)
        write(_path(kind, key), content)
    except OSError:
        _unwritten[kind, key] = value
        raise
    _unwritten.pop((kind, key), None)


def reason(error: OSError) -> str:
    """Return a sentence on why nothing could be stored, and what to do about it."""
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{where}; set {CACHE} to use another folder"


def _path(kind: str, key: str) -> Path:
    return folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _is_mine(path: Path) -> bool:
    """Return whether this user owns a file, as the folder may be shared with others."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
