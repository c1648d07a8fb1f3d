"""Encoded images, each a range of bytes of a file: grey, RGB or RGBA.

They are turned as EXIF says, which is noted; of several frames the first is taken, which is noted
too. Colour profiles are not applied, and the colour under transparent pixels stays. Nothing is
ever written to disk.
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

from nelbo._utils import limits
from nelbo.data.conform import Found
from nelbo.data.readers.pillow import TURNED, bits_of, opened, orientation, upright
from nelbo.data.rows import Rows
from nelbo.data.schema import Schema

if TYPE_CHECKING:
    from PIL import Image

#: bytes of pixels beyond which images are not kept in memory
IN_MEMORY = 2**31
#: of the pixels of a data set, while it is split
COPIES = 3

GREY = ("1", "L", "LA", "I;16", "I;16B", "I")
COLOUR = ("RGB", "RGBA", "P", "CMYK")
SIXTEEN = ("I;16", "I;16B", "I")  # how Pillow has 16 bits of grey, the last one in older versions


class Pictures(Protocol):
    """N encoded images."""

    def __len__(self) -> int: ...

    def at(self, rows: np.ndarray) -> Self:
        """Some of them."""

    def join(self, others: Sequence[Self]) -> Self:
        """These, and others after them."""

    def content(self, i: int) -> bytes:
        """The bytes of the i-th one."""

    def name(self, i: int) -> str:
        """Where it is, for messages."""


@dataclass(frozen=True)
class Encoded:
    """N encoded images: the i-th is size[i] bytes of files[file[i]] from offset[i] on."""

    files: tuple[Path, ...]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    @staticmethod
    def whole(files: Sequence[Path]) -> "Encoded":
        """Each file is an image."""
        sizes = np.array([limits.regular(file) for file in files], np.int64)
        return Encoded(tuple(files), np.arange(len(files)), np.zeros_like(sizes), sizes)

    def join(self, others: "Sequence[Encoded]") -> "Encoded":
        """These, and others after them."""
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
        """Some of them."""
        return Encoded(self.files, self.file[rows], self.offset[rows], self.size[rows])

    def content(self, i: int) -> bytes:
        if self.size[i] > limits.IMAGE and not limits.trusted():
            raise ValueError(f"{self.name(i)} has {self.size[i]} bytes, which no image has")
        with self.files[self.file[i]].open("rb") as file:
            file.seek(self.offset[i])
            return file.read(self.size[i])

    def name(self, i: int) -> str:
        """The file, and where it is a shard the member in it."""
        path = self.files[self.file[i]]
        if self.offset[i] == 0:
            return str(path)
        with tarfile.open(path, "r:") as tar:
            member = next(m for m in tar if m.offset_data == self.offset[i])
            return f"{member.name} in {path}"


@dataclass(frozen=True)
class Form:
    """How images become arrays.

    Args:
        size: crop to the centred square and resample (Lanczos) to size x size.
        channels: 1, 3 or 4 of them, or more where an image has more.
        levels: 256 takes the upper 8 bits of images of 16 bits.
        deep: take 16 bits a channel.
        binary: images of one bit are of the levels 0 and 1.
    """

    size: int | None = None
    channels: int = 1
    levels: int | None = None
    deep: bool = False
    binary: bool = False

    @property
    def most(self) -> int:
        """The largest value of a channel."""
        return 65535 if self.deep else 1 if self.binary else 255


class Images(Rows):
    """Images that are decoded when they are read, uint8 (N, C, H, W), or int32 of 16 bits."""

    def __init__(self, encoded: Pictures, form: Form, shape: tuple[int, ...]) -> None:
        super().__init__((len(encoded), *shape), np.dtype(np.int32 if form.deep else np.uint8))
        self.encoded, self.form = encoded, form

    def read(self, rows: np.ndarray) -> Tensor:
        kind = torch.int32 if self.form.deep else torch.uint8
        numbers = len(rows) * self.shape[1:].numel()
        limits.check_memory(numbers * self.dtype.itemsize, f"{len(rows)} images at a time")
        x = torch.empty((len(rows), *self.shape[1:]), dtype=kind)
        for i, row in enumerate(rows.tolist()):
            x[i] = torch.from_numpy(_pixels(self.encoded, row, self.form, self.shape[1]))
        return x

    def take(self, rows: np.ndarray) -> "Images":
        return Images(self.encoded.at(rows), self.form, self.shape[1:])

    def join(self, others: Sequence["Images"]) -> "Images":
        encoded = self.encoded.join([each.encoded for each in others])
        return Images(encoded, self.form, self.shape[1:])


def read_images(
    source: str, groups: Mapping[str, Pictures], form: Form, notes: Iterable[str] = ()
) -> Found:
    """All images (N, C, H, W) with 256 levels, 65536 where all have 16 bits a channel, or 2 where
    all have one bit; unread where memory does not hold them.

    Four channels if a pixel of any image is transparent; else three if any has colour or a
    palette; else one.

    Args:
        source: for messages.
        groups: the images of each part.
        form: what is asked for.
        notes: what is known already.

    Raises:
        ValueError: if one is damaged, only some are of 16 bits, or sizes differ and `form.size`
            is None.
    """
    notes, channels, packed, seen = list(notes), form.channels, 0, Counter[str]()
    first: tuple[Pictures, tuple[int, int]] | None = None
    for images in groups.values():
        for i in range(len(images)):
            content = images.content(i)
            look = _look(content, partial(images.name, i))
            size, packed = look.size, packed + len(content)
            seen += Counter(sixteen=look.bits == 16, one=look.bits == 1, turned=look.turned)
            seen += Counter(several=look.frames > 1, further=look.frames - 1, printed=look.printed)
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
        notes.append(f"of {sixteen} images of 16 bits a channel, the upper 8 were taken")
    if form.binary:
        notes.append("images of one bit: 2 levels; --levels 256 has black and white among 256")
    if seen["turned"]:
        notes.append(f"{seen['turned']} images turned as their EXIF orientation says")
    if seen["several"]:
        notes.append(
            f"of {seen['several']} images of several frames the first is taken: {seen['further']}"
            " further frames left out"
        )
    if seen["printed"]:
        notes.append(f"{seen['printed']} images of CMYK taken as RGB, without a colour profile")
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
        notes.append("more images than memory is for: they are read again each time")
        return Found(source, dict(rows), form.most + 1, tuple(notes))
    parts = {part: each[:].numpy() for part, each in rows.items()}
    return Found(source, dict(parts), form.most + 1, tuple(notes))


def read_masked(image: Path, mask: Path, schema: Schema) -> tuple[Tensor, Tensor]:
    """An image of a schema as one example (C, H, W), and which of its pixels are known (1, H, W).

    Args:
        image: an encoded image, whose 0..255 are the levels 0..K-1, as `nelbo sample` writes them.
        mask: another of its size: what is brighter than half is not known.
        schema: what the model knows.

    Raises:
        ValueError: if they cannot be read or are of another shape.
    """
    if len(schema.shape) != 3 or schema.levels is None:
        raise ValueError(f"examples of the shape {schema.shape} are no images to be completed")
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
    """One image, (channels, H, W), uint8 or int32."""
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
    """The centred square, resampled; the image itself without a size."""
    from PIL import Image

    if size is None:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def _deep(content: bytes, name: Callable[[], str], channels: int) -> np.ndarray:
    """One image of 16 bits, (channels, H, W) int32.

    Of colour Pillow reads the upper of two bytes, in big-endian order; told that the order is
    little-endian, it reads the lower ones.
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
    """What is known of an image before its pixels are: width and height as it is to be seen, the
    fewest channels that hold it, bits a channel, whether EXIF turns it, frames, and whether its
    colours are those of print."""

    size: tuple[int, int]
    channels: int
    bits: int
    turned: bool
    frames: int
    printed: bool


def _look(content: bytes, name: Callable[[], str]) -> Look:
    """A look at an image of which no pixel is missing; its header tells unless it may be
    transparent."""

    def look(image: "Image.Image") -> tuple[str, Look | None]:
        mode = image.mode
        if mode not in GREY + COLOUR or (mode == "I" and image.format != "PNG"):
            return mode, None
        frames, way = getattr(image, "n_frames", 1), orientation(image, content)
        width, height = image.size
        if way in TURNED and image.format != "TIFF":  # of which Pillow says the size as seen
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
    """The least and the largest opacity of its pixels."""
    return image.convert("RGBA").getchannel("A").getextrema()


def _plain(image: "Image.Image", channels: int) -> "Image.Image":
    """In mode L, RGB or RGBA, 8 bits a channel."""
    from PIL import Image

    if image.mode in SIXTEEN:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparent palettes
    if image.mode == "CMYK":
        image = image.convert("RGB")  # of which alone Pillow makes RGBA or grey
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
