"""Cut PNG images into tiles of the size of a model's images, and join them again.

An image that is not a multiple of that size is padded by repeating its last rows and columns,
which are cut off again. The pixels are restored, not the bytes of the file.
"""

import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nelbo._utils import limits
from nelbo.codec.errors import CorruptFileError
from nelbo.data.readers.pillow import bits_of, opened, orientation
from nelbo.data.schema import Schema

MODES = {1: "L", 3: "RGB"}
SUFFIX = ".png"
#: bytes of memory per number of the images while they are cut, coded and compared
TAKEN = 5


def read(path: Path, schema: Schema) -> tuple[Tensor, dict[str, object], bytes, int]:
    """Return the tiles of an image or a folder, a description that restores them, and their size.

    Raises:
        ValueError: there are no images, or some that the schema cannot hold.
    """
    if len(schema.shape) != 3 or schema.shape[0] not in MODES or schema.levels is None:
        raise ValueError(f"{path} holds images; the run's examples have the shape {schema.shape}")
    files = files_of(path)
    others = [file for file in files if file.suffix.lower() != SUFFIX]
    if others:
        raise ValueError(f"{path} has files that are not images, such as {others[0]}; remove them")
    if not files:
        raise ValueError(f"{path} has no {SUFFIX} files; give a folder of them")
    _check_size(files, path)
    images = [_load(file, schema) for file in files]
    tiles = np.concatenate([cut(image, schema.shape) for image in images])
    sizes = [list(image.shape[1:]) for image in images]
    same = all(size == sizes[0] for size in sizes)
    about: dict[str, object] = {"kind": "png" if path.is_file() else "images"}
    about["names"] = [file.relative_to(path).as_posix() for file in files if file != path]
    about["sizes"] = sizes[:1] if same else sizes
    return torch.from_numpy(tiles), about, b"", sum(image.size for image in images)


def files(
    x: np.ndarray, about: dict, out: Path, places: np.ndarray | None
) -> list[tuple[Path, bytes]]:
    """Return the images of the tiles x; if only tiles at `places` exist, only complete images."""
    names = [out] if about["kind"] == "png" else [inside(out, name) for name in about["names"]]
    sizes = about["sizes"] * len(names) if len(about["sizes"]) == 1 else about["sizes"]
    at, made = 0, []
    for name, (height, width) in zip(names, sizes, strict=True):
        count = -(-height // x.shape[2]) * -(-width // x.shape[3])
        first, last = at, at + count
        if places is not None:
            first, last = np.searchsorted(places, [at, at + count])
        if last - first == count:
            made.append((name, _save(join(x[first:last], height, width))))
        at += count
    return made


def files_of(path: Path) -> list[Path]:
    """Return the file, or all files in a folder except hidden ones, by name.

    Raises:
        ValueError: a folder in it is a link, which could not be restored.
    """
    if path.is_file():
        return [path]
    found = sorted(path.rglob("[!.]*"))
    for each in found:
        if each.is_symlink() and each.is_dir():
            raise ValueError(f"{each} is a link to a folder; put that folder in its place")
    return [each for each in found if each.is_file()]


def cut(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cut an image (C, H, W) into tiles (N, C, h, w), row by row."""
    channels, h, w = shape
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (0, -height % h), (0, -width % w)), mode="edge")
    rows, columns = padded.shape[1] // h, padded.shape[2] // w
    tiles = padded.reshape(channels, rows, h, columns, w).transpose(1, 3, 0, 2, 4)
    return tiles.reshape(-1, *shape)


def join(tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Join tiles to the image (C, height, width) from which `cut` made them."""
    _, channels, h, w = tiles.shape
    rows, columns = -(-height // h), -(-width // w)
    whole = tiles.reshape(rows, columns, channels, h, w).transpose(2, 0, 3, 1, 4)
    return whole.reshape(channels, rows * h, columns * w)[:, :height, :width]


def _check_size(files: list[Path], folder: Path) -> None:
    """Raise ValueError before decoding if the images together exceed memory."""
    pixels = packed = 0
    for file in files:
        packed += limits.regular(file)
        limits.check_file(file)
        pixels += opened(file.read_bytes(), partial(str, file), _samples, ("PNG",))
    limits.check_unpacked(pixels, packed, str(folder), TAKEN)


def _samples(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


def _load(file: Path, schema: Schema) -> np.ndarray:
    """Return the pixels of an image, (C, H, W) uint8."""
    mode = MODES[schema.shape[0]]

    def pixels(image: Image.Image) -> tuple[str, bool, bool, np.ndarray | None]:
        plain = image.mode == mode and getattr(image, "n_frames", 1) == 1
        clear, turned = "transparency" in image.info, orientation(image, content) != 1
        return image.mode, clear, turned, np.atleast_3d(np.asarray(image)) if plain else None

    content = file.read_bytes()
    found, clear, turned, x = opened(content, partial(str, file), pixels, ("PNG",), whole=True)
    bits = bits_of(content)
    if x is None or bits > 8:
        raise ValueError(
            f"{file} is an image of mode {found} of {bits} bits; the run's are of {mode}, and a"
            f" conversion would lose something: save it as {mode}"
        )
    if clear:
        raise ValueError(
            f"{file} has a transparent colour, which the run cannot hold; save it without"
        )
    if turned:
        raise ValueError(
            f"{file} is rotated by its EXIF orientation, which would not be restored; save it"
            " upright"
        )
    assert schema.levels is not None
    if x.max() >= schema.levels:
        raise ValueError(
            f"{file} holds the value {x.max()}; the run's schema holds 0..{schema.levels - 1}"
        )
    return x.transpose(2, 0, 1)


def _save(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def inside(folder: Path, name: str) -> Path:
    """Return a path below the folder; raise CorruptFileError if a file states another."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise CorruptFileError(f"the file names an image {name!r} outside its folder")
    return folder / path
