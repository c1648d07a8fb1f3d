"""Convert arrays of a .npy or .npz file to examples of a schema, with all others beside, and back.

The arrays are restored: their names, order, types and numbers, including fields.
"""

import io
import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from nelbo._utils import limits
from nelbo.codec.coding.blocks import pack, storage, unpack
from nelbo.codec.errors import CorruptFileError
from nelbo.data.schema import Schema


def read(
    arrays: Mapping[str, np.ndarray], schema: Schema, source: str, kind: str
) -> tuple[Tensor, dict[str, object], bytes, int, tuple[str, ...]]:
    """Return the examples in arrays, a description that restores these, other bytes, size and
    notes.

    Raises:
        ValueError: no array holds examples of the schema, or one could not be restored.
    """
    if schema.levels is None:
        raise ValueError(f"the run models a table, and {source} holds arrays; give a table")
    whole, parts, extra, beyond = [], [], bytearray(), []
    levels = f"the run's schema holds 0..{schema.levels - 1}"
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"the array {name} of {source} holds Python objects; leave it out")
        order = _layout(array, schema)
        if order is not None and (wrong := _beyond(array, schema.levels)):
            order = None
            beyond.append(f"{name} of {source} holds the values {wrong}; {levels}")
        whole.append([name, npy.dtype_to_descr(array.dtype), list(array.shape), order])
        if order is None:
            extra += array.tobytes()
        elif array.size:
            parts.append(_to_examples(array, order, schema))
    if all(entry[3] is None for entry in whole):
        if beyond:
            raise ValueError(beyond[0])
        found = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items()) or "none"
        raise ValueError(
            f"{source} has no array of integers of shape (N, {', '.join(map(str, schema.shape))})"
            f" as the run needs; it has {found}"
        )
    x = np.concatenate(parts) if parts else np.zeros((0, *schema.shape), np.uint8)
    about: dict[str, object] = {"kind": kind, "arrays": whole}
    packed = pack(bytes(extra))
    _check(arrays, as_bytes(x, json.loads(json.dumps(about)), packed, None), source)
    size = sum(array.nbytes for array in arrays.values())
    notes = tuple(f"{each}: kept unchanged beside the examples" for each in beyond)
    return torch.from_numpy(x), about, packed, size, notes


def _check(arrays: Mapping[str, np.ndarray], made: bytes, source: str) -> None:
    """Raise ValueError if the restored file would differ from the arrays."""
    found = np.load(io.BytesIO(made), allow_pickle=False)
    again = {"x": found} if isinstance(found, np.ndarray) else dict(found)
    for name, array in arrays.items():
        other = again.get(name)
        if other is None or (array.dtype, array.shape) != (other.dtype, other.shape):
            raise ValueError(
                f"the array {name} of {source}, {array.dtype} {array.shape}, could not be restored"
                " exactly; save it in a file of its own"
            )
        if not _same(array, other):
            raise ValueError(
                f"the numbers of the array {name} of {source} could not be restored exactly; save"
                " it in a file of its own"
            )
    if list(again) != list(arrays):
        raise ValueError(f"the names of the arrays of {source} could not be restored; rename them")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether arrays of one type hold the same bits, ignoring gaps between fields."""
    if a.dtype.names:
        return all(_same(a[name], b[name]) for name in a.dtype.names)
    return a.tobytes() == b.tobytes()


def _layout(array: np.ndarray, schema: Schema) -> str | None:
    """Return how an array holds examples, or None.

    "same" is as in the schema, "flat" without the single channel or number, "last" with channels
    last.
    """
    shape = array.shape[1:]
    if array.dtype.kind not in "biu" or not array.ndim:
        return None
    if shape == schema.shape:
        return "same"
    if schema.shape[0] == 1 and shape == schema.shape[1:]:
        return "flat"
    if len(schema.shape) == 3 and shape == (*schema.shape[1:], schema.shape[0]):
        return "last"
    return None


def _beyond(array: np.ndarray, levels: int) -> str:
    """Return the range of an array if it exceeds the levels, else ""."""
    if not array.size:
        return ""
    low, high = int(array.min()), int(array.max())
    return f"{low}..{high}" if low < 0 or high >= levels else ""


def _to_examples(array: np.ndarray, order: str, schema: Schema) -> np.ndarray:
    if order == "last":
        array = np.moveaxis(array, -1, 1)
    assert schema.levels is not None
    return array.reshape(-1, *schema.shape).astype(storage(schema.levels))


def as_bytes(x: np.ndarray, about: dict, extra: bytes, places: np.ndarray | None) -> bytes:
    """Return the content of the file with examples x, or with those at `places` after a salvage.

    Raises:
        CorruptFileError: the header states types that no such file has.
    """
    whole = [(name, _dtype(descr), shape, order) for name, descr, shape, order in about["arrays"]]
    most = sum(math.prod(shape) * kind.itemsize for _, kind, shape, order in whole if not order)
    if any(kind.kind not in "biu" for _, kind, _, order in whole if order):
        raise CorruptFileError(
            "the levels of the model are integers, but the values in the file are not"
        )
    if any(kind.hasobject for _, kind, _, _ in whole):
        raise CorruptFileError("the file claims to hold Python objects")
    beside = "the data beside the examples"
    if most < 0:
        raise CorruptFileError(f"{beside} has a negative size")
    limits.check_unpacked(most, len(extra), beside, 3)
    rest = io.BytesIO(unpack(extra, most))
    at, arrays = 0, cast(dict[str, Any], {})
    for name, kind, shape, order in whole:
        if order is None:
            size = math.prod(shape) * kind.itemsize
            arrays[name] = np.frombuffer(rest.read(size), kind).reshape(shape)
            continue
        mine = slice(at, at + shape[0])
        if places is not None:
            shape = [int(((places >= at) & (places < at + shape[0])).sum()), *shape[1:]]
            mine = slice(*np.searchsorted(places, [at, mine.stop]))
        at += int(shape[0]) if places is None else mine.stop - mine.start
        part = np.moveaxis(x[mine], 1, -1) if order == "last" else x[mine]
        arrays[name] = np.ascontiguousarray(part.reshape(shape).astype(kind))
    file = io.BytesIO()
    if about["kind"] == "npy":
        np.save(file, arrays["x"], allow_pickle=False)
    else:
        _write_npz(file, arrays)
    return file.getvalue()


def _write_npz(file: io.BytesIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write like `numpy.savez_compressed`, which cannot write arrays with names such as `file`."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def _dtype(descr: object) -> np.dtype:
    """Return the type that `numpy.lib.format.dtype_to_descr` described, after JSON.

    JSON turns tuples into lists: fields are (name, description) or (name, description, shape), and
    a name may be a pair.
    """
    if isinstance(descr, str):
        found = np.dtype(descr)
    elif isinstance(descr, list):
        found = npy.descr_to_dtype(_fields(descr))
    else:
        raise CorruptFileError(f"the file holds numbers of the type {descr!r}")
    return found


def _fields(descr: list) -> list[tuple]:
    def name(value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    def kind(value: object) -> object:
        return _fields(value) if isinstance(value, list) else value

    return [(name(field[0]), kind(field[1]), *map(tuple, field[2:])) for field in descr]
