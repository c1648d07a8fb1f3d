"""The user's own cache: what commands of this user settled, kept where no stranger's file is.

    copies of what is at URLs                      `data.remote`
    which times to draw for a run, by pilots       `pilots`
    where data are that this user trained on       `checkpoint`

An entry is a JSON file of its own, named by the hash of its key, so that processes which write at
the same time do not meet. One that is missing, damaged, of another key or of another user is none;
all of it may be removed at any time, and is then made again. Where nothing can be written, an
entry lasts as long as the process.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from nelbo._utils import limits
from nelbo._utils.files import tidy, write

CACHE = "NELBO_CACHE"  # names a variable of the environment

_unwritten: dict[tuple[str, str], object] = {}


def folder() -> Path:
    """The folder of the cache: NELBO_CACHE, or nelbo in XDG_CACHE_HOME or ~/.cache.

    Raises:
        OSError: the user has no home.
    """
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nelbo"
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return Path(os.environ.get(CACHE) or default).absolute()


def get(kind: str, key: str) -> object:
    """The value of a key; None where there is none."""
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
    """Keep a value.

    Raises:
        OSError: it cannot be written, and lasts as long as the process.
        ValueError: a number is not finite.
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
    """Why nothing could be kept, and what to do."""
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{where}; {CACHE} names another folder for it"


def _path(kind: str, key: str) -> Path:
    return folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _is_mine(path: Path) -> bool:
    """Whether a file was written by this user, also where the folder is shared with others."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
