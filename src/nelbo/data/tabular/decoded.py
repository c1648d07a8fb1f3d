"""Check the decoded size of a Parquet or Arrow file before this process decodes it.

The sizes stated in such a file may be false, few bytes can stand for any number of cells, and
polars ends the whole process if memory cannot hold what a page claims. So a small file is first
decoded by another process with limited memory.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from nelbo._utils import limits

DECODER = Path(__file__).with_name("_decode.py")
#: copies in memory: of cells (in the frame and as examples), and of texts (as Python strings)
CELLS, TEXTS = 3, 8
#: bytes of a process before it decodes anything
BASE = 2**29
#: seconds that the decoding of a file of at most `limits.UNPACKED` bytes may take
SECONDS = 300


def check(files: Sequence[Path]) -> None:
    """Raise ValueError if a table cannot be decoded within its limits.

    Damage that polars reports is left to the reader. A file that is large when packed cannot be a
    decompression bomb, and is not decoded twice.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file unpacks to far more than real data do, exceeds memory, or crashes
            polars.
    """
    if not limits.trusted():
        states = [(file, file.stat()) for file in files]
        small = ((f, s.st_size, s.st_mtime_ns, s.st_ino) for f, s in states)
        _check(tuple(each for each in small if each[1] <= limits.UNPACKED))


@lru_cache(maxsize=64)
def _check(files: Sequence[tuple[Path, int, int, int]]) -> None:
    """Do the work of `check`; unchanged files are decoded once."""
    free = limits.free_memory()
    bounds = [
        BASE + size + CELLS * max(limits.UNPACKED, limits.INFLATION * size)
        for _, size, *_ in files
    ]
    asked = "".join(
        f"{int(min(bound, free))}\0{file}\0"
        for bound, (file, *_) in zip(bounds, files, strict=True)
    )
    sizes, why = _decoded(asked.encode(errors="surrogateescape"))
    for (texts, size), (file, packed, *_) in zip(sizes, files, strict=False):
        times = CELLS + (TEXTS - CELLS) * texts / max(1, size)
        limits.check_unpacked(size, packed, str(file), times)
    if why and len(sizes) < len(files):
        file, packed, *_ = files[len(sizes)]
        raise ValueError(
            f"{file}, {packed} bytes, cannot be read as a table: {why}; write it again, or set"
            f" {limits.TRUST}=1 if that is right"
        )


def _decoded(asked: bytes) -> tuple[list[tuple[int, int]], str]:
    """Return the sizes of the decoded files, and the reason if the next one failed, else "".

    The reason is also "" if no other process can be started, as in some sandboxes.
    """
    command = [sys.executable, "-P", str(DECODER)]
    environment = os.environ | {"POLARS_MAX_THREADS": "2", "RUST_BACKTRACE": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        return _pairs(error.stdout or b""), f"decoding it takes more than {SECONDS} s"
    except OSError:
        return [], ""
    if b"allocat" in done.stderr or b"MemoryError" in done.stderr:
        return _pairs(done.stdout), "it would decode to more than its size or the memory allows"
    ended = done.returncode < 0 or done.returncode > 128  # ended by a signal
    return _pairs(done.stdout), "decoding it makes polars crash" if ended else ""


def _pairs(lines: bytes) -> list[tuple[int, int]]:
    words = [int(word) for word in lines.split()]
    return list(zip(words[::2], words[1::2], strict=True))
