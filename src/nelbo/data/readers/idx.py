"""Read idx files, the format of MNIST: a header of sizes and then the numbers, plain or
gzipped."""

import gzip
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nelbo._utils import limits
from nelbo.data.found import Found, Reader
from nelbo.data.readers.arrays import COPIES, found_arrays
from nelbo.data.splits import Declared, group, one_each

if TYPE_CHECKING:
    from nelbo.data.readers.encoded import Form

#: types by the third byte of a file
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
ENDING = re.compile(r"(^|[-_.])idx(\d-\w+)?(\.gz)?$", re.I)
NAME = re.compile(r"(?P<stem>.*?)[-_.]?(?P<what>images|labels)[-_.]idx\d-\w+(\.gz)?", re.I)


def is_idx(path: Path) -> bool:
    """Return whether a name ends as that of an idx file does, as in train-images-idx3-ubyte.gz."""
    return ENDING.search(path.name) is not None


def images_in(folder: Path) -> list[Path]:
    """Return the idx files of images in a folder, by name."""
    return [file for file in sorted(folder.iterdir()) if _stem(file, "images") is not None]


def is_source(path: Path) -> bool:
    """Return whether `read_idx` reads a path: an idx file, or a folder of them."""
    return bool(images_in(path)) if path.is_dir() else path.is_file() and is_idx(path)


def read_idx(source: Path, form: "Form", splits: Declared | None = None) -> Found:
    """Read the examples of an idx file, or of train-images-idx3-ubyte and the like in a folder.

    Files of labels beside them are their classes.

    Raises:
        ValueError: a file is damaged or its length differs from its header.
    """
    files, notes = ({"all": source}, []) if source.is_file() else _splits(source, splits)
    arrays = {part: read_array(file) for part, file in files.items()}
    found = found_arrays(source, arrays, files, tuple(notes))
    beside = {part: _labels_of(file) for part, file in files.items()}
    labels = {part: read_array(file) for part, file in beside.items() if file is not None}
    return replace(found, labels={"class": labels}) if len(labels) == len(files) else found


IDX = Reader(is_source, read_idx)


def read_array(path: Path) -> np.ndarray:
    """Read the array of an idx file, in the byte order of this machine.

    Raises:
        ValueError: it is damaged, or its length differs from its header.
    """
    zipped = path.suffix.lower() == ".gz"
    opener, most = gzip.open if zipped else open, limits.regular(path)
    most *= limits.DEFLATED if zipped else 1
    try:
        with opener(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or not magic[3]:
                raise ValueError("it does not begin like an idx file")
            kind = np.dtype(TYPES[magic[2]])
            sizes = np.frombuffer(file.read(4 * magic[3]), ">u4").tolist()
            if len(sizes) < magic[3]:
                raise ValueError("it ends within its header")
            needed = math.prod(sizes) * kind.itemsize
            # never allocate memory for a false header that the file cannot fill
            if needed <= most:
                packed = limits.regular(path)
                limits.check_unpacked(needed, packed, f"its {sizes} numbers", COPIES)
            content = file.read(needed + 1) if needed <= most else b""
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as an idx file: {error}; copy it again"
        ) from error
    if len(content) != needed:
        raise ValueError(
            f"{path} cannot be read as an idx file: its header says {sizes}, {needed} bytes, and"
            f" it holds {'more' if len(content) > needed else 'fewer'}; copy it again"
        )
    array = np.frombuffer(content, kind).reshape(sizes)
    return array.astype(kind.newbyteorder("="))


def _splits(folder: Path, splits: Declared | None) -> tuple[dict[str, Path], list[str]]:
    files = {str(_stem(file, "images")): file for file in images_in(folder)}
    groups = group(list(files), folder, splits)
    if len(groups.parts.get("all", ())) > 1:
        raise ValueError(
            f"{folder} has several idx files of images, none named train; give one of them:"
            f" {next(iter(files.values()))}"
        )
    stems = one_each(groups, list(files), folder)
    return {split: files[stem] for split, stem in stems.items()}, groups.notes


def _labels_of(images: Path) -> Path | None:
    """Return the file of labels beside a file of images, plain or gzipped."""
    stem = _stem(images, "images")
    if stem is None:
        return None
    beside = sorted(images.parent.iterdir())
    return next((file for file in beside if _stem(file, "labels") == stem), None)


def _stem(file: Path, what: str) -> str | None:
    """Return the part of the name before `what`, "images" or "labels"; None if it is not there."""
    match = NAME.fullmatch(file.name)
    return match["stem"] if match and match["what"].lower() == what else None
