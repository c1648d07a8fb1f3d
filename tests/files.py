"""What tests read back from files, and parts of files that they write."""

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
