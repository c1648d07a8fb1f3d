"""Sizes and times of other lossless codecs on the same examples.

All images are written as one sheet, about square, which suits these codecs better than one file
each; other data are tried in two memory layouts, and the smaller file counts.
"""

import bz2
import io
import lzma
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

SLOW = 2**19  # pixels beyond which the slowest settings take too long


@dataclass(frozen=True)
class Rival:
    """A codec and its result on the examples.

    Args:
        name: with its settings.
        size: bytes.
        seconds: for coding and for decoding.
    """

    name: str
    size: int
    seconds: tuple[float, float]


def rivals(x: np.ndarray) -> list[Rival]:
    """Return the results of the installed codecs on examples (N, ...) of uint8.

    Images are (N, C, H, W).

    Raises:
        ValueError: a codec does not restore the data.
    """
    raw = np.ascontiguousarray(x, np.uint8)
    by_place = np.ascontiguousarray(raw.reshape(len(raw), -1).T)
    layouts = raw.tobytes(), by_place.tobytes()
    xz = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    found = [
        _best("xz -9e", layouts, lambda b: lzma.compress(b, filters=xz), lzma.decompress),
        _best("bzip2", layouts, bz2.compress, bz2.decompress),
    ]
    try:
        import zstandard
    except ImportError:
        pass
    else:
        pack, unpack = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
        found.append(_best("zstd -19", layouts, pack.compress, unpack.decompress))
    if x.ndim == 4 and x.shape[1] in (1, 3):
        found += of_images([np.ascontiguousarray(sheet(raw))])
    return found


def sheet(x: np.ndarray) -> np.ndarray:
    """Arrange images (N, C, H, W) side by side in rows as one image (H', W'[, 3])."""
    n, c, h, w = x.shape
    columns = math.ceil(math.sqrt(n * h / w))
    rows = -(-n // columns)
    padded = np.concatenate([x, np.zeros((rows * columns - n, c, h, w), x.dtype)])
    whole = padded.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2)
    return whole.reshape(rows * h, columns * w, c)[..., 0 if c == 1 else slice(None)]


def of_images(images: list[np.ndarray]) -> list[Rival]:
    """Return the results of the installed image codecs on images (H, W) or (H, W, 3) of uint8.

    Each image is a file of its own; sizes and times are summed.

    Raises:
        ValueError: a codec does not restore the images.
    """
    effort = 10 if sum(pixels.size for pixels in images) <= SLOW else 7
    forms: list[tuple[str, str, dict[str, object]]] = [("PNG", "PNG", {"optimize": True})]
    if features.check("webp"):
        best: dict[str, object] = {"lossless": True, "quality": 100, "method": 6, "exact": True}
        forms.append(("WebP", "WEBP", best))
    try:
        import pillow_jxl  # noqa: F401
    except ImportError:
        pass
    else:
        forms.append((f"JPEG-XL effort {effort}", "JXL", {"lossless": True, "effort": effort}))
    found = []
    for name, kind, options in forms:
        each = [_picture(name, pixels, kind, options) for pixels in images]
        coding, decoding = (sum(one.seconds[i] for one in each) for i in (0, 1))
        found.append(Rival(name, sum(one.size for one in each), (coding, decoding)))
    return found


def _picture(name: str, pixels: np.ndarray, kind: str, options: dict[str, object]) -> Rival:
    def pack(data: bytes) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.frombuffer(data, np.uint8).reshape(pixels.shape)).save(
            file, kind, **options
        )
        return file.getvalue()

    def unpack(data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            mode = "L" if pixels.ndim == 2 else "RGB"
            return np.asarray(image.convert(mode)).tobytes()

    return _best(name, (pixels.tobytes(),), pack, unpack)


def _best(
    name: str,
    layouts: tuple[bytes, ...],
    pack: Callable[[bytes], bytes],
    unpack: Callable[[bytes], bytes],
) -> Rival:
    """Return the smallest result among the layouts, with the seconds of that layout."""
    tries = []
    for data in layouts:
        start = time.perf_counter()
        packed = pack(data)
        middle = time.perf_counter()
        if unpack(packed) != data:
            raise ValueError(f"{name} does not restore the data")
        tries.append((len(packed), middle - start, time.perf_counter() - middle))
    size, coding, decoding = min(tries)
    return Rival(name, size, (coding, decoding))
