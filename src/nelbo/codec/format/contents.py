"""Read data in files as examples of a schema, and restore them: names, order, types and sizes.

Unlike `nelbo.data`, which reads examples for a model to learn from, nothing here may be resized,
rounded or left out. Data that the schema cannot hold are refused, or stored unchanged beside the
examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from nelbo._utils.files import check_writable, folder_part_of, write
from nelbo._utils.text import shortened
from nelbo.codec.errors import CodecError, CorruptFileError
from nelbo.codec.format import arrays, pictures, tabular, texts
from nelbo.codec.format.arrays import as_bytes as _arrays_as_bytes
from nelbo.data.readers.arrays import load_npy, load_npz
from nelbo.data.readers.text import is_text
from nelbo.data.remote import here
from nelbo.data.schema import Schema
from nelbo.data.sources import BUILT_IN, load_like
from nelbo.data.tabular import tables

ARRAYS = (".npy", ".npz")
GIVE = (
    "give a .npy, .npz, .png, .txt, .csv, .tsv, .parquet or .arrow file, or a folder of .png or"
    " .txt files"
)


@dataclass(frozen=True)
class Contents:
    """Examples, and everything that restores the data from them.

    Args:
        x: (N, *shape), integers 0..levels-1.
        about: plain values for JSON; "kind" selects one of the forms below.
        extra: data that the model does not code.
        original: bytes of the data in memory, or of a plain file of the numbers.
        notes: one sentence for each property that is not restored to the byte.
    """

    x: Tensor
    about: Mapping[str, object]
    extra: bytes = b""
    original: int = 0
    notes: tuple[str, ...] = ()


def read(source: str, schema: Schema) -> Contents:
    """Read the data at `source` as examples of a schema.

    Args:
        source: a .npy, .npz, .png, .txt, .csv, .tsv, .parquet or .arrow file, a folder of .png or
            of .txt files, or the name of a built-in set.
        schema: schema of the run.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: its type is unknown, it is empty, or the schema cannot hold it.
    """
    path = Path(here(source))
    if source in BUILT_IN:
        x = load_like(source, schema).splits["all"]
        return Contents(*arrays.read({"x": x.numpy()}, schema, source, "npz"))
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}; {GIVE}")
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        return Contents(*arrays.read(_load_arrays(path), schema, str(path), suffix[1:]))
    if suffix in tables.FILES:
        return Contents(*tabular.read(path, schema))
    if is_text(path):
        found = Contents(*texts.read(path, schema))
        for file, content in texts.files(
            found.x.numpy(), dict(found.about), found.extra, schema, path, None
        ):
            if file.read_bytes() != content:
                raise ValueError(
                    f"{file} could not be restored byte for byte, so it was not compressed"
                )
        return found
    if suffix == ".png" or path.is_dir():
        return Contents(*pictures.read(path, schema))
    raise ValueError(f"{path} cannot be compressed; {GIVE}")


def numbers(about: Mapping[str, object], coded: int) -> int:
    """Return the number of numbers in the data, of `coded` ones: a text is filled up."""
    if about.get("kind") not in ("txt", "texts"):
        return coded
    sizes = cast(Sequence[int], about.get("sizes", ()))
    return sum(sizes) or coded


def check_output(about: Mapping[str, object], out: Path) -> None:
    """Raise ValueError or OSError if the data cannot be written to `out`."""
    kind = about.get("kind")
    folder = kind in ("images", "texts")
    if out.exists():
        raise FileExistsError(f"{out} exists; give another --out, or remove it")
    if folder and out.suffix:
        raise ValueError(f"the file holds a folder of {kind}; --out must be a folder; got {out}")
    if not folder and out.suffix.lower() != f".{kind}":
        raise ValueError(f"the file holds a .{kind} file; --out must end in .{kind}; got {out}")
    check_writable(out)


def save(contents: Contents, schema: Schema, out: Path, kept: Tensor | None = None) -> None:
    """Write the data, or after a salvage only those at the indices `kept`, (n,).

    Raises:
        CorruptFileError: the contents contradict themselves.
        OSError: a file cannot be written; the error names it.
    """
    check_output(contents.about, out)
    try:
        made = _files(contents, schema, out, kept)
    except (CodecError, MemoryError):
        raise
    except Exception as error:  # a false header may raise anything: struct.error of a name, ..
        raise CorruptFileError(
            f"the contents of the file contradict themselves: {shortened(repr(error))}"
        ) from None
    if [path for path, _ in made] == [out]:
        write(out, made[0][1])
    else:
        _write_folder(made, out)


def _write_folder(made: list[tuple[Path, bytes]], out: Path) -> None:
    """Write all files or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with folder_part_of(out) as temporary:
        whole = temporary / "whole"
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
        return [(out, tabular.as_bytes(x, about, contents.extra, schema, places))]
    raise CorruptFileError(f"the file holds data of an unknown kind, {kind!r}")


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    return load_npz(path) if path.suffix.lower() == ".npz" else {"x": load_npy(path)}
