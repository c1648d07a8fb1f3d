"""Folders of images, and what the names in them mean: splits and classes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nelbo import _limits
from nelbo.data.conform import Found, by_split
from nelbo.data.encoded import SUFFIXES, Encoded, Form, read_images


def read_folder(folder: Path, form: Form) -> Found:
    """All images below a folder, sorted by path.

    Sub-folders train, validation (valid, val) and test are the splits. Where all images lie in
    sub-folders of the folder, or of its splits, those are the classes.

    Args:
        folder: searched recursively; hidden files and other types of file are left out.
        form: how images become arrays.

    Raises:
        ValueError: if there are none, or far more other files, or they cannot be read.
    """
    groups, notes = _groups(folder)
    encoded = {part: Encoded.whole(files) for part, files in groups.items()}
    found = read_images(str(folder), encoded, form, notes)
    return replace(found, labels=_classes(folder, groups))


def _classes(folder: Path, groups: Mapping[str, Sequence[Path]]) -> dict[str, dict]:
    """The label "class" of each image, if the sub-folders give one to all and differ."""
    names: dict[str, np.ndarray] = {}
    for part, files in groups.items():
        # a split lies in a folder of its own, whose name is the first
        places = [file.relative_to(folder).parts[0 if part == "all" else 1 :] for file in files]
        if any(len(place) < 2 for place in places):
            return {}
        names[part] = np.array([place[0] for place in places])
    several = len({name for part in names.values() for name in part.tolist()}) > 1
    return {"class": names} if several else {}


def _groups(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each split, and a note if some lie outside the splits."""
    everything = _files(folder)
    groups: dict[str, list[Path]] = {}
    below = ((each.name, each) for each in sorted(folder.iterdir()) if each.is_dir())
    for split, place in by_split(below).items():
        groups[split] = _files(place)
        if not groups[split]:
            raise ValueError(f"{place} has no PNG or JPEG images; fill or remove it")
    if not groups:
        if not everything:
            raise ValueError(f"{folder} has no PNG or JPEG images; give a folder that holds some")
        return {"all": everything}, []
    outside = len(set(everything).difference(*groups.values()))
    note = f"{outside} images outside the folders {', '.join(groups)} left out"
    return groups, [note] if outside else []


def _files(folder: Path) -> list[Path]:
    images: list[Path] = []
    seen = 0
    for place, below, names in os.walk(folder):
        seen += len(below) + len(names)
        # Hidden files include macOS's ._name.png, which is no image.
        below[:] = [name for name in below if not name.startswith(".")]
        named = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        images += [file for file in (Path(place, name) for name in named) if file.is_file()]
        _limits.check_search(folder, len(images), seen, "PNG or JPEG images")
    return sorted(images, key=Path.as_posix)
