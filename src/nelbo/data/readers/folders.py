"""Read folders of images, with splits and classes from the names in them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nelbo.data.found import Found, Reader
from nelbo.data.readers.encoded import Encoded, Form, read_images
from nelbo.data.readers.pillow import SUFFIXES
from nelbo.data.readers.walk import Walked, walk
from nelbo.data.splits import Declared, group, split_of

WHAT = "images"


def read_folder(folder: Path, form: Form, splits: Declared | None = None) -> Found:
    """Read all images below a folder, sorted by path.

    The names of sub-folders and files determine the splits, see `splits`. If all images of a split
    lie in sub-folders of its folder, those are the classes.

    Args:
        folder: searched recursively, following links to folders; hidden files are left out.
        form: the conversion of images to arrays.
        splits: as declared.

    Raises:
        ValueError: there are no images, or far more other files, or they cannot be read.
    """
    walked = walk(folder, SUFFIXES, WHAT)
    names = [file.relative_to(folder).as_posix() for file in walked.files]
    if not names and _tables(walked):
        raise ValueError(_no_images(folder, walked))
    empty = _empty_splits(folder, names) if splits is None else []
    parts, rests, notes = group([*names, *empty], folder, splits, "images outside the folders")
    if empty:
        raise ValueError(f"{folder / empty[0]} has no images; fill or remove it")
    if not names:
        raise ValueError(_no_images(folder, walked))
    encoded = {part: Encoded.whole([walked.files[i] for i in few]) for part, few in parts.items()}
    found = read_images(str(folder), encoded, form, [*walked.notes(), *notes])
    labels, unlabelled = _classes({part: [rests[i] for i in few] for part, few in parts.items()})
    return replace(found, labels=labels, notes=(*found.notes, *unlabelled))


FOLDER = Reader(Path.is_dir, read_folder, resizes=True)


def _classes(rests: Mapping[str, Sequence[str]]) -> tuple[dict[str, dict], list[str]]:
    """Return the label "class" of each image, if sub-folders give one to all of a split and
    differ.

    A split without sub-folders has no labels.
    """
    names: dict[str, np.ndarray] = {}
    for part, files in rests.items():
        known = [name.partition("/")[0] if "/" in name else "" for name in files]
        if any(known) and not all(known):
            first = files[known.index("")]
            return {}, [
                f"sub-folders are not classes, because {first} and others are in no sub-folder"
            ]
        names[part] = np.array(known, str)
    several = len({name for part in names.values() for name in part.tolist() if name}) > 1
    return ({"class": names} if several else {}), []


def _empty_splits(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the folders that are named for a split and are empty."""
    filled = {name.partition("/")[0] for name in names}
    below = sorted(each.name for each in folder.iterdir() if each.is_dir())
    return [name for name in below if name not in filled and name[0] != "." and split_of(name)]


def _no_images(folder: Path, walked: Walked) -> str:
    """Return an error message for a folder without images, with advice."""
    if tables := _tables(walked):
        return (
            f"{folder} holds {tables[0]} files, which are read one at a time; give one of them, or"
            " put all examples into one .npz file with x_train and x_test, or into Parquet files"
        )
    return f"{folder} has no images ({', '.join(SUFFIXES)}); give a folder that holds some"


def _tables(walked: Walked) -> list[str]:
    """Return the types of files of tables and arrays among the other files."""
    return [kind for kind in (".csv", ".tsv", ".npy", ".npz") if walked.others[kind]]
