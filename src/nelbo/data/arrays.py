"""NumPy files: .npy holds one array, .npz several under names."""

import math
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from nelbo import _limits
from nelbo.data.conform import Found, by_split

#: what stands before the name of a split
PREFIXES = ("x_", "X_", "")

#: what arrays of labels are called, before the name of a split
LABELS = ("y", "labels", "label")


def read_npy(path: Path) -> Found:
    """The one array of a .npy file.

    Raises:
        ValueError: if the file is damaged or its array is not one of numeric examples.
    """
    return found_arrays(path, {"all": load_npy(path)}, {"all": str(path)})


def read_npz(path: Path) -> Found:
    """The examples of a .npz file: x_train, x_validation, x_test; train, ..; x; or the only one.

    Arrays y_train, .. or labels_train, ..; y or labels are their labels: integers and strings are
    classes, under the name class, and reals are numbers, under the name y.

    Raises:
        ValueError: if the file is damaged, has none of these names, or an array is not one of
            numeric examples.
    """
    keys = names_in(path)
    names = choose(keys)
    if not names:
        raise ValueError(
            f"{path} holds the arrays {', '.join(keys) or '(none)'}; name the examples x_train, "
            f"x_validation and x_test, or x"
        )
    of_labels = label_names(keys, names)
    used = (*names.values(), *of_labels.values())
    loaded = load_npz(path, used)
    arrays = {split: loaded[name] for split, name in names.items()}
    labels = {split: loaded[name] for split, name in of_labels.items()}
    ignored = [key for key in keys if key not in used]
    note = f"used {', '.join(used)} and ignored {', '.join(ignored)}"
    where = {split: f"{name} in {path}" for split, name in names.items()}
    found = found_arrays(path, arrays, where, (note,) if ignored else ())
    if not labels:
        return found
    real = any(values.dtype.kind == "f" for values in labels.values())
    return replace(found, labels={"y" if real else "class": labels})


def load_npy(path: Path) -> np.ndarray:
    """The array of a .npy file.

    Raises:
        ValueError: if it is damaged, holds Python objects, or is larger than free memory.
    """
    with _reading(path, npy.MAGIC_PREFIX) as stream:
        return _array(stream, _limits.regular(path))


def names_in(path: Path) -> list[str]:
    """The names of the arrays in a .npz file."""
    with _reading(path, b"PK") as stream, zipfile.ZipFile(stream) as archive:
        return list(_members(archive))


def load_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names in a .npz file; all where left out. Errors as for `load_npy`."""
    with _reading(path, b"PK") as stream, zipfile.ZipFile(stream) as archive:
        members = _members(archive)
        return {name: _member(archive, members[name]) for name in names or members}


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an archive by name; ValueError where two have the same one."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"two of its arrays have the name {name!r}")
        members[name] = info
    return members


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of which no more is allocated than its packed bytes can hold."""
    most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _limits.DEFLATED}.get(info.compress_type)
    if most is not None and info.file_size > most * (info.compress_size + 1):
        raise ValueError(f"{info.filename} claims {info.file_size} bytes in {info.compress_size}")
    with archive.open(info) as stream:
        try:
            return _array(stream, info.file_size)
        except ValueError as error:
            raise ValueError(f"{info.filename}: {error}") from None


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array in a stream of so many bytes, of which the header must not say more."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format {version} is for named fields, not for numbers")
    length = stream.read(2 * version[0])
    if int.from_bytes(length, "little") > _limits.ARRAY_HEADER:
        raise ValueError("its header is far too long")
    stream.seek(npy.MAGIC_LEN)
    read_header = npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
    shape, _, kind = read_header(stream)
    needed = math.prod(shape) * kind.itemsize
    if kind.hasobject:
        raise ValueError("Object arrays are not read, for they can hold code")
    if min(shape, default=0) < 0 or needed > size - stream.tell():
        raise ValueError(
            f"its header says {shape} of {kind}, {needed} bytes, and {size - stream.tell()} follow"
        )
    _limits.check_memory(needed, "it")
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


def choose(keys: Collection[str]) -> dict[str, str]:
    """Which array is which split, {} if no rule applies.

    >>> choose(["x_train", "y_train", "x_val"])
    {'train': 'x_train', 'validation': 'x_val'}
    >>> choose(["x", "y"])
    {'all': 'x'}

    Raises:
        ValueError: if two names mean the same split.
    """
    for prefix in PREFIXES:
        of_prefix = ((key.removeprefix(prefix), key) for key in keys if key.startswith(prefix))
        if splits := by_split(of_prefix):
            return splits
    if len(keys) == 1:
        return {"all": next(iter(keys))}
    only = [key for key in ("x", "X") if key in keys]
    return {"all": only[0]} if len(only) == 1 else {}


def label_names(keys: Collection[str], names: Mapping[str, str]) -> dict[str, str]:
    """Which array holds the labels of which split, {} unless all splits have one.

    >>> label_names(["x_train", "y_train"], {"train": "x_train"})
    {'train': 'y_train'}
    >>> label_names(["x", "labels"], {"all": "x"})
    {'all': 'labels'}
    """
    found: dict[str, str] = {}
    for split, name in names.items():
        ending = "" if split == "all" else f"_{name.removeprefix('x_').removeprefix('X_')}"
        for option in (word + ending for word in LABELS):
            if option in keys and option != name:
                found.setdefault(split, option)
    return found if len(found) == len(names) else {}


def layout(array: np.ndarray, label: str) -> tuple[np.ndarray, str | None]:
    """An array of any rank as (N, D) vectors or (N, C, H, W) images, and a note if it was moved.

    (N,) becomes (N, 1); (N, H, W) becomes grey images; of (N, ., ., .) the channels are last if
    that axis has 1, 3 or 4 entries, else first.

    Raises:
        ValueError: if no rule applies or there are no examples.
    """
    if array.size == 0:
        raise ValueError(f"{label} is empty: its shape is {array.shape}; give at least 1 example")
    if array.ndim <= 1:
        return array.reshape(-1, 1), None
    if array.ndim == 2:
        return array, None
    if array.ndim == 3:
        return array[:, None], None
    if array.ndim == 4 and array.shape[3] in (1, 3, 4):
        return np.moveaxis(array, 3, 1), f"{array.shape} read as images with channels last"
    if array.ndim == 4 and array.shape[1] in (1, 3, 4):
        return array, None
    raise ValueError(
        f"{label} has the shape {array.shape}; give vectors (N, D) or images (N, H, W), "
        f"(N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels"
    )


def found_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    where: Mapping[str, object],
    notes: tuple[str, ...] = (),
) -> Found:
    """Arrays as the parts of a source, laid out as examples; `where` each is, for messages.

    Raises:
        ValueError: if one is not of numeric examples.
    """
    moved: list[str] = []
    parts: dict[str, np.ndarray] = {}
    for split, array in arrays.items():
        place = str(where[split])
        parts[split], note = layout(_numeric(array, place), place)
        if note and note not in moved:
            moved.append(note)
    levels = 2 if all(x.dtype == bool for x in parts.values()) else None
    return Found(str(path), parts, levels, (*notes, *moved))


def _numeric(array: np.ndarray, label: str) -> np.ndarray:
    """Booleans and integers as they are, reals as finite float32 or float64."""
    if array.dtype.kind in "bui":
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"{label} has the type {array.dtype}; save it as integers or float64")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64, copy=False)
    wrong = ~np.isfinite(array)
    if wrong.any():
        index = tuple(int(i) for i in np.unravel_index(wrong.argmax(), array.shape))
        raise ValueError(
            f"{label} has {wrong.sum()} NaN or infinite values, the first at index {index}; "
            f"remove or fill them"
        )
    return array


@contextmanager
def _reading(path: Path, magic: bytes) -> Iterator[IO[bytes]]:
    """An open file, any failure to read which is one ValueError.

    Damage shows as a dozen types of exception from numpy, zipfile, zlib and lzma.
    """
    try:
        _limits.regular(path)
        with path.open("rb") as file:
            if file.read(len(magic)) != magic:
                raise ValueError(f"it does not begin as a {path.suffix} file does")
            file.seek(0)
            yield file
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as numbers: {reason}; write it with "
            f"numpy.{'save' if path.suffix.lower() == '.npy' else 'savez'}, without Python objects"
        ) from error
