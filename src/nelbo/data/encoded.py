"""Encoded images, each a range of bytes of a file: PNG and JPEG; grey, RGB or RGBA.

Pixels are taken as stored: an EXIF orientation is not applied, colour profiles are not, and the
colour under transparent pixels stays. Nothing is ever written to disk.
"""

import io
import tarfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from nelbo.data.conform import Found
from nelbo.data.rows import Rows
from nelbo.data.schema import Schema

if TYPE_CHECKING:
    from PIL import Image

#: bytes of pixels beyond which images are not kept in memory
IN_MEMORY = 2**31

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY = ("1", "L", "LA", "I;16", "I")
COLOUR = ("RGB", "RGBA", "P")
SIXTEEN = ("I;16", "I")  # how Pillow has 16 bits of grey


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
        sizes = np.array([file.stat().st_size for file in files], np.int64)
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
        levels: 256 takes the upper 8 bits of images of 16 bits, which are refused without.
    """

    size: int | None = None
    channels: int = 1
    levels: int | None = None


class Images(Rows):
    """Images that are decoded when they are read, uint8 (N, C, H, W)."""

    def __init__(self, encoded: Pictures, form: Form, shape: tuple[int, ...]) -> None:
        super().__init__((len(encoded), *shape), np.dtype(np.uint8))
        self.encoded, self.form = encoded, form

    def read(self, rows: np.ndarray) -> Tensor:
        x = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
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
    """All images as uint8 (N, C, H, W) with 256 levels; unread where memory does not hold them.

    Four channels if a pixel of any image is transparent; else three if any has colour or a
    palette; else one.

    Args:
        source: for messages.
        groups: the images of each part.
        form: what is asked for.
        notes: what is known already.

    Raises:
        ValueError: if one is damaged or of 16 bits, or sizes differ and `form.size` is None.
    """
    notes, channels, sixteen = list(notes), form.channels, 0
    first: tuple[Pictures, tuple[int, int]] | None = None
    for images in groups.values():
        for i in range(len(images)):
            image, bits = _decode(images, i, pixels=False, levels=form.levels)
            sixteen += bits == 16
            channels = max(channels, _channels(images, i, image, form.levels))
            first = first or (images, image.size)
            if form.size is None and image.size != first[1]:
                raise ValueError(
                    f"images differ in size: {first[0].name(0)} is {_size(first[1])} but"
                    f" {images.name(i)} is {_size(image.size)};"
                    f" --size {min(*first[1], *image.size)} makes them alike"
                )
    assert first is not None
    if sixteen:
        notes.append(f"of {sixteen} images of 16 bits a channel, the upper 8 were taken")
    if form.size is not None:
        notes.append(
            f"images cropped to the centred square and resampled to {form.size}x{form.size}"
        )
    width, height = first[1] if form.size is None else (form.size, form.size)
    shape = channels, height, width
    rows = {part: Images(images, form, shape) for part, images in groups.items()}
    if sum(each.shape.numel() for each in rows.values()) > IN_MEMORY:
        notes.append("more images than memory is for: they are read again each time")
        return Found(source, dict(rows), 256, tuple(notes))
    parts = {part: each[:].numpy() for part, each in rows.items()}
    return Found(source, dict(parts), 256, tuple(notes))


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
    """One image, uint8 (channels, H, W)."""
    from PIL import Image

    image = _plain(_decode(images, i, pixels=True, levels=form.levels)[0], channels)
    if form.size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.crop(box).resize((form.size, form.size), Image.Resampling.LANCZOS)
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def _channels(images: Pictures, i: int, image: "Image.Image", levels: int | None) -> int:
    """As few as hold the image; its header tells unless it may be transparent."""
    if image.has_transparency_data:
        whole = _decode(images, i, pixels=True, levels=levels)[0]
        if whole.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            return 4
    return 3 if image.mode in COLOUR else 1


def _plain(image: "Image.Image", channels: int) -> "Image.Image":
    """In mode L, RGB or RGBA, 8 bits a channel."""
    from PIL import Image

    if image.mode in SIXTEEN:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparent palettes
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def _decode(
    images: Pictures, i: int, pixels: bool, levels: int | None
) -> tuple["Image.Image", int]:
    """An image, of which only the header is read unless `pixels`, and its bits a channel."""
    from PIL import Image

    content = images.content(i)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                if pixels:
                    image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{images.name(i)} claims more than {Image.MAX_IMAGE_PIXELS} pixels; remove it or"
            f" scale it down"
        ) from error
    except Exception as error:  # damage shows as OSError, SyntaxError, EOFError, struct.error, ..
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{images.name(i)} cannot be read as a PNG or JPEG image: {reason}; remove it or save"
            f" it again"
        ) from error
    # Pillow narrows 16-bit colour to 8 bits in silence, so ask the header.
    bits = content[24] if content.startswith(b"\x89PNG") else 8
    if bits == 16 and levels != 256:
        raise ValueError(
            f"{images.name(i)} has 16 bits a channel, more levels than a model has; --levels 256"
            f" takes the upper 8 bits"
        )
    if image.mode not in GREY + COLOUR:
        raise ValueError(
            f"{images.name(i)} has the colour mode {image.mode}; convert it to grey or RGB"
        )
    return image, bits


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
