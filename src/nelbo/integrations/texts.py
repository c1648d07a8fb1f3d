"""Texts for a model of tokens: chunks of a text, lines, prompts with answers, arrays of ids.

    text.txt            chunks of as many tokens as the model takes; the last may be shorter
    text.txt, lines     an example per line, without its line break; empty lines are left out
    *.npy, *.npz        ids, (N, L), as in memory; see `special_ids`
    prompts, answers    of JSON lines, FASTA, data sets and lists, see `text_records`

Special tokens that the tokenizer adds (BOS, EOS, CLS, SEP) show. A text or a prompt whose tokens
do not give it back is refused: the bits would be those of another one. Files are UTF-8; a byte
order mark at their beginning is no text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.numerics import LOG_2
from nelbo.data.readers import arrays
from nelbo.data.splits import Declared
from nelbo.data.tokenizer import sizes_of
from nelbo.diffusion.batch import Batch
from nelbo.integrations.special_ids import SpecialIds
from nelbo.integrations.text_records import (
    TextForm,
    is_data_set,
    lines_of,
    of_data_set,
    of_fasta,
    of_json,
    of_list,
)
from nelbo.integrations.token_prompts import places_to_draw
from nelbo.integrations.token_rows import ABSENT, SCORED, TokenRules
from nelbo.integrations.token_rows import Texts as Ids

SHOWN = 40  # characters of a text in a message

LETTER = "a"  # any text, for which special tokens are asked


class Tokenizer(Protocol):
    """The part of a tokenizer of `transformers` that is used here."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Return the ids of a text; `verbose` warns of long ones, which are divided here."""

    def decode(self, ids: list[int], *, clean_up_tokenization_spaces: bool) -> str:
        """Return the text of ids."""


@dataclass(frozen=True)
class Texts:
    """Texts as a batch of tokens, with what they measure in characters and bytes.

    Args:
        batch: ids and the tokens that show.
        characters: of all scored text; None if ids are all that is known.
        size: bytes of all scored text in UTF-8; None if ids are all that is known.
        notes: a sentence for each choice.
        name: of the data, for the record.
        sizes: characters and bytes of the scored text of each example, (N,), if they are known;
            of a character that two chunks divide, see `data.tokenizer.sizes_of`.
    """

    batch: Batch
    characters: int | None
    size: int | None
    notes: tuple[str, ...]
    name: str = "as given"
    sizes: Mapping[str, Tensor] = field(default_factory=dict)

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


def same(one: Batch, other: Batch) -> bool:
    """Return whether two batches are of the same tokens, of which the same show."""
    a, b = one.condition, other.condition
    assert a is not None and b is not None
    return torch.equal(a, b) and torch.equal(one.x, other.x)


@dataclass(frozen=True)
class TextReader:
    """A reader of texts for a model, before its weights are read or after.

    Args:
        tokenizer: of the model.
        special: what ids mean in arrays of them.
        rules: what texts the model takes.
        kept: texts that were read ahead, with what was asked for.
    """

    tokenizer: Tokenizer
    special: SpecialIds
    rules: TokenRules
    kept: list[tuple[tuple[object, ...], Texts]] = field(default_factory=list)

    def ahead(self, *asked: object) -> None:
        """Read texts that `read` will be asked for, so that mistakes in them are found early."""
        self.kept.append((asked, self._read(*asked)))  # type: ignore[arg-type]

    @property
    def count(self) -> int | None:
        """The number of texts that were read ahead; None where none were."""
        return sum(len(texts.batch) for _, texts in self.kept) or None

    def read(
        self,
        source: object,
        form: TextForm | None = None,
        split: str | None = None,
        splits: Declared | None = None,
    ) -> Texts:
        """Return the texts of a file, a data set or a list, see the module.

        Args:
            source: a path, a name of a data set, or data in memory.
            form: how they are taken from it; a text in chunks where left out.
            split: of a data set.
            splits: of a data set, which names belong to which split.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a text or a prompt that its tokens do not give back, one that is longer
                than the model takes, an empty answer, or data of another kind.
        """
        for i, ((of, *how), texts) in enumerate(self.kept):
            if of is source and how == [form, split, splits]:
                del self.kept[i]
                return texts
        return self._read(source, form, split, splits)

    def _read(
        self,
        source: object,
        form: TextForm | None,
        split: str | None,
        splits: Declared | None,
    ) -> Texts:
        form = form or TextForm()
        if is_data_set(source):
            form.check("a data set", fields=True)
            rows, name, note = of_data_set(source, split, splits, form)
            found = self._examples(form.pairs(rows), _same)
            return replace(found, name=name, notes=(note, *found.notes))
        if split not in (None, "all") or splits is not None:
            raise ValueError("a text for a model of tokens has no splits; leave --split out")
        listed = isinstance(source, list | tuple) and len(source)
        if listed and isinstance(cast(list, source)[0], str | Mapping):
            form.check("a list of texts", fields=True)
            return self._examples(form.pairs(of_list(cast(list, source))), _same)
        if not isinstance(source, str | Path):
            form.check("an array of ids")
            return self._of_ids(cast(Ids, source))
        return replace(self._of_file(Path(source), form), name=f"all of {source}")

    def _of_ids(self, ids: Ids) -> Texts:
        batch, note = self.special.batch(ids)
        return Texts(self.rules.aligned(batch), None, None, (note,))

    def _of_file(self, path: Path, form: TextForm) -> Texts:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, or is not a file")
        kind = path.suffix.lower()
        if kind in (".jsonl", ".json"):
            form.check(str(path), fields=True)
            return self._examples(form.pairs(of_json(path, _text(path))), _same)
        ids = kind in (".npy", ".npz")
        records = ids or kind in (".fasta", ".fa", ".faa", ".fna")
        form.check(str(path), lines=not records)
        if ids:
            return self._of_ids(_array(path))
        text = _text(path)
        if records:
            return self._examples([(at, "", s) for at, s in of_fasta(path, text)], _no_spaces)
        if form.lines:
            each = lines_of(text)
            kept = [(f"{path}, line {n}", "", line) for n, line in enumerate(each, 1) if line]
            found = self._examples(kept, _same, ", or leave --lines out for chunks")
            empty = len(each) - len(kept)
            note = f"{len(kept)} lines, without their line breaks; {empty} are empty"
            return replace(found, notes=(note, *found.notes))
        return self._chunks(text)

    def _examples(
        self, pairs: list[tuple[str, str, str]], plain: Callable[[str], str], instead: str = ""
    ) -> Texts:
        """Return an example for each place, prompt, which shows, and answer."""
        if not pairs:
            raise ValueError("there is no text to score; give a file with some")
        rows, shown, length = [], [], self.rules.length
        before_all, after_all = _special(pairs[0][2], self.tokenizer)
        first = len(before_all)
        for where, prompt, answer in pairs:
            before = _encode(prompt, self.tokenizer, plain) if prompt else []
            after = _encode(answer, self.tokenizer, plain)
            whole = [*before_all, *before, *after, *after_all]
            if length is not None and first + len(before) >= length:
                raise ValueError(
                    f"{where} has a prompt of {len(before)} tokens, and the model's window is"
                    f" {length}: no answer fits; shorten it"
                )
            if length is not None and len(whole) > length:
                raise ValueError(
                    f"{where} has {len(whole)} tokens, and the model takes at most {length};"
                    f" divide it{instead}"
                )
            rows.append(whole)
            answers = range(first + len(before), first + len(before) + len(after))
            shown.append([place not in answers for place in range(len(whole))])
        characters = torch.tensor([len(answer) for *_, answer in pairs])
        size = torch.tensor([len(answer.encode()) for *_, answer in pairs])
        total = int(characters.sum()), int(size.sum())
        sizes = {"character": characters, "byte": size}
        return Texts(self.rules.batch(rows, _mask(shown)), *total, (), sizes=sizes)

    def _chunks(self, text: str) -> Texts:
        ids = _encode(text, self.tokenizer, _same)
        before, after = _special(text[:SHOWN], self.tokenizer)
        added, first, length = len(before) + len(after), len(before), self.rules.length
        if length is not None and length <= added:
            raise ValueError(
                f"a window of {length} tokens has no room beside {added} special tokens"
            )
        size = len(ids) if length is None else length - added
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
        batch = self.rules.batch(rows, _mask(shown))
        sizes = _sizes(ids, size, text, self.tokenizer)
        return Texts(batch, len(text), len(text.encode()), notes, sizes=sizes)

    def to_draw(self, prompts: Sequence[str], length: int | None) -> Batch:
        """Return texts of which prompts and special tokens show, and `length` tokens do not.

        Args:
            prompts: of each text, "" for none.
            length: number of tokens to draw for each, see `places_to_draw`.

        Raises:
            ValueError: `length` is below 1, there is no room for as many tokens, or the tokens of
                a prompt do not give it back.
        """
        before, after = _special(LETTER, self.tokenizer)
        given = [_encode(p, self.tokenizer, _but_for_spaces(p)) if p else [] for p in prompts]
        return places_to_draw(self.rules, given, length, before, after)

    def drawn(self, ids: np.ndarray) -> list[str]:
        """Return the texts of ids (N, L), without special tokens at the ends; ABSENT beyond."""
        before, after = _special(LETTER, self.tokenizer)
        rows = (row[row != ABSENT].tolist() for row in ids)
        return [
            self.tokenizer.decode(
                row[len(before) : len(row) - len(after)], clean_up_tokenization_spaces=False
            )
            for row in rows
        ]


def _array(path: Path) -> np.ndarray:
    """Return the array of a .npy file, or the only one of a .npz file."""
    if path.suffix.lower() == ".npy":
        return arrays.load_npy(path)
    names = arrays.names_in(path)
    if len(names) != 1:
        raise ValueError(f"{path} must have one array, the ids; it has {', '.join(names)}")
    return arrays.load_npz(path)[names[0]]


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from None
    if not text:
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def _special(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    whole = tokenizer.encode(text, add_special_tokens=True, verbose=False)
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return whole[:first], whole[first + len(plain) :]
    raise ValueError("the tokenizer changes tokens when it adds special ones; give ids instead")


def _sizes(ids: list[int], size: int, text: str, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the characters and bytes of each chunk of a text, (N,); {} if they are not known."""
    library = getattr(tokenizer, "backend_tokenizer", None)
    each = None if library is None else sizes_of(library)
    if each is None or each[ids].sum(0).tolist() != [len(text), len(text.encode())]:
        return {}
    found = torch.stack([part.sum(0) for part in each[ids].split(size)])
    return {"character": found[:, 0], "byte": found[:, 1]}


def _mask(rows: list[list[bool]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[False] * (longest - len(row))] for row in rows])


def _same(text: str) -> str:
    return text


def _no_spaces(text: str) -> str:
    return text.replace(" ", "")


def _but_for_spaces(text: str) -> Callable[[str], str]:
    """Return what takes out the spaces between letters that tokenizers of sequences write."""
    return lambda back: text if back == " ".join(text) else back


def _encode(text: str, tokenizer: Tokenizer, plain: Callable[[str], str]) -> list[int]:
    """Return the tokens of a text, without special ones.

    Raises:
        ValueError: the tokens do not give the text back.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    back = plain(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if back == text:
        return ids
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
    at = min(at, len(text))
    why = "it lowers case: " if back == text.lower() else ""
    raise ValueError(
        f"the tokenizer does not give the text back, {why}{text[at : at + SHOWN]!r} becomes"
        f" {back[at : at + SHOWN]!r}, so the bits of its tokens are not those of the text; give"
        " another model, or ids in a .npy file"
    )
