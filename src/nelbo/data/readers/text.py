"""Read text as chunks of symbols: its characters, or its bytes.

The alphabet is that of the training split, sorted, with one more symbol for any other character. A
text of bytes has 256 symbols and no alphabet. Splits are contiguous, so that no chunk is in two of
them. Chunks for evaluation follow each other; those for training overlap and begin at random,
because a chunk may begin anywhere. The last chunk for evaluation may be shorter: it is filled up
with a code that says so, `Schema.absent`, so that a text is measured whole.
"""

from pathlib import Path
from typing import AnyStr

import numpy as np

from nelbo._utils import limits
from nelbo.data.found import Found
from nelbo.data.readers.walk import files_below, walk
from nelbo.data.schema import Schema
from nelbo.data.splits import SALT, SPLITS, Declared, group
from nelbo.data.tokenizer import Tokenizer, make

SUFFIX = ".txt"
#: bytes of memory per byte of the file: characters of 4, their codes, overlapping chunks
TAKEN = 18
#: the same for tokens, most of it of the library while it encodes; 171 were measured
TAKEN_BY_TOKENS = 200
LENGTH = 128  # symbols of a chunk
CHARACTERS = 254  # maximal alphabet of a text read as characters: 256 levels are bytes
OVERLAP, WINDOWS = 16, 2**26  # training chunks per length of a chunk; maximal symbols in all
OTHER = "\ufffd"  # replaces characters that are not in the alphabet


def is_text(path: Path) -> bool:
    """Return whether a path is a .txt file, or a folder with no others except hidden files."""
    if path.is_file():
        return path.suffix.lower() == SUFFIX
    some = False
    for file in files_below(path):  # stop at the first other file
        some = file.suffix.lower() == SUFFIX
        if not some:
            return False
    return some


def read(
    path: Path,
    length: int | None = None,
    levels: int | None = None,
    splits: Declared | None = None,
    seed: int = 0,
    tokenizer: str | Tokenizer | None = None,
) -> Found:
    """Read a text to train on; a missing split is a tenth of the training text, off its end.

    Args:
        path: a .txt file in UTF-8; or a folder of them, in which the names of files or sub-folders
            determine the splits, see `splits`.
        length: symbols of a chunk; by default 128.
        levels: 256 for bytes; by default characters, unless there are too many.
        splits: as declared.
        seed: determines where training chunks begin.
        tokenizer: read tokens; a tokenizer, or what `tokenizer.make` takes.

    Raises:
        ValueError: an empty or short text, one that is not UTF-8, another number of levels.
    """
    taken = TAKEN if tokenizer is None else TAKEN_BY_TOKENS
    return of_bytes(path, *_bytes_of(path, splits, taken), length, levels, seed, tokenizer)


def of_bytes(
    path: Path | str,
    parts: dict[str, bytes],
    notes: list[str],
    length: int | None = None,
    levels: int | None = None,
    seed: int = 0,
    tokenizer: str | Tokenizer | None = None,
) -> Found:
    """Do the same for the content of each split, or of "all"; `path` is for messages."""
    _refuse_empty(path, parts)
    tokens = tokenizer is not None
    if tokens and levels is not None and not isinstance(tokenizer, Tokenizer):
        raise ValueError("the tokenizer has its own number of levels; leave --levels out")
    texts = (
        {}
        if levels == 256 and not tokens
        else {k: _decode(x, path, True) for k, x in parts.items()}
    )
    if missing := [split for split in ("validation", "test") if split not in parts]:
        parts = _split(parts, missing, path)
        texts = _split(texts, missing, path) if texts else {}
        notes.append(f"{' and '.join(missing)}: a tenth each, from the end of the training text")
    if tokenizer is not None:
        if isinstance(tokenizer, str):
            tokenizer = make(tokenizer, texts["train"])
        codes = _tokens(path, texts, tokenizer)
        return _chunks(path, codes, length or LENGTH, tokenizer, notes, seed)
    alphabet = "".join(sorted(set(texts.get("train", ""))))
    if texts and len(alphabet) > CHARACTERS:
        texts, alphabet = {}, ""
        notes.append(f"more than {CHARACTERS} different characters: read as bytes")
    count = len(alphabet) + 1 if texts else 256
    if levels not in (None, count):
        raise ValueError(
            f"{path} has {count - 1} different characters, and one level stands for any other:"
            f" {count} levels; got {levels}; leave --levels out, or give 256 for bytes"
        )
    codes = {part: encode(texts.get(part, x), alphabet) for part, x in parts.items()}
    if codes["train"].min() == codes["train"].max():
        raise ValueError(f"all symbols of {path} are the same, so there is nothing to learn")
    return _chunks(path, codes, length or LENGTH, alphabet, notes, seed)


def read_like(path: Path, schema: Schema, splits: Declared | None = None) -> Found:
    """Read a text to evaluate a model of some schema on; see `read`.

    Raises:
        ValueError: as for `read`, or the model is not of text.
    """
    taken = TAKEN if schema.tokenizer is None else TAKEN_BY_TOKENS
    return of_bytes_like(path, *_bytes_of(path, splits, taken), schema)


def of_bytes_like(
    path: Path | str, parts: dict[str, bytes], notes: list[str], schema: Schema
) -> Found:
    """Do the same for the content of each split, or of "all"; `path` is for messages."""
    if not schema.text:
        raise ValueError(
            f"{path} is text, but the model is not one of text; give data of the kind that it"
            " was trained on"
        )
    _refuse_empty(path, parts)
    if schema.tokenizer is not None:
        codes = _tokens(
            path, {k: _decode(x, path, False) for k, x in parts.items()}, schema.tokenizer
        )
        return _chunks(path, codes, schema.shape[0], schema.tokenizer, notes)
    alphabet = schema.alphabet or ""
    texts = {k: _decode(x, path, False) if alphabet else x for k, x in parts.items()}
    codes = {part: encode(text, alphabet) for part, text in texts.items()}
    return _chunks(path, codes, schema.shape[0], alphabet, notes)


def _tokens(
    path: Path | str, texts: dict[str, str], tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    return {part: tokenizer.encode(x, _label(path, part)) for part, x in texts.items()}


def encode(text: str | bytes, alphabet: str) -> np.ndarray:
    """Return characters as indices in the sorted alphabet, others as its length; bytes unchanged.

    >>> encode("abxa", "ab")
    array([0, 1, 2, 0], dtype=uint8)
    >>> encode(b"ab", "")
    array([97, 98], dtype=uint8)
    """
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8)
    points, known = (np.frombuffer(s.encode("utf-32-le"), np.uint32) for s in (text, alphabet))
    place = np.searchsorted(known, points).clip(max=len(known) - 1)
    return np.where(known[place] == points, place, len(known)).astype(np.uint8)


def decode(x: np.ndarray, symbols: str | Tokenizer) -> list[str]:
    r"""Return chunks (N, L) of symbols as N strings, some shorter; invalid characters are \ufffd.

    Args:
        x: the chunks.
        symbols: their alphabet, "" for bytes; or their tokenizer.

    >>> decode(np.array([[0, 1, 2]]), "ab") == ["ab\ufffd"]
    True
    """
    texts = [chunk[chunk < levels_of(symbols)].tolist() for chunk in x]
    if isinstance(symbols, Tokenizer):
        return [symbols.decode(text) for text in texts]
    if not symbols:
        return [bytes(text).decode("utf-8", errors="replace") for text in texts]
    return ["".join((symbols + OTHER)[k] for k in text) for text in texts]


def levels_of(symbols: str | Tokenizer) -> int:
    """Return the number of symbols of an alphabet, "" for bytes, or of a tokenizer."""
    if isinstance(symbols, Tokenizer):
        return symbols.count
    return len(symbols) + 1 if symbols else 256


def _bytes_of(
    path: Path, splits: Declared | None, taken: int
) -> tuple[dict[str, bytes], list[str]]:
    """Return the content of each split, or "all", with its files in the order of their names."""
    if path.is_file():
        groups: dict[str, list[Path]] = {"all": [path]}
        notes: list[str] = []
    else:
        groups, notes = _groups(path, splits)
    size = sum(limits.regular(file) for files in groups.values() for file in files)
    limits.check_memory(taken * size, str(path))
    parts = {part: b"".join(file.read_bytes() for file in files) for part, files in groups.items()}
    return parts, notes


def _refuse_empty(path: Path | str, parts: dict[str, bytes]) -> None:
    for part, content in parts.items():
        if not content.strip():
            raise ValueError(f"{_label(path, part)} is an empty text; give one with symbols in it")


def _groups(folder: Path, splits: Declared | None) -> tuple[dict[str, list[Path]], list[str]]:
    files, _, _ = walked = walk(folder, (SUFFIX,), "texts")
    names = [file.relative_to(folder).as_posix() for file in files]
    parts, _, notes = group(names, folder, splits)
    found = {part: [files[i] for i in few] for part, few in parts.items()}
    return found, [*walked.notes(), *notes]


def _decode(content: bytes, path: Path | str, training: bool) -> str:
    other = ", or read it as bytes with --levels 256" if training else ""
    wide = _wide(content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        looks = f" and looks like {wide}" if wide else ""
        raise ValueError(
            f"{path} is not UTF-8{looks}: byte {content[error.start]:#04x} at {error.start}; save"
            f" it as UTF-8{other}"
        ) from None
    if "\0" in text:
        looks = f"looks like {wide}" if wide else "is not text"
        raise ValueError(
            f"{path} {looks}: byte 0x00 at {content.index(0)}; save it as UTF-8{other}"
        )
    return text


def _wide(content: bytes) -> str:
    """Return "UTF-32" or "UTF-16" if the first bytes look like it, with or without a mark, else
    ""."""
    head = content[:4096]
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    zeros = [head[k::4].count(0) / max(1, len(head[k::4])) for k in range(4)]
    often = sum(share > 0.5 for share in zeros)
    return {2: "UTF-16", 3: "UTF-32"}.get(often, "")


def _split(parts: dict[str, AnyStr], missing: list[str], path: Path | str) -> dict[str, AnyStr]:
    """Add each missing split as a tenth of the training text, off its end."""
    rest = {split: text for split, text in parts.items() if split in SPLITS}
    source = parts.get("train", parts.get("all"))
    if source is None:
        raise ValueError(f"{path} has no training text, only {', '.join(parts)}; name it train")
    tenth = len(source) // 10
    cuts = [len(source) - tenth * k for k in range(len(missing), -1, -1)]
    rest["train"] = source[: cuts[0]]
    return rest | {s: source[a:b] for s, a, b in zip(missing, cuts, cuts[1:], strict=False)}


def _chunks(
    path: Path | str,
    codes: dict[str, np.ndarray],
    length: int,
    symbols: str | Tokenizer,
    notes: list[str],
    seed: int | None = None,
) -> Found:
    """Return chunks (N, length) of the codes of each split; with a seed, for training.

    A training chunk begins at random in each stride: at multiples of the stride, chunks would see
    records of a fixed width at some of their phases only. The last chunk to evaluate is filled up
    with the number of symbols.
    """
    training = seed is not None
    tokenizer = symbols if isinstance(symbols, Tokenizer) else None
    alphabet = symbols if isinstance(symbols, str) else ""
    unit, parts = "tokens" if tokenizer else "characters" if alphabet else "bytes", {}
    levels = levels_of(symbols)
    shortest = min(map(len, codes.values()))
    for part, code in codes.items():
        learned = training and part == "train"
        others = int((code == len(alphabet)).sum()) if alphabet else 0
        if not learned and len(code) % length:
            note = f"the last chunk of {_label(path, part)} has {len(code) % length} of {length}"
            notes.append(f"{note} {unit}; lengths are given, not coded")
            code = code.astype(np.promote_types(code.dtype, np.min_scalar_type(levels)))
            code = np.pad(code, (0, -len(code) % length), constant_values=levels)
        if len(code) < length:
            other = f", or try --size {max(1, shortest // 2)}" if training else ""
            raise ValueError(
                f"{_label(path, part)} has {len(code)} {unit}, too few for a chunk of {length};"
                f" give more text{other}"
            )
        overlap = OVERLAP if learned else 1
        stride = max(1, length // min(overlap, max(1, WINDOWS // len(code))))
        windows = np.lib.stride_tricks.sliding_window_view(code, length)
        begin = np.arange(0, len(windows), stride)
        if learned:
            # raw bits are the same in every numpy
            bits = np.random.PCG64([SALT, 1, seed or 0]).random_raw(len(begin))
            begin = begin + (bits % np.uint64(stride)).astype(np.int64)
        parts[part] = windows[begin.clip(max=len(windows) - 1)]
        if others:
            notes.append(f"{others} characters of {_label(path, part)} are not in the alphabet")
    known = f"{len(alphabet)} different ones and one for any other; " if alphabet else ""
    if tokenizer is not None:
        known = f"{tokenizer.count} different ones, tokenizer {tokenizer.sha256}; "
    notes.append(f"text in chunks of {length} {unit}; {known}--size sets the length")
    if tokenizer is not None:
        return Found(str(path), parts, levels, tuple(notes), tokenizer=tokenizer)
    return Found(str(path), parts, levels, tuple(notes), alphabet=alphabet)


def _label(path: Path | str, part: str) -> str:
    return str(path) if part == "all" else f"the {part} split of {path}"
