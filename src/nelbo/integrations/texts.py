"""Texts for a model of tokens: files, lines, prompts with answers, FASTA, arrays of ids.

    text.txt            chunks of as many tokens as the model takes; the last may be shorter
    text.txt, lines     an example per line, without its line break; empty lines are left out
    *.jsonl             objects with `prompt` and `answer`, or only `text`: P(answer|prompt)
    *.fasta, *.fa       a sequence per record
    *.npy               ids, (N, L)

Special tokens that the tokenizer adds (BOS, EOS, CLS, SEP) show. Text whose tokens do not give it
back is refused: its bits would be those of another text.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.numerics import LOG_2
from nelbo.diffusion.batch import Batch
from nelbo.integrations.tokens import SCORED, TokenModel

SHOWN = 40  # characters of a text in a message


class Tokenizer(Protocol):
    """The part of a tokenizer of `transformers` that is used here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""

    def decode(self, ids: list[int], *, clean_up_tokenization_spaces: bool) -> str:
        """Return the text of ids."""


@dataclass(frozen=True)
class Texts:
    """Texts as a batch of tokens, with what they measure in characters and bytes.

    Args:
        batch: ids and the tokens that show.
        characters: of all scored text; None if ids are all that is known.
        size: bytes of it in UTF-8, likewise.
        notes: a sentence for each choice.
    """

    batch: Batch
    characters: int | None
    size: int | None
    notes: tuple[str, ...]

    def rates(self, nats: float) -> dict[str, float]:
        """Return the bound per scored token, character and byte from the nats of an example."""
        assert self.batch.condition is not None
        nats = nats * len(self.batch)
        tokens = (self.batch.condition == SCORED).sum().item()
        bits = nats / LOG_2
        found = {"nats_per_token": nats / tokens, "bits_per_token": bits / tokens}
        if self.characters and self.size:
            found["bits_per_character"] = bits / self.characters
            found["bits_per_byte"] = bits / self.size
        return found


def read(path: Path, model: TokenModel, tokenizer: Tokenizer, *, lines: bool = False) -> Texts:
    """Return the texts of a file, see the module.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a text that its tokens do not give back, one that is longer than the model
            takes, an empty answer, or a file of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file")
    kind = path.suffix.lower()
    if kind == ".npy":
        return Texts(model.batch(np.load(path, allow_pickle=False)), None, None, ())
    text = _text(path)
    if kind in (".jsonl", ".json"):
        pairs = list(_pairs(path, text))
        return _examples(pairs, model, tokenizer, _same)
    if kind in (".fasta", ".fa", ".faa", ".fna"):
        return _examples([("", s) for s in _fasta(path, text)], model, tokenizer, _no_spaces)
    if lines:
        each = text.split("\n")
        kept = [("", line) for line in each if line]
        found = _examples(kept, model, tokenizer, _same)
        note = f"{len(kept)} lines, without their line breaks; {len(each) - len(kept)} are empty"
        return Texts(found.batch, found.characters, found.size, (note, *found.notes))
    return _chunks(text, model, tokenizer)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from None
    if not text:
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def _pairs(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error.msg}") from None
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield "", row["text"]
            continue
        if not isinstance(row, dict) or not all(
            isinstance(row.get(name), str) for name in ("prompt", "answer")
        ):
            raise ValueError(f"{path}, line {number} must have texts prompt and answer, or text")
        if not row["answer"]:
            raise ValueError(
                f"{path}, line {number} has an empty answer: there is nothing to score"
            )
        yield row["prompt"], row["answer"]


def _fasta(path: Path, text: str) -> list[str]:
    if not text.startswith(">"):
        raise ValueError(f"{path} is no FASTA file: it must begin with >")
    records = ("".join(record.splitlines()[1:]) for record in text[1:].split("\n>"))
    return [record.replace(" ", "") for record in records if record]


def _examples(
    pairs: list[tuple[str, str]],
    model: TokenModel,
    tokenizer: Tokenizer,
    plain: Callable[[str], str],
) -> Texts:
    """Return an example for each prompt, which shows, and answer."""
    if not pairs:
        raise ValueError("there is no text to score; give a file with some")
    rows, shown = [], []
    before_all, after_all = _special(pairs[0][1], tokenizer)
    first = len(before_all)
    for i, (prompt, answer) in enumerate(pairs):
        before = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
        after = tokenizer.encode(answer, add_special_tokens=False)
        _check_returns(answer, after, tokenizer, plain)
        whole = [*before_all, *before, *after, *after_all]
        if model.length is not None and first + len(before) >= model.length:
            raise ValueError(
                f"the prompt of example {i} has {len(before)} tokens, and the model's window is"
                f" {model.length}: no answer fits; shorten it"
            )
        if model.length is not None and len(whole) > model.length:
            raise ValueError(
                f"example {i} has {len(whole)} tokens, and the model takes at most"
                f" {model.length}; divide it, or leave --lines out for chunks"
            )
        rows.append(whole)
        answers = range(first + len(before), first + len(before) + len(after))
        shown.append([place not in answers for place in range(len(whole))])
    characters = sum(len(answer) for _, answer in pairs)
    size = sum(len(answer.encode()) for _, answer in pairs)
    return Texts(model.batch(rows, _mask(shown)), characters, size, ())


def _chunks(text: str, model: TokenModel, tokenizer: Tokenizer) -> Texts:
    ids = tokenizer.encode(text, add_special_tokens=False)
    _check_returns(text, ids, tokenizer, _same)
    before, after = _special(text[:SHOWN], tokenizer)
    added, first = len(before) + len(after), len(before)
    if model.length is not None and model.length <= added:
        raise ValueError(f"a window of {model.length} tokens has no place beside {added} special")
    size = len(ids) if model.length is None else model.length - added
    rows, shown = [], []
    for part in (ids[i : i + size] for i in range(0, len(ids), size)):
        whole = [*before, *part, *after]
        rows.append(whole)
        shown.append([not first <= place < first + len(part) for place in range(len(whole))])
    last = f", the last of {len(ids) % size}" if len(ids) % size else ""
    notes = (
        f"text in {len(rows)} chunks of {size} tokens{last}; no chunk sees another, so longer"
        " chunks would cost less per token",
    )
    return Texts(model.batch(rows, _mask(shown)), len(text), len(text.encode()), notes)


def _special(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text, add_special_tokens=True)
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return whole[:first], whole[first + len(plain) :]
    raise ValueError("the tokenizer changes tokens when it adds special ones; give ids instead")


def _mask(rows: list[list[bool]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[False] * (longest - len(row))] for row in rows])


def _same(text: str) -> str:
    return text


def _no_spaces(text: str) -> str:
    return text.replace(" ", "")


def _check_returns(
    text: str, ids: list[int], tokenizer: Tokenizer, plain: Callable[[str], str]
) -> None:
    back = plain(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if back == text:
        return
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
    at = min(at, len(text))
    why = "it lowers case: " if back == text.lower() else ""
    raise ValueError(
        f"the tokenizer does not give the text back, {why}{text[at : at + SHOWN]!r} becomes"
        f" {back[at : at + SHOWN]!r}, so bits of its tokens are not bits of the text; give a model"
        " with a tokenizer that keeps all, or ids in a .npy file"
    )
