"""The door to Pillow: an image is decoded once its bytes can hold the pixels that it claims.

Whatever Pillow makes of a damaged one, its properties included, is told in one sentence.
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
#: what is read, by the ends of names and as Pillow calls it
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
ORIENTATION = 0x0112  # the tag of EXIF
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
#: pixels that any format may make of few bytes, and that one byte beyond can hold: of a JPEG 512
FEW, HELD = 2**24, 1024
#: bytes of memory that a pixel takes while it is decoded, converted and copied, of 8 and 16 bits
TAKEN = {8: 20, 16: 40}
#: samples of a pixel by the colour type of a PNG
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: first column and row, and their distances, of the passes of an interlaced PNG
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
    """`use` of an image.

    Args:
        content: the encoded image.
        name: gives the one for messages.
        use: only asks Pillow, for each of its errors is taken for damage.
        formats: as Pillow calls them.
        whole: make sure that no pixel is missing, which Pillow may fill up in silence.

    Raises:
        ValueError: it is damaged, or claims more pixels than its bytes, memory or Pillow hold.
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
        if isinstance(error, UnidentifiedImageError):  # it names an object of Python
            reason = "it is of no known type"
        kind = f"a {formats[0]} image" if len(formats) == 1 else "an image"
        raise ValueError(
            f"{name()} cannot be read as {kind}: {reason}; remove it or save it again"
        ) from error


def orientation(image: "Image.Image", content: bytes) -> int:
    """How EXIF says that an image is to be turned, 1 to 8; 1 leaves it as it is."""
    if image.format == "PNG" and not any(word in content for word in (b"eXIf", b"exif", b"xmp")):
        return 1  # to ask Pillow would decode all of it
    found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def upright(image: "Image.Image", content: bytes) -> "Image.Image":
    """An image as EXIF says that it is to be seen."""
    from PIL import ImageOps

    return image if orientation(image, content) == 1 else ImageOps.exif_transpose(image)


def bits_of(content: bytes) -> int:
    """8 or 16 bits a channel: Pillow narrows 16-bit colour in silence, so the header is asked."""
    return 16 if content.startswith(PNG) and content[24:25] == b"\x10" else 8


def _claim(width: int, height: int, size: int) -> str:
    return f"it claims {width}x{height} pixels, which {size} bytes do not hold"


def _check_png(content: bytes) -> None:
    """Raise ValueError unless the packed bytes of a PNG are all its rows."""
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
        raise ValueError(f"it is cut: of {needed} bytes of pixels {found} are there")


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The kind and the bytes of each chunk of a PNG, up to its end or where it is cut."""
    at = len(PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        yield kind, memoryview(content)[at + 8 : at + 8 + length]
        at += 12 + length


def _inflated(packed: list[memoryview], most: int) -> int:
    """How many bytes are packed, counted up to about `most` without keeping them."""
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
