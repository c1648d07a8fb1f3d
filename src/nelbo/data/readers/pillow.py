"""Decode images by Pillow, after checking that their bytes can hold the pixels they claim.

Any error of Pillow on a damaged image, even in its properties, becomes one sentence.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from nelbo._utils import limits

if TYPE_CHECKING:
    from PIL import Image

Result = TypeVar("Result")

PNG = b"\x89PNG\r\n\x1a\n"
#: suffixes of the files that are read, and Pillow's names of these formats
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
ORIENTATION = 0x0112  # the tag of EXIF
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
#: pixels that any format may claim, and beyond that pixels per byte (a JPEG holds up to 512)
FEW, HELD = 2**24, 1024
#: bytes of memory per pixel of 8 and 16 bits while it is decoded, converted and copied
TAKEN = {8: 20, 16: 40}
#: samples per pixel by the colour type of a PNG
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: first column and row, and their strides, in the passes of an interlaced PNG
PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


def opened(
    content: bytes,
    name: Callable[[], str],
    use: "Callable[[Image.Image], Result]",
    formats: tuple[str, ...] = FORMATS,
    whole: bool = False,
) -> Result:
    """Open an image and return `use` of it.

    Args:
        content: the encoded image.
        name: returns its name for messages.
        use: a function that only calls Pillow, because any of its errors counts as damage.
        formats: Pillow's names of allowed formats.
        whole: make sure that no pixel is missing, which Pillow may fill in silently.

    Raises:
        ValueError: it is damaged, or claims more pixels than its bytes, memory or Pillow allow.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as image:
                if whole and content.startswith(PNG):
                    _check_png(content)
                pixels = image.width * image.height
                if image.format != "PNG" and pixels > max(FEW, HELD * len(content)):
                    raise ValueError(_claim(image.width, image.height, len(content)))
                limits.check_memory(TAKEN[bits_of(content)] * pixels, "it")
                return use(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name()} claims more than {Image.MAX_IMAGE_PIXELS} pixels; remove it or scale it"
            " down"
        ) from error
    except Exception as error:  # damage shows as OSError, SyntaxError, EOFError, struct.error, ..
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message names a Python object
            reason = "it is of an unknown type"
        kind = f"a {formats[0]} image" if len(formats) == 1 else "an image"
        raise ValueError(
            f"{name()} cannot be read as {kind}: {reason}; remove it or save it again"
        ) from error


def orientation(image: "Image.Image", content: bytes) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 leaves it as it is."""
    if image.format == "PNG" and not any(word in content for word in (b"eXIf", b"exif", b"xmp")):
        return 1  # asking Pillow would decode the whole image
    found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def upright(image: "Image.Image", content: bytes) -> "Image.Image":
    """Return an image rotated according to EXIF."""
    from PIL import ImageOps

    return image if orientation(image, content) == 1 else ImageOps.exif_transpose(image)


def bits_of(content: bytes) -> int:
    """Return 8 or 16 bits per channel, from the header, as Pillow silently narrows 16-bit
    colour."""
    return 16 if content.startswith(PNG) and content[24:25] == b"\x10" else 8


def _claim(width: int, height: int, size: int) -> str:
    return f"it claims {width}x{height} pixels, which {size} bytes cannot hold"


def _check_png(content: bytes) -> None:
    """Raise ValueError unless the packed bytes of a PNG contain all its rows."""
    chunks = list(_chunks(content))
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[0][1][:13])
    if colour == 3 and not any(kind == b"PLTE" for kind, _ in chunks):
        raise ValueError("it has no palette")
    needed = 0
    for left, top, across, down in PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + -(-columns * bits * SAMPLES[colour] // 8))
    packed = [data for kind, data in chunks if kind == b"IDAT"]
    size = sum(map(len, packed))
    if needed > limits.DEFLATED * (size + 1):
        raise ValueError(_claim(width, height, size))
    if (found := _inflated(packed, needed)) < needed:
        raise ValueError(f"it is truncated: {found} of {needed} bytes of pixels are there")


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the bytes of each chunk of a PNG, up to its end or where it is cut."""
    at = len(PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        yield kind, memoryview(content)[at + 8 : at + 8 + length]
        at += 12 + length


def _inflated(packed: list[memoryview], most: int) -> int:
    """Count the unpacked bytes, up to about `most`, without keeping them."""
    unpacker, count = zlib.decompressobj(), 0
    for data in packed:
        rest: bytes | memoryview = data
        while len(rest) and count < most and not unpacker.eof:
            count += len(unpacker.decompress(rest, 2**20))
            rest = unpacker.unconsumed_tail
    return count if count >= most else count + len(unpacker.flush())


def png(image: "Image.Image") -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
