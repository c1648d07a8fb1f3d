"""Read NumPy files: .npy holds one array, .npz several named ones."""

import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy

from nelbo._utils import limits
from nelbo.data.found import Found, Reader, is_file, pieces
from nelbo.data.splits import (
    MEANING,
    Declared,
    group,
    one_each,
    refuse_unclear,
    split_of,
    words_of,
)

if TYPE_CHECKING:
    from nelbo.data.readers.encoded import Form

#: copies of arrays in memory while they are checked and split
COPIES = 3
CHANNELS = (1, 3, 4)  # of an image
#: names of arrays of examples, apart from the word of a split; the likeliest first
EXAMPLES = ("x", "images", "image", "data", "inputs", "features", "samples", "examples")
#: names of arrays of labels
LABELS = ("y", "labels", "label", "targets", "target", "classes", "class")


def read_npy(path: Path, form: "Form", splits: Declared | None = None) -> Found:
    """Read the array of a .npy file, as examples of the shape of `form` if it has one.

    Raises:
        ValueError: the file is damaged or its array does not hold numeric examples.
    """
    return found_arrays(path, {"all": load_npy(path)}, {"all": str(path)}, shape=form.shape)


def read_npz(path: Path, form: "Form", splits: Declared | None = None) -> Found:
    """Read the examples of a .npz file: x_train, x_validation, x_test; train, ..; x; or the only
    one.

    Arrays y_train, train_labels, ..; y or labels are their labels: integers and strings are
    classes, named class, and reals are numbers, named y. See `splits` for the names of splits.

    Raises:
        ValueError: the file is damaged, has none of these names, or an array does not hold numeric
            examples.
    """
    return found_named(path, names_in(path), partial(load_npz, path), splits, form.shape)


NPY = Reader(is_file(".npy"), read_npy)
NPZ = Reader(is_file(".npz"), read_npz, parts=True)


def found_named(
    source: object,
    keys: Collection[str],
    load: Callable[[Collection[str]], Mapping[str, np.ndarray]],
    splits: Declared | None = None,
    shape: tuple[int, ...] | None = None,
) -> Found:
    """Return named arrays as the parts of a source; see `read_npz`.

    Args:
        source: for messages.
        keys: names of the arrays.
        load: returns the arrays of some names.
        splits: as declared.
        shape: of one example, if it is known.

    Raises:
        ValueError: as for `read_npz`.
    """
    names, of_labels, guessed = choose(keys, source, splits)
    if not names:
        raise ValueError(
            f"{source} holds the arrays {', '.join(keys) or '(none)'}; name the examples x_train, "
            f"x_validation and x_test, or x"
        )
    used = (*names.values(), *of_labels.values())
    loaded = load(used)
    arrays = {split: loaded[name] for split, name in names.items()}
    labels = {split: loaded[name] for split, name in of_labels.items()}
    ignored = [key for key in keys if key not in used]
    note = f"used {', '.join(used)} and ignored {', '.join(ignored)}"
    where = {split: f"{name} in {source}" for split, name in names.items()}
    notes = (*guessed, *([note] if ignored else []))
    found = found_arrays(source, arrays, where, notes, shape)
    if not labels:
        return found
    real = any(values.dtype.kind == "f" for values in labels.values())
    return replace(found, labels={"y" if real else "class": labels})


def load_npy(path: Path) -> np.ndarray:
    """Load the array of a .npy file.

    Raises:
        ValueError: it is damaged, holds Python objects, or is larger than free memory.
    """
    with _reading(path, npy.MAGIC_PREFIX) as stream:
        return _array(stream, limits.regular(path))


def names_in(path: Path) -> list[str]:
    """Return the names of the arrays in a .npz file."""
    with _reading(path, b"PK") as stream, zipfile.ZipFile(stream) as archive:
        return list(_members(archive))


def load_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Load the named arrays of a .npz file, by default all. Errors as for `load_npy`."""
    with _reading(path, b"PK") as stream, zipfile.ZipFile(stream) as archive:
        members = _members(archive)
        wanted = {name: members[name] for name in names or members}
        whole = sum(map(_check_claim, wanted.values()))
        limits.check_unpacked(whole, limits.regular(path), "it", COPIES)
        return {name: _member(archive, info) for name, info in wanted.items()}


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the arrays of an archive by name; raise ValueError if two have the same name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"two of its arrays have the name {name!r}")
        members[name] = info
    return members


def _check_claim(info: zipfile.ZipInfo) -> int:
    """Return the bytes of an array; raise ValueError if its packed bytes cannot hold as many."""
    known = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: limits.DEFLATED}
    most = known.get(info.compress_type)
    if most is not None and info.file_size > most * (info.compress_size + 1):
        raise ValueError(f"{info.filename} claims {info.file_size} bytes in {info.compress_size}")
    return info.file_size


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Read an array, allocating no more than is packed."""
    with archive.open(info) as stream:
        try:
            return _array(stream, info.file_size)
        except ValueError as error:
            raise ValueError(f"{info.filename}: {error}") from None


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """Read the array in a stream of `size` bytes, which its header must not exceed."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format {version} is for named fields, not for numbers")
    length = stream.read(2 * version[0])
    if int.from_bytes(length, "little") > limits.ARRAY_HEADER:
        raise ValueError("its header is far too long")
    stream.seek(npy.MAGIC_LEN)
    read_header = npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
    shape, _, kind = read_header(stream)
    needed = math.prod(shape) * kind.itemsize
    if kind.hasobject:
        raise ValueError("arrays of objects are not read, because they can hold code")
    if min(shape, default=0) < 0 or needed > size - stream.tell():
        raise ValueError(
            f"its header says {shape} of {kind}, {needed} bytes, and {size - stream.tell()} follow"
        )
    limits.check_memory(COPIES * needed, "it")
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


def choose(
    keys: Collection[str], source: object = "", declared: Declared | None = None
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return the array of each split, that of its labels, and notes.

    The first is {} if no rule applies; the second is {} unless all splits have labels.

    >>> choose(["x_train", "y_train", "x_val"])[:2]
    ({'train': 'x_train', 'validation': 'x_val'}, {})
    >>> choose(["trainImages", "test_images", "train_labels", "ids"])[0]
    {'train': 'trainImages', 'test': 'test_images'}
    >>> choose(["X", "target"])[:2]
    ({'all': 'X'}, {'all': 'target'})

    Raises:
        ValueError: two names mean the same split, or the split of one is unclear.
    """
    of_labels = [key for key in keys if set(_stem(key)) & set(LABELS)]
    others = [key for key in keys if key not in of_labels]
    notes: list[str] = []
    if declared:
        names = one_each(group(list(keys), source, declared, BESIDE), list(keys), source)
    else:
        for key in others:
            refuse_unclear(key, source)
        names, notes = _by_stem(others, source, declared)
    labels = {}
    for split, name in names.items():
        own = None if split == "all" else split_of(name)
        mine = [key for key in of_labels if key != name and split_of(key) == own]
        ranked = sorted(mine, key=lambda key: (len(_stem(key)), LABELS.index(_word(key))))
        if ranked:
            labels[split] = ranked[0]
    return names, labels if len(labels) == len(names) else {}, notes


BESIDE = "arrays beside the splits"


def _stem(key: str) -> tuple[str, ...]:
    """Return the words of a key without those of its split."""
    return tuple(word for word in words_of(key) if word not in MEANING)


def _word(key: str) -> str:
    return next(word for word in _stem(key) if word in LABELS)


def _by_stem(
    keys: Collection[str], source: object, declared: Declared | None
) -> tuple[dict[str, str], list[str]]:
    """Return the array of each split, from the likeliest name of examples, and notes."""
    stems: list[tuple[str, ...]] = [*((word,) for word in EXAMPLES), ()]
    own = {_stem(key) for key in keys} - set(stems)
    stems += own if len(own) == 1 else []
    alike = [[key for key in keys if _stem(key) == stem] for stem in stems]
    for some in sorted(alike, key=lambda some: not any(map(split_of, some))):
        groups = group(some, source, declared, BESIDE)
        if len(some) == 1 or (some and "all" not in groups.parts):
            return one_each(groups, some, source), groups.notes
    return {}, []


def layout(array: np.ndarray, label: str) -> tuple[np.ndarray, str | None]:
    """Arrange an array of any rank as (N, D) vectors or (N, C, H, W) images; note if it was moved.

    (N,) becomes (N, 1); (N, H, W) becomes grey images; in (N, ., ., .) the channels are the axis
    of 1, 3 or 4 entries, first or last; if both qualify, the one that leaves the wider image.

    Raises:
        ValueError: no rule applies or there are no examples.
    """
    _refuse_empty(array, label)
    if array.ndim <= 1:
        return array.reshape(-1, 1), None
    if array.ndim == 2:
        return array, None
    if array.ndim == 3:
        return array[:, None], None
    first, last = (array.ndim == 4 and array.shape[k] in CHANNELS for k in (1, -1))
    if first and last:  # take the channels that leave the less narrow image
        sides = sorted(array.shape[2:]), sorted(array.shape[1:3])
        first = sides[0] > sides[1]
        where = "first" if first else "last"
        note = f"{array.shape} read as images with channels {where}, which is ambiguous"
        return (array if first else np.moveaxis(array, 3, 1)), note
    if last:
        return np.moveaxis(array, 3, 1), f"{array.shape} read as images with channels last"
    if first:
        return array, None
    raise ValueError(
        f"{label} has the shape {array.shape}; give vectors (N, D) or images (N, H, W), "
        f"(N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels"
    )


def layout_like(
    array: np.ndarray, label: str, shape: tuple[int, ...]
) -> tuple[np.ndarray, str | None]:
    """Arrange an array as examples of a known shape, (N, *shape); note if it was turned.

    A single channel or number may be left out, and channels may come last where these are the
    model's.

    Raises:
        ValueError: it is empty, or its examples have another shape.
    """
    array = np.atleast_1d(array)
    _refuse_empty(array, label)
    own = array.shape[1:]
    if own == shape:
        return array, None
    if shape[0] == 1 and own == shape[1:]:
        return array[:, None], None
    if len(shape) == 3 and own == (*shape[1:], shape[0]):
        return np.moveaxis(array, 3, 1), f"{array.shape} read as images with channels last"
    fix = "give data of that shape"
    if array.shape in (shape, (*shape[1:], shape[0]), shape[1:] if shape[0] == 1 else shape):
        fix = "this is one example, so give x[None]"
    elif own == (math.prod(shape),):
        fix = f"if its numbers are in that order, give x.reshape(-1, {', '.join(map(str, shape))})"
    elif not own:
        raise ValueError(
            f"{label} is a list of {len(array)} numbers where examples of shape {shape} are"
            f" needed; give an array (N, {', '.join(map(str, shape))})"
        )
    raise ValueError(
        f"the examples of {label} have the shape {own} where {shape} is needed; {fix}"
    )


def _refuse_empty(array: np.ndarray, label: str) -> None:
    if array.size == 0:
        raise ValueError(f"{label} is empty: its shape is {array.shape}; give at least 1 example")


def found_arrays(
    path: object,
    arrays: Mapping[str, np.ndarray],
    where: Mapping[str, object],
    notes: tuple[str, ...] = (),
    shape: tuple[int, ...] | None = None,
) -> Found:
    """Return arrays as the parts of a source, laid out as examples; `where` names each in
    messages, and `shape` is that of one example where it is known.

    Raises:
        ValueError: an array does not hold numeric examples.
    """
    moved: list[str] = []
    parts: dict[str, np.ndarray] = {}
    for split, array in arrays.items():
        place = str(where[split])
        number = _numeric(array, place)
        parts[split], note = (
            layout(number, place) if shape is None else layout_like(number, place, shape)
        )
        if note and note not in moved:
            moved.append(note)
    levels = 2 if all(x.dtype == bool for x in parts.values()) else None
    return Found(str(path), parts, levels, (*notes, *moved))


def _numeric(array: np.ndarray, label: str) -> np.ndarray:
    """Return booleans and integers as they are, reals as finite float32 or float64."""
    if array.dtype.kind in "bui":
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"{label} has the type {array.dtype}; save it as integers or float64")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64, copy=False)
    if not all(np.isfinite(piece).all() for piece in pieces(array)):
        wrong = ~np.isfinite(array)
        index = tuple(int(i) for i in np.unravel_index(wrong.argmax(), array.shape))
        raise ValueError(
            f"{label} has {wrong.sum()} NaN or infinite values, the first at index {index}; "
            f"remove or fill them"
        )
    return array


@contextmanager
def _reading(path: Path, magic: bytes) -> Iterator[IO[bytes]]:
    """Open a file and turn any failure to read it into one ValueError.

    Damage causes a dozen types of exceptions in numpy, zipfile, zlib and lzma.
    """
    try:
        limits.regular(path)
        with path.open("rb") as file:
            if file.read(len(magic)) != magic:
                raise ValueError(f"it does not begin like a {path.suffix} file")
            file.seek(0)
            yield file
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as numbers: {reason}; write it with "
            f"numpy.{'save' if path.suffix.lower() == '.npy' else 'savez'}, without Python objects"
        ) from error
