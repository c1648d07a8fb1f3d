"""How large a Parquet or Arrow file is when it is decoded, known before this process decodes it.

The sizes in such a file need not be true, few bytes of it can stand for any number of cells, and
polars ends its whole process where memory does not hold what a page claims. So a small file is
decoded first by another process, whose memory is limited.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from nelbo._utils import limits as _limits

DECODER = Path(__file__).with_name("_decode.py")
#: times that cells are in memory, as they are and as examples, and texts, which become Python's
CELLS, TEXTS = 3, 8
#: bytes of a process that decodes nothing yet, and of what is packed
BASE = 2**29
#: seconds that the decoding of a file of at most `_limits.UNPACKED` bytes may take
SECONDS = 300


def check(files: Sequence[Path]) -> None:
    """Raise ValueError where one of some tables cannot be decoded within its limits.

    Damage that polars tells is left to the reader. A file that is large when packed is no bomb:
    it is not decoded twice.

    Raises:
        OSError: a file cannot be read.
        ValueError: one would be unpacked to far more than any data are, is more than memory holds,
            or ends polars.
    """
    if not _limits.trusted():
        states = [(file, file.stat()) for file in files]
        small = ((f, s.st_size, s.st_mtime_ns, s.st_ino) for f, s in states)
        _check(tuple(each for each in small if each[1] <= _limits.UNPACKED))


@lru_cache(maxsize=64)
def _check(files: Sequence[tuple[Path, int, int, int]]) -> None:
    """As `check`; files that did not change are decoded once."""
    free = _limits.free_memory()
    limits = [
        BASE + size + CELLS * max(_limits.UNPACKED, _limits.INFLATION * size)
        for _, size, *_ in files
    ]
    asked = "".join(
        f"{int(min(limit, free))}\0{file}\0"
        for limit, (file, *_) in zip(limits, files, strict=True)
    )
    sizes, why = _decoded(asked.encode(errors="surrogateescape"))
    for (texts, size), (file, packed, *_) in zip(sizes, files, strict=False):
        times = CELLS + (TEXTS - CELLS) * texts / max(1, size)
        _limits.check_unpacked(size, packed, str(file), times)
    if why and len(sizes) < len(files):
        file, packed, *_ = files[len(sizes)]
        raise ValueError(
            f"{file} cannot be read as a table: of its {packed} bytes, {why}; write it again, or"
            f" set {_limits.TRUST}=1 if that is right"
        )


def _decoded(asked: bytes) -> tuple[list[tuple[int, int]], str]:
    """The sizes of the files that were decoded, and why of the next there is none; "" where no
    process can be had for it, as in some sandboxes."""
    command = [sys.executable, "-P", str(DECODER)]
    environment = os.environ | {"POLARS_MAX_THREADS": "2", "RUST_BACKTRACE": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        return _pairs(error.stdout or b""), f"nothing is made within {SECONDS} s"
    except OSError:
        return [], ""
    if b"allocat" in done.stderr or b"MemoryError" in done.stderr:
        return _pairs(done.stdout), "more would be made than its size or memory accounts for"
    ended = done.returncode < 0 or done.returncode > 128  # by a signal
    return _pairs(done.stdout), "nothing can be made: it ends polars" if ended else ""


def _pairs(lines: bytes) -> list[tuple[int, int]]:
    words = [int(word) for word in lines.split()]
    return list(zip(words[::2], words[1::2], strict=True))
