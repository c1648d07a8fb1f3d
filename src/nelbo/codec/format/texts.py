"""Convert text to chunks of the symbols of a run, and back to the byte.

The files of a folder are concatenated; the last chunk is padded. Characters that the alphabet
lacks share one symbol, and are stored beside the chunks.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo.codec.coding.blocks import pack, unpack
from nelbo.codec.errors import CorruptFileError
from nelbo.codec.format.pictures import files_of, inside
from nelbo.data.readers.text import encode
from nelbo.data.schema import Schema


def read(path: Path, schema: Schema) -> tuple[Tensor, dict[str, object], bytes, int]:
    """Return the chunks of a text or a folder, a description that restores them, and their size.

    Raises:
        ValueError: a text is empty or not UTF-8, or the run is not of text.
    """
    if not schema.text:
        raise ValueError(
            f"{path} is text, but the run models examples of shape {schema.shape}; give data of"
            " that shape"
        )
    found = files_of(path)
    contents = [file.read_bytes() for file in found]
    alphabet = schema.alphabet or ""
    codes, others, known = [], "", set(alphabet)
    for file, content in zip(found, contents, strict=True):
        if schema.tokenizer is not None:
            codes.append(schema.tokenizer.encode(_decode(content, file), str(file)))
            continue
        text = content if not alphabet else _decode(content, file)
        codes.append(encode(text, alphabet))
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
    """Return the texts of the chunks x; after a salvage, without the lost parts."""
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
        if schema.tokenizer is not None:
            made.append((name, schema.tokenizer.decode(mine.tolist()).encode()))
            continue
        if not schema.alphabet:
            made.append((name, mine.astype(np.uint8).tobytes()))
            continue
        unknown = len(schema.alphabet)
        text = "".join(
            schema.alphabet[k] if k < unknown else next(others, "\ufffd") for k in mine.tolist()
        )
        made.append((name, text.encode()))
    if next(others, None) is not None:
        raise CorruptFileError("the text has fewer unknown characters than the file states")
    return made


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte {content[error.start]:#04x} at {error.start}; save it as"
            " UTF-8, or train on bytes with --levels 256"
        ) from None
