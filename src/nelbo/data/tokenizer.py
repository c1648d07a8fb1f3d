"""Tokenizers of text, kept in a run: byte pairs learned from its training split, or one as given.

A tokenizer is the content of a `tokenizer.json`, as the library `tokenizers` writes it, with its
SHA-256. A text whose tokens do not give it back is refused: its bits would be those of another.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils import limits
from nelbo._utils.text import shortened
from nelbo._utils.validation import Record

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
BYTES = 256  # symbols of which byte pairs are made
LARGEST = 65536  # tokens: what is stored and predicted as levels
SHOWN = 40  # characters of a text in a message
PART = "\ufffd"  # what the bytes of a part of a character are decoded to
#: the bytes of the letters of GPT-2: those that can be printed are themselves, others from 256 on
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = {chr(byte): byte for byte in PRINTED} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


@dataclass(frozen=True)
class Tokenizer(Record):
    """A tokenizer and its hash.

    Args:
        sha256: of `content`, the first 16 hexadecimal digits.
        content: of a tokenizer.json.

    Raises:
        ValueError: the hash is not that of the content, or it is no tokenizer.
    """

    sha256: str
    content: str

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sha256 != _hash(self.content):
            raise ValueError(
                f"the tokenizer of the run does not have its hash {self.sha256}: the run is"
                " damaged, or was changed; restore it from a copy"
            )

    @staticmethod
    def of(content: str) -> "Tokenizer":
        """Return the tokenizer of the content of a tokenizer.json."""
        return Tokenizer(_hash(content), content)

    @property
    def count(self) -> int:
        """The number of tokens."""
        return max(_loaded(self.content).get_vocab().values()) + 1

    def encode(self, text: str, name: str) -> np.ndarray:
        """Return the ids of a text, (L,), int32.

        Args:
            text: the text.
            name: of its source, for messages.

        Raises:
            ValueError: its tokens do not give it back.
        """
        found = _loaded(self.content).encode(text, add_special_tokens=False).ids
        back = self.decode(found)
        if back != text:
            pairs = zip(text, back, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
            why = "it lowers case: " if back == text.lower() else ""
            raise ValueError(
                f"the tokenizer does not give {name} back, {why}{text[at : at + SHOWN]!r} becomes"
                f" {back[at : at + SHOWN]!r}, so bits of its tokens are not bits of the text; try"
                " --tokenizer bpe:4096"
            )
        return np.array(found, np.int32)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        text: str = _loaded(self.content).decode(ids, skip_special_tokens=False)
        return text

    def sizes(self) -> Tensor | None:
        """Return the characters and bytes of each token, (count, 2), int64; see `sizes_of`."""
        return _sizes(self.content)


def sizes_of(tokenizer: "tokenizers.Tokenizer") -> Tensor | None:
    """Return the characters and bytes of each token of a tokenizer of the library, (V, 2), int64.

    A character that several tokens divide counts in the one with its first byte; an id without a
    token has neither. None where the text of tokens is not that of each, joined: with some
    tokenizers it depends on the tokens beside it, as where the first space is left out.
    """
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    found = [(0, 0)] * (max(names) + 1)
    of_bytes = type(tokenizer.decoder).__name__ == "ByteLevel"
    text_of = partial(tokenizer.decode, skip_special_tokens=False)
    first = min(names)
    ends = text_of([first])
    for i, name in names.items():
        content = _bytes_of(name)
        if not of_bytes:
            text = text_of([i])
            if PART in text or text_of([first, i, first]) != ends + text + ends:
                return None
            content = text.encode()
        # the other bytes continue a character
        found[i] = sum(byte >> 6 != 0b10 for byte in content), len(content)
    return torch.tensor(found)


def _bytes_of(name: str) -> bytes:
    """Return the bytes of a token whose name has a letter for each; of any other its own."""
    known = [LETTERS[letter] for letter in name if letter in LETTERS]
    return bytes(known) if len(known) == len(name) else name.encode()


def make(spec: str, text: str) -> Tokenizer:
    """Return the tokenizer that a text asks for.

    Args:
        spec: "bpe:4096" for 4096 tokens of byte pairs, learned from `text`; or a folder with a
            tokenizer.json, or this file.
        text: the training text.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is neither, the number is impossible, or `tokenizers` is not installed.
    """
    if spec.startswith("bpe:"):
        return _byte_pairs(spec, text)
    path = Path(spec)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"a tokenizer is bpe:N, such as bpe:4096, or a folder with a {FILE}; got {spec}"
        )
    limits.check_json(path)
    content = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = Tokenizer.of(content)
        found.count  # noqa: B018 - reads it
    except ValueError as error:
        raise ValueError(
            f"{path} is no tokenizer ({shortened(str(error))}); give a folder with a {FILE}, or"
            " bpe:N, such as bpe:4096, to learn one from the text"
        ) from None
    if not 2 <= found.count <= LARGEST:
        raise ValueError(
            f"{path} has {found.count} tokens, and a model of tokens takes 2 to {LARGEST}; try"
            " bpe:4096"
        )
    return found


def _byte_pairs(spec: str, text: str) -> Tokenizer:
    """Learn N tokens of pairs of bytes, within words and spaces (Sennrich et al. 2016)."""
    size = spec.removeprefix("bpe:")
    if not re.fullmatch(r"\d{1,6}", size) or not BYTES < int(size) <= LARGEST:
        raise ValueError(
            f"bpe:N learns N tokens, more than the {BYTES} bytes and at most {LARGEST}; got {spec}"
        )
    library = _library()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=int(size),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text.splitlines(keepends=True), trainer)
    # without spaces, as a run keeps it
    return Tokenizer.of(json.dumps(json.loads(made.to_str()), separators=(",", ":")))


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError:
        raise ImportError("tokens need tokenizers: pip install 'nelbo[text]'") from None
    return tokenizers


@lru_cache(maxsize=4)
def _sizes(content: str) -> Tensor | None:
    return sizes_of(_loaded(content))


@lru_cache(maxsize=4)
def _loaded(content: str) -> "tokenizers.Tokenizer":
    library = _library()
    try:
        return library.Tokenizer.from_str(content)
    except Exception as error:  # of the library, which has no class of its own for it
        raise ValueError(f"no tokenizer of the library: {shortened(str(error))}") from None
