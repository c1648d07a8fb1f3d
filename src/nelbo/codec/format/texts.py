"""Text as chunks of the symbols of a run, and back to the byte.

The files of a folder follow each other; the last chunk is filled up. Characters that the alphabet
lacks have a symbol of their own, and which they are goes with the chunks as it is.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo.codec.coding.blocks import pack, unpack
from nelbo.codec.errors import CorruptFileError
from nelbo.codec.format.pictures import files_of, inside
from nelbo.data import Schema
from nelbo.data.readers.text import encode


def read(path: Path, schema: Schema) -> tuple[Tensor, dict[str, object], bytes, int]:
    """The chunks of a text or of all in a folder, what restores them, and their bytes.

    Raises:
        ValueError: not UTF-8, empty, or the run is of no text.
    """
    if schema.alphabet is None:
        raise ValueError(f"{path} is text; the run is of examples of shape {schema.shape}")
    found = files_of(path)
    contents = [file.read_bytes() for file in found]
    codes, others, known = [], "", set(schema.alphabet)
    for file, content in zip(found, contents, strict=True):
        text = content if not schema.alphabet else _decode(content, file)
        codes.append(encode(text, schema.alphabet))
        if isinstance(text, str):
            others += "".join(c for c in text if c not in known)
    symbols = np.concatenate(codes)
    chunks = np.pad(symbols, (0, -len(symbols) % schema.shape[0])).reshape(-1, *schema.shape)
    about: dict[str, object] = {
        "kind": "txt" if path.is_file() else "texts",
        "names": [f.relative_to(path).as_posix() for f in found if f != path],
        "sizes": [len(code) for code in codes],
    }
    extra = pack(others.encode())
    return torch.from_numpy(chunks.copy()), about, extra, sum(map(len, contents))


def files(
    x: np.ndarray,
    about: dict,
    extra: bytes,
    schema: Schema,
    out: Path,
    places: np.ndarray | None,
) -> list[tuple[Path, bytes]]:
    """The texts of the chunks x; without those of a salvage that were lost."""
    names = [out] if about["kind"] == "txt" else [inside(out, name) for name in about["names"]]
    ends, length = np.cumsum(about["sizes"]), schema.shape[0]
    places = np.arange(len(x)) if places is None else places
    at = (places[:, None] * length + np.arange(length)).ravel()
    whole = len(x) * length >= ends[-1]
    symbols = x.ravel()
    # a character has at most 4 bytes
    others = iter(unpack(extra, 4 * len(symbols)).decode() if extra and whole else "")
    made = []
    for name, first, last in zip(names, [0, *ends[:-1]], ends, strict=True):
        mine = symbols[(at >= first) & (at < last)]
        if not schema.alphabet:
            made.append((name, mine.astype(np.uint8).tobytes()))
            continue
        unknown = len(schema.alphabet)
        text = "".join(
            schema.alphabet[k] if k < unknown else next(others, "\ufffd") for k in mine.tolist()
        )
        made.append((name, text.encode()))
    if next(others, None) is not None:
        raise CorruptFileError("the text has fewer unknown characters than the file says")
    return made


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte {content[error.start]:#04x} at {error.start}; save it as"
            " UTF-8, or train on bytes with --levels 256"
        ) from None
