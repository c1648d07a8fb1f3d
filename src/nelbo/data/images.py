"""Folders of PNG and JPEG images, 8 bits a channel, grey or RGB.

Pixels are taken as stored: an EXIF orientation is not applied, colour profiles are not.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nelbo.data.conform import SPLITS, Found

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P")


def read_folder(folder: Path, size: int | None = None, colour: bool = False) -> Found:
    """All images below a folder, sorted by path, as uint8 (N, C, H, W) with 256 levels.

    Sub-folders train, validation (valid, val) and test are the splits. Three channels if any
    image has colour or a palette, else one.

    Args:
        folder: searched recursively; hidden files and other types of file are left out.
        size: crop to the centred square and resample (Lanczos) to size x size.
        colour: have grey images as RGB even if all are grey.

    Raises:
        ValueError: if there are none, one is damaged, transparent or not 8-bit, or sizes differ
            and `size` is None.
    """
    groups, notes = _groups(folder)
    first: tuple[Path, tuple[int, int]] | None = None
    for file in (file for files in groups.values() for file in files):
        image = _decode(file, pixels=False)
        colour = colour or image.mode in COLOUR
        first = first or (file, image.size)
        if size is None and image.size != first[1]:
            raise ValueError(
                f"images differ in size: {first[0]} is {_size(first[1])} but {file} is "
                f"{_size(image.size)}; --size {min(*first[1], *image.size)} makes them alike"
            )
    if first is None:
        raise ValueError(f"{folder} has no PNG or JPEG images; give a folder that holds some")
    if size is not None:
        notes.append(f"images cropped to the centred square and resampled to {size}x{size}")
    width, height = first[1] if size is None else (size, size)
    channels, parts = 3 if colour else 1, {}
    for split, files in groups.items():
        x = parts[split] = np.empty((len(files), channels, height, width), np.uint8)
        for i, file in enumerate(files):
            x[i] = _pixels(file, size)
    return Found(str(folder), parts, 256, tuple(notes))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _groups(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split, and a note if some lie outside the splits."""
    everything = _files(folder)
    groups: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        present = [folder / name for name in names if (folder / name).is_dir()]
        if len(present) > 1:
            raise ValueError(
                f"{present[0]} and {present[1]} both name the {split} split; keep one"
            )
        if present:
            groups[split] = _files(present[0])
            if not groups[split]:
                raise ValueError(f"{present[0]} has no PNG or JPEG images; fill or remove it")
    if not groups:
        return {"all": everything}, []
    outside = len(set(everything).difference(*groups.values()))
    note = f"{outside} images outside the folders {', '.join(groups)} left out"
    return groups, [note] if outside else []


def _files(folder: Path) -> list[Path]:
    # Hidden files include macOS's ._name.png, which is no image.
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    shown = (name for name in names if not any(part.startswith(".") for part in name.parts))
    images = (name for name in shown if name.suffix.lower() in SUFFIXES)
    return [folder / name for name in sorted(images, key=Path.as_posix)]


def _decode(file: Path, pixels: bool) -> "Image.Image":
    """An image, of which only the header is read unless `pixels`."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                if pixels:
                    image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} claims more than {Image.MAX_IMAGE_PIXELS} pixels; remove it or scale it down"
        ) from error
    except Exception as error:  # damage shows as OSError, SyntaxError, EOFError, struct.error, ..
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} cannot be read as a PNG or JPEG image: {reason}; remove it or save it again"
        ) from error
    # Pillow narrows 16-bit colour to 8 bits in silence, so ask the header.
    with file.open("rb") as stream:
        header = stream.read(25)
    if header.startswith(b"\x89PNG") and header[24] == 16:
        raise ValueError(f"{file} has 16 bits a channel; convert it to 8 bits")
    if image.mode not in GREY + COLOUR:
        raise ValueError(f"{file} has the colour mode {image.mode}; convert it to grey or RGB")
    return image


def _pixels(file: Path, size: int | None) -> np.ndarray:
    """(C, H, W) or, if grey, (H, W), which broadcasts over channels."""
    from PIL import Image

    image = _decode(file, pixels=True)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ValueError(f"{file} is partly transparent; flatten it onto a background")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = _plain(image).crop(box).resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(_plain(image))
    return pixels if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)


def _plain(image: "Image.Image") -> "Image.Image":
    """In mode L or RGB."""
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparent palettes
    return image.convert("L" if image.mode in GREY else "RGB")
