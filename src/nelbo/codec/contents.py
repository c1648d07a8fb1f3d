"""Data in files as examples of a schema, and back: names, order, types and sizes included.

Unlike `nelbo.data`, which makes examples for a model to learn from, nothing here may be resized,
rounded or left out. What the schema cannot hold is refused, or goes with the examples as it is.
"""

import io
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nelbo import _limits
from nelbo._files import check_writable, write
from nelbo.codec import pictures, tabular, texts
from nelbo.codec.blocks import pack, storage, unpack
from nelbo.codec.errors import CodecError, Damaged
from nelbo.data import Schema, load_like, tables
from nelbo.data.arrays import load_npy, load_npz
from nelbo.data.remote import here
from nelbo.data.sources import BUILT_IN
from nelbo.data.text import is_text

ARRAYS = (".npy", ".npz")


@dataclass(frozen=True)
class Contents:
    """Examples, and what makes them the data again.

    Args:
        x: (N, *shape), integers 0..levels-1.
        about: plain values for JSON; "kind" says which of the forms below.
        extra: what the model does not code.
        original: bytes of the data in memory: what a plain file of the numbers would take.
        notes: one sentence for each thing that is not restored to the byte.
    """

    x: Tensor
    about: Mapping[str, object]
    extra: bytes = b""
    original: int = 0
    notes: tuple[str, ...] = ()


def read(source: str, schema: Schema) -> Contents:
    """The data at `source` as examples of a schema.

    Args:
        source: a .npy, .npz, .png, .txt, .csv, .tsv, .parquet or .arrow file, a folder of .png or
            of .txt files, or the name of a built-in set.
        schema: of the run.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it is of no known type, empty, or the schema cannot hold it.
    """
    path = Path(here(source))
    if source in BUILT_IN:
        x = load_like(source, schema).splits["all"]
        return _arrays({"x": x.numpy()}, schema, source, "npz")
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        return _arrays(_load_arrays(path), schema, str(path), suffix[1:])
    if suffix in tables.FILES:
        return Contents(*tabular.read(path, schema))
    if is_text(path):
        return Contents(*texts.read(path, schema))
    if suffix == ".png" or path.is_dir():
        return Contents(*pictures.read(path, schema))
    raise ValueError(
        f"{path} is of no type that can be compressed; give a .npy, .npz, .png, .txt, .csv, .tsv,"
        " .parquet or .arrow file, or a folder of .png or .txt files"
    )


def check_output(about: Mapping[str, object], out: Path) -> None:
    """Raises ValueError or OSError where the data cannot be written to `out`."""
    kind = about.get("kind")
    folder = kind in ("images", "texts")
    if out.exists():
        raise FileExistsError(f"{out} exists; give another --out, or remove it")
    if folder and out.suffix:
        raise ValueError(f"the file holds a folder of {kind}; give --out a folder; got {out}")
    if not folder and out.suffix.lower() != f".{kind}":
        raise ValueError(f"the file holds a .{kind} file; --out must end in .{kind}; got {out}")
    check_writable(out)


def save(contents: Contents, schema: Schema, out: Path, kept: Tensor | None = None) -> None:
    """Write the data; of `kept` places only, (n,), after a salvage.

    Raises:
        Damaged: the contents contradict themselves.
        OSError: naming the file that cannot be written.
    """
    check_output(contents.about, out)
    try:
        made = _files(contents, schema, out, kept)
    except CodecError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise Damaged(f"the contents of the file contradict themselves: {error!r}") from None
    if [path for path, _ in made] == [out]:
        write(out, made[0][1])
    else:
        _write_folder(made, out)


def _write_folder(made: list[tuple[Path, bytes]], out: Path) -> None:
    """All files or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        for path, content in made:
            write(whole / path.relative_to(out), content)
        whole.rename(out)


def _files(
    contents: Contents, schema: Schema, out: Path, kept: Tensor | None
) -> list[tuple[Path, bytes]]:
    kind, x, about = contents.about["kind"], contents.x.numpy(), dict(contents.about)
    places = None if kept is None else kept.numpy()
    if kind in ("npy", "npz"):
        return [(out, _arrays_as_bytes(x, about, contents.extra, places))]
    if kind in ("png", "images"):
        return pictures.files(x, about, out, places)
    if kind in ("txt", "texts"):
        return texts.files(x, about, contents.extra, schema, out, places)
    if f".{kind}" in tables.FILES:
        return [(out, tabular.as_bytes(x, about, schema))]
    raise Damaged(f"the file holds data of an unknown kind, {kind!r}")


# ---- arrays


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    return load_npz(path) if path.suffix.lower() == ".npz" else {"x": load_npy(path)}


def _arrays(arrays: dict[str, np.ndarray], schema: Schema, source: str, kind: str) -> Contents:
    """Arrays of examples by the model, all others beside it."""
    if schema.levels is None:
        raise ValueError(f"the run is of a table; {source} holds arrays")
    whole, parts, extra = [], [], bytearray()
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"the array {name} of {source} holds Python objects; leave it out")
        order = _layout(array.shape[1:], schema) if array.dtype.kind in "biu" else None
        whole.append([name, array.dtype.str, list(array.shape), order])
        if order is None:
            extra += array.tobytes()
        elif array.size:
            _check_levels(array, schema.levels, f"{name} of {source}")
            parts.append(_to_examples(array, order, schema))
    if all(entry[3] is None for entry in whole):
        found = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items()) or "none"
        raise ValueError(
            f"{source} has no array of integers of shape (N, {', '.join(map(str, schema.shape))})"
            f" as the run needs; it has {found}"
        )
    x = np.concatenate(parts) if parts else np.zeros((0, *schema.shape), np.uint8)
    about = {"kind": kind, "arrays": whole}
    size = sum(array.nbytes for array in arrays.values())
    return Contents(torch.from_numpy(x), about, pack(bytes(extra)), size)


def _layout(shape: tuple[int, ...], schema: Schema) -> str | None:
    """How an array of examples of this shape holds them: as the schema, without its one channel,
    or with the channels last."""
    if shape == schema.shape:
        return "same"
    if len(schema.shape) != 3:
        return None
    channels, *sides = schema.shape
    if channels == 1 and shape == tuple(sides):
        return "flat"
    return "last" if shape == (*sides, channels) else None


def _check_levels(array: np.ndarray, levels: int, label: str) -> None:
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= levels:
        raise ValueError(
            f"{label} holds the values {low}..{high}; the run's schema holds 0..{levels - 1}"
        )


def _to_examples(array: np.ndarray, order: str, schema: Schema) -> np.ndarray:
    if order == "last":
        array = np.moveaxis(array, -1, 1)
    assert schema.levels is not None
    return array.reshape(-1, *schema.shape).astype(storage(schema.levels))


def _arrays_as_bytes(x: np.ndarray, about: dict, extra: bytes, places: np.ndarray | None) -> bytes:
    most = sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for _, dtype, shape, order in about["arrays"]
        if order is None
    )
    if any(np.dtype(dtype).kind not in "biu" for _, dtype, _, order in about["arrays"] if order):
        raise Damaged("the levels of the model are integers, and the file says others")
    _limits.check_memory(most, "what the file holds beside the examples")
    rest = io.BytesIO(unpack(extra, most))
    at, arrays = 0, cast(dict[str, Any], {})
    for name, dtype, shape, order in about["arrays"]:
        if order is None:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = np.frombuffer(rest.read(size), dtype).reshape(shape)
            continue
        mine = slice(at, at + shape[0])
        if places is not None:
            shape = [int(((places >= at) & (places < at + shape[0])).sum()), *shape[1:]]
            mine = slice(*np.searchsorted(places, [at, mine.stop]))
        at += int(shape[0]) if places is None else mine.stop - mine.start
        part = np.moveaxis(x[mine], 1, -1) if order == "last" else x[mine]
        arrays[name] = np.ascontiguousarray(part.reshape(shape).astype(dtype))
    file = io.BytesIO()
    if about["kind"] == "npy":
        np.save(file, arrays["x"], allow_pickle=False)
    else:
        np.savez_compressed(file, **arrays)
    return file.getvalue()
