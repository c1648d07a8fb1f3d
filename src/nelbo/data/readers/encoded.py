"""Read encoded images, each a range of bytes of a file: grey, RGB or RGBA.

Images are rotated according to EXIF, and of several frames the first is taken; both are noted.
Colour profiles are not applied, and the colour under transparent pixels stays. Nothing is ever
written to disk.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils import limits
from nelbo.data.found import Found
from nelbo.data.readers.pillow import TURNED, bits_of, opened, orientation, upright
from nelbo.data.rows import Rows
from nelbo.data.schema import Schema
from nelbo.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

#: bytes of pixels beyond which images are not kept in memory
IN_MEMORY = 2**31
#: copies of the pixels in memory while a data set is split
COPIES = 3

GREY = ("1", "L", "LA", "I;16", "I;16B", "I")
COLOUR = ("RGB", "RGBA", "P", "CMYK")
SIXTEEN = ("I;16", "I;16B", "I")  # Pillow's modes of 16-bit grey, "I" in older versions


class Pictures(Protocol):
    """N encoded images."""

    def __len__(self) -> int: ...

    def at(self, rows: np.ndarray) -> Self:
        """Return a selection of the images."""

    def join(self, others: Sequence[Self]) -> Self:
        """Return these images followed by others."""

    def content(self, i: int) -> bytes:
        """Return the bytes of the i-th image."""

    def name(self, i: int) -> str:
        """Return the place of the i-th image, for messages."""


@dataclass(frozen=True)
class Encoded:
    """N encoded images: the i-th is size[i] bytes of files[file[i]] from offset[i] on."""

    files: tuple[Path, ...]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    @staticmethod
    def whole(files: Sequence[Path]) -> "Encoded":
        """Return files that each hold one image."""
        sizes = np.array([limits.regular(file) for file in files], np.int64)
        return Encoded(tuple(files), np.arange(len(files)), np.zeros_like(sizes), sizes)

    def join(self, others: "Sequence[Encoded]") -> "Encoded":
        """Return these images followed by others."""
        parts = (self, *others)
        first = np.cumsum([0] + [len(part.files) for part in parts])
        file, offset, size = (
            np.concatenate(columns)
            for columns in zip(
                *((p.file + k, p.offset, p.size) for p, k in zip(parts, first, strict=False)),
                strict=True,
            )
        )
        return Encoded(tuple(file for part in parts for file in part.files), file, offset, size)

    def __len__(self) -> int:
        return len(self.file)

    def at(self, rows: np.ndarray) -> "Encoded":
        """Return a selection of the images."""
        return Encoded(self.files, self.file[rows], self.offset[rows], self.size[rows])

    def content(self, i: int) -> bytes:
        """Return the bytes of the i-th image."""
        if self.size[i] > limits.IMAGE and not limits.trusted():
            raise ValueError(f"{self.name(i)} has {self.size[i]} bytes, too many for an image")
        with self.files[self.file[i]].open("rb") as file:
            file.seek(self.offset[i])
            return file.read(self.size[i])

    def name(self, i: int) -> str:
        """Return the file of the i-th image, with the member if the file is a shard."""
        path = self.files[self.file[i]]
        if self.offset[i] == 0:
            return str(path)
        with tarfile.open(path, "r:") as tar:
            member = next(m for m in tar if m.offset_data == self.offset[i])
            return f"{member.name} in {path}"


@dataclass(frozen=True)
class Form:
    """Conversion of images and texts to arrays.

    Args:
        size: crop to the centred square and resample (Lanczos) to size x size.
        channels: minimal number of channels, 1, 3 or 4; more if an image has more.
        levels: 256 takes the upper 8 bits of images of 16 bits.
        deep: keep 16 bits per channel.
        binary: images of one bit have the levels 0 and 1.
        shape: of one example, if a model of known shape is to read arrays.
        tokenizer: of a text to train on, see `text.read`.
    """

    size: int | None = None
    channels: int = 1
    levels: int | None = None
    deep: bool = False
    binary: bool = False
    shape: tuple[int, ...] | None = None
    tokenizer: str | Tokenizer | None = None

    @property
    def most(self) -> int:
        """The largest value of a channel."""
        return 65535 if self.deep else 1 if self.binary else 255


class Images(Rows):
    """Images that are decoded when they are read, uint8 (N, C, H, W), or int32 for 16 bits."""

    def __init__(self, encoded: Pictures, form: Form, shape: tuple[int, ...]) -> None:
        super().__init__((len(encoded), *shape), np.dtype(np.int32 if form.deep else np.uint8))
        self.encoded, self.form = encoded, form

    @override
    def read(self, rows: np.ndarray) -> Tensor:
        kind = torch.int32 if self.form.deep else torch.uint8
        numbers = len(rows) * self.shape[1:].numel()
        limits.check_memory(numbers * self.dtype.itemsize, f"{len(rows)} images at a time")
        x = torch.empty((len(rows), *self.shape[1:]), dtype=kind)
        for i, row in enumerate(rows.tolist()):
            x[i] = torch.from_numpy(_pixels(self.encoded, row, self.form, self.shape[1]))
        return x

    @override
    def take(self, rows: np.ndarray) -> "Images":
        return Images(self.encoded.at(rows), self.form, self.shape[1:])

    @override
    def join(self, others: Sequence["Images"]) -> "Images":
        encoded = self.encoded.join([each.encoded for each in others])
        return Images(encoded, self.form, self.shape[1:])


def read_images(
    source: str, groups: Mapping[str, Pictures], form: Form, notes: Iterable[str] = ()
) -> Found:
    """Read all images (N, C, H, W), or leave them on disk if memory does not hold them.

    There are 256 levels; 65536 if all images have 16 bits per channel, or 2 if all have one bit.
    There are four channels if a pixel of any image is transparent; else three if any has colour or
    a palette; else one.

    Args:
        source: for messages.
        groups: the images of each part.
        form: the conversion requested.
        notes: earlier notes.

    Raises:
        ValueError: an image is damaged, only some are of 16 bits, or sizes differ and `form.size`
            is None.
    """
    notes, channels, packed, seen = list(notes), form.channels, 0, Counter[str]()
    narrower = Counter[int]()
    first: tuple[Pictures, tuple[int, int]] | None = None
    for images in groups.values():
        for i in range(len(images)):
            content = images.content(i)
            look = _look(content, partial(images.name, i))
            size, packed = look.size, packed + len(content)
            seen += Counter(sixteen=look.bits == 16, one=look.bits == 1, turned=look.turned)
            seen += Counter(several=look.frames > 1, further=look.frames - 1, printed=look.printed)
            narrower[look.channels] += 1
            channels = max(channels, look.channels)
            first = first or (images, size)
            if form.size is None and size != first[1]:
                raise ValueError(
                    f"images differ in size: {first[0].name(0)} is {_size(first[1])} but"
                    f" {images.name(i)} is {_size(size)};"
                    f" --size {min(*first[1], *size)} makes them alike"
                )
    assert first is not None
    count = sum(map(len, groups.values()))
    sixteen = seen["sixteen"]
    form = replace(
        form,
        deep=bool(sixteen) and form.levels != 256,
        binary=seen["one"] == count and form.size is None and form.levels in (None, 2),
    )
    if form.deep and sixteen < count:
        raise ValueError(
            f"{sixteen} of the {count} images of {source} have 16 bits a channel and the others 8;"
            " --levels 256 takes the upper 8 bits of all"
        )
    if sixteen and not form.deep:
        notes.append(f"the upper 8 bits of {sixteen} images with 16 bits a channel are used")
    if form.binary:
        notes.append("images of one bit: 2 levels; --levels 256 has black and white among 256")
    if seen["turned"]:
        notes.append(f"{seen['turned']} images rotated according to their EXIF orientation")
    if seen["several"]:
        notes.append(
            f"the first frame of {seen['several']} images with several frames is used;"
            f" {seen['further']} other frames are left out"
        )
    if seen["printed"]:
        notes.append(f"{seen['printed']} CMYK images converted to RGB without a colour profile")
    del narrower[channels]
    if narrower:
        notes.append(
            f"{narrower.total()} of the {count} images have fewer than {channels} channels: grey"
            " is repeated for each colour, and the alpha of opaque images is 255"
        )
    if form.size is not None:
        notes.append(
            f"images cropped to the centred square and resampled to {form.size}x{form.size}"
        )
    width, height = first[1] if form.size is None else (form.size, form.size)
    shape = channels, height, width
    rows = {part: Images(images, form, shape) for part, images in groups.items()}
    whole = sum(each.shape.numel() * each.dtype.itemsize for each in rows.values())
    if (
        whole > IN_MEMORY
        or COPIES * whole > limits.free_memory()
        or limits.inflates(whole, packed)
    ):
        notes.append("too many images to keep in memory: they are read again each time")
        return Found(source, dict(rows), form.most + 1, tuple(notes))
    parts = {part: each[:].numpy() for part, each in rows.items()}
    return Found(source, dict(parts), form.most + 1, tuple(notes))


def read_masked(image: Path, mask: Path, schema: Schema) -> tuple[Tensor, Tensor]:
    """Read an image of a schema, (C, H, W), and the mask of its known pixels, (1, H, W).

    Args:
        image: an encoded image, whose 0..255 are the levels 0..K-1, as `nelbo sample` writes them.
        mask: another of the same size: pixels brighter than half are unknown.
        schema: the schema of the model.

    Raises:
        ValueError: the images cannot be read or have another shape.
    """
    if len(schema.shape) != 3 or schema.levels is None:
        raise ValueError(
            f"examples of the shape {schema.shape} are not images, so no part of them can be drawn"
        )
    found = [
        _one(path, (c, *schema.shape[1:])) for path, c in ((image, schema.shape[0]), (mask, 1))
    ]
    x = np.rint(found[0] * ((schema.levels - 1) / 255)).astype(np.int64)
    return torch.from_numpy(x), torch.from_numpy(found[1] < 128)


def _one(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    found = read_images(str(path), {"all": Encoded.whole([path])}, Form(None, shape[0], 256))
    x = np.asarray(found.parts["all"][0])
    if x.shape != shape:
        raise ValueError(f"{path} has the shape {x.shape} where {shape} is needed")
    return x


def _pixels(images: Pictures, i: int, form: Form, channels: int) -> np.ndarray:
    """Decode one image, (channels, H, W), uint8 or int32."""
    from PIL import Image

    content, name = images.content(i), partial(images.name, i)
    if not form.deep:

        def pixels(image: "Image.Image") -> np.ndarray:
            return np.array(_fit(_plain(upright(image, content), channels), form.size))

        array = opened(content, name, pixels)
        if form.binary:
            array = array // 255
        return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    deep = _deep(content, name, channels)
    if form.size is None:
        return deep
    each = [_fit(Image.fromarray(c.astype(np.float32)), form.size) for c in deep]
    return np.stack([np.rint(np.asarray(c)).clip(0, form.most) for c in each]).astype(np.int32)


def _fit(image: "Image.Image", size: int | None) -> "Image.Image":
    """Return the centred square, resampled; the image itself without a size."""
    from PIL import Image

    if size is None:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def _deep(content: bytes, name: Callable[[], str], channels: int) -> np.ndarray:
    """Decode one image of 16 bits, (channels, H, W) int32.

    For colour Pillow reads the upper of two bytes, in big-endian order; if the order is declared
    as little-endian, it reads the lower ones.
    """

    def lower(image: Any) -> np.ndarray | None:  # noqa: ANN401
        codec, extents, offset, known = image.tile[0]
        if known not in ("RGB;16B", "RGBA;16B"):
            return None
        image.tile = [(codec, extents, offset, known.replace("16B", "16L"))]
        return np.array(upright(image, content))

    upper = opened(content, name, lambda image: np.array(upright(image, content)))
    x = np.full((channels, *upper.shape[:2]), 65535, np.int32)
    if upper.ndim == 2:
        x[:3] = upper
        return x
    low = opened(content, name, lower)
    if low is None:
        raise ValueError(
            f"{name()} has 16 bits of grey with transparency; save it as RGBA, or"
            " take the upper 8 bits with --levels 256"
        )
    for k in range(min(channels, upper.shape[2])):
        x[k] = upper[..., k].astype(np.int32) * 256 + low[..., k]
    return x


class Look(NamedTuple):
    """Properties of an image known before its pixels are kept.

    They are width and height after rotation, the fewest channels that hold it, bits per channel,
    whether EXIF rotates it, the number of frames, and whether its colours are CMYK.
    """

    size: tuple[int, int]
    channels: int
    bits: int
    turned: bool
    frames: int
    printed: bool


def _look(content: bytes, name: Callable[[], str]) -> Look:
    """Look at an image and make sure that no pixel is missing.

    The pixels are decoded only if it may be transparent.
    """

    def look(image: "Image.Image") -> tuple[str, Look | None]:
        mode = image.mode
        if mode not in GREY + COLOUR or (mode == "I" and image.format != "PNG"):
            return mode, None
        frames, way = getattr(image, "n_frames", 1), orientation(image, content)
        width, height = image.size
        if way in TURNED and image.format != "TIFF":  # Pillow swaps the sides of TIFF itself
            width, height = height, width
        bits = 1 if mode == "1" else 16 if mode in SIXTEEN else bits_of(content)
        clear = image.has_transparency_data and _alpha(image) != (255, 255)
        channels = 4 if clear else 3 if mode in COLOUR else 1
        return mode, Look((width, height), channels, bits, way != 1, frames, mode == "CMYK")

    mode, found = opened(content, name, look, whole=True)
    if found is None:
        raise ValueError(f"{name()} has the colour mode {mode}; convert it to grey or RGB")
    return found


def _alpha(image: "Image.Image") -> object:
    """Return the smallest and the largest opacity of the pixels."""
    return image.convert("RGBA").getchannel("A").getextrema()


def _plain(image: "Image.Image", channels: int) -> "Image.Image":
    """Convert to mode L, RGB or RGBA, 8 bits per channel."""
    from PIL import Image

    if image.mode in SIXTEEN:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of transparent palettes when going to RGB
    if image.mode == "CMYK":
        image = image.convert("RGB")  # the only way to RGBA or grey in Pillow
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
