"""Values that tests read back from files, and parts of files that they write."""

import struct
import zlib

import numpy as np


def arrays_in(path):
    """All arrays of an .npz file, which is closed again."""
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(width, height, bits, colour, rows, interlaced=0, before=b""):
    """A PNG of these unfiltered bytes, whether or not they are all its rows."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    parts = (chunk(b"IHDR", head), before, chunk(b"IDAT", zlib.compress(rows, 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")
