"""Lossless compression whose file length is the bound (docs/codec.md).

settings = Settings(tuple(run.grid(25).times.tolist()))
data = compress(run.model, x, settings)          # bytes; x of integers, (N, *shape)
decompress(data, run.model).x                    # the same, or a CodecError
"""

from nelbo.codec.api import Decoded, compress, decompress, describe
from nelbo.codec.errors import (
    CodecError,
    CorruptFileError,
    ModelMismatchError,
    NotReproducibleError,
)
from nelbo.codec.settings import Settings

__all__ = [
    "CodecError",
    "CorruptFileError",
    "Decoded",
    "ModelMismatchError",
    "NotReproducibleError",
    "Settings",
    "compress",
    "decompress",
    "describe",
]
