"""From the name of a source to a data set."""

from os import PathLike
from pathlib import Path

import torch

from nelbo.data import arrays, builtin, images
from nelbo.data.conform import Found, infer, refuse_constant, split, store
from nelbo.data.schema import Dataset, Schema

BUILT_IN = {"digits": builtin.digits}
FILES = {".npy": arrays.read_npy, ".npz": arrays.read_npz}
SUPPORTED = ".npy or .npz, or a folder of PNG or JPEG images"


def load(
    source: str | PathLike[str],
    *,
    levels: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set to train on, with the splits "train", "validation" and "test".

    Splits that the source lacks are drawn from its training examples: 80/10/10 if it has none.

    Args:
        source: "digits", or the path of a .npy or .npz file or of a folder of images. A string
            that is a built-in name is never a path: write ./digits for that.
        levels: data are the integers 0..levels-1. By default integers are, as many as are found
            in all splits (256 for 8-bit images), and reals have a density.
        size: resize the images of a folder to size x size.
        seed: of the split.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it cannot be read, or has values that no model of the kind can have.
    """
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2; got {levels}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    name, found = _read(source, size)
    schema, inferred = infer(found, levels)
    splits, how = split(store(found, schema), found.source, seed)
    if schema.kind == "real":
        refuse_constant(splits["train"], found.source)
    return Dataset(name, schema, splits, (*found.notes, *inferred, *how))


def load_like(source: str | PathLike[str], schema: Schema, *, size: int | None = None) -> Dataset:
    """A data set to evaluate a model of some schema on.

    Args:
        source: as in `load`.
        schema: what the model knows; the data must be of this shape and have these values.
        size: as in `load`.

    Returns:
        The splits that the source itself has, and "all", which is all of it in their order.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it cannot be read or is not of this schema.
    """
    name, found = _read(source, size, colour=len(schema.shape) == 3 and schema.shape[0] == 3)
    if found.levels is not None and schema.levels is not None and found.levels < schema.levels:
        # Its values would fit, and mean something else.
        raise ValueError(
            f"{found.source} has {found.levels} levels where {schema.levels} are needed; "
            f"rescale it to 0..{schema.levels - 1} and save it as integers"
        )
    splits = store(found, schema)
    if "all" not in splits:
        splits["all"] = torch.cat(list(splits.values()))
    return Dataset(name, schema, splits, found.notes)


def _read(
    source: str | PathLike[str], size: int | None, colour: bool = False
) -> tuple[str, Found]:
    """The full name of a source and what is in it."""
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    path = Path(source).absolute()
    built_in = BUILT_IN.get(source) if isinstance(source, str) else None
    if built_in is None and path.is_dir():
        return str(path), images.read_folder(path, size, colour)
    if size is not None:
        raise ValueError(f"--size resizes a folder of images; {source} is none, so leave it out")
    if built_in is not None:
        return str(source), built_in()
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file or folder {path}; give {SUPPORTED}, or a built-in set: "
            f"{', '.join(BUILT_IN)}"
        )
    if path.suffix.lower() not in FILES:
        raise ValueError(f"{path} is of no known type; give {SUPPORTED}")
    return str(path), FILES[path.suffix.lower()](path)
