"""Special ids: those that show and those that are padding in arrays, and those without mass.

An array does not say what its ids mean, and each meaning gives another number. Where the user
declares none it is that of the tokenizer, and a note says so; where that has two, it is refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nelbo._utils.text import shortened
from nelbo.diffusion.batch import Batch
from nelbo.integrations.token_rows import ABSENT, SCORED, Texts, listed, rows_of


@dataclass(frozen=True)
class SpecialIds:
    """The meaning of ids in arrays of them, and those that cannot be predicted.

    Args:
        shown: ids that show wherever they are.
        never: ids that cannot be predicted, beside the mask and those that the tokenizer lacks.
        pad: id of padding at either end of a row; None for none.
        also: what else the tokenizer uses its padding for, if that was not declared.
        declared: the names of the options that are the user's own.
    """

    shown: tuple[int, ...]
    never: tuple[int, ...]
    pad: int | None
    also: tuple[str, ...]
    declared: frozenset[str]

    def check(self, vocabulary: int) -> None:
        """Raise a ValueError if an id that shows is none of the V ids of the module."""
        outside = [i for i in self.shown if not 0 <= i < vocabulary]
        if outside:
            raise ValueError(f"ids of the module are 0..{vocabulary - 1}; got {outside} in shown")

    def note_of_never(self, lacking: int) -> str:
        """Return a sentence on the ids that cannot be predicted, `lacking` in the tokenizer."""
        more = f"; nor can those that the tokenizer lacks ({lacking})" if lacking else ""
        return f"{listed(self.never)} can never be predicted{self._source('never')}{more}"

    def batch(self, x: Texts) -> tuple[Batch, str]:
        """Return rows of ids with what shows in them, and a sentence on it.

        Args:
            x: ids, (N, L), or a list of rows.

        Raises:
            ValueError: an id at an end of a row is padding and another special token too.
        """
        padding_ids = () if self.pad is None else (self.pad,)
        ids, present = rows_of(x, self.pad)
        if self.also and not present.all():
            row = int((~present).any(1).nonzero()[0])
            raise ValueError(
                f"text {row} has id {self.pad} at an end, which to the tokenizer is padding and"
                f" {' and '.join(self.also)}: say which with pad={self.pad} for padding, which the"
                " model does not get, or pad=none for a token"
            )
        inside = present & (ids < 0)
        if inside.any():
            row, place = inside.nonzero()[0].tolist()
            raise ValueError(
                f"text {row} has id {ids[row, place]} at {place}, which is none; below 0 there is"
                " only padding at the ends, declared by pad="
            )
        # padding within a row is a token that shows
        shows = torch.isin(ids, torch.tensor([*self.shown, *padding_ids], dtype=torch.long))
        condition = torch.where(shows, ids, SCORED)
        padding = "no id is padding"
        if padding_ids:
            padding = (
                f"id {self.pad} at either end of a row is padding, which the model never gets"
            )
        note = (
            f"in these rows {listed(self.shown)} show wherever they are"
            f"{self._source('shown')}; {padding}{self._source('pad')}"
        )
        return Batch(ids, torch.where(present, condition, ABSENT)), note

    def _source(self, name: str) -> str:
        if name in self.declared:
            return ""
        return f" (by the tokenizer; {name}= declares others)"


class NoTokenizer:
    """In place of the tokenizer that a folder lacks: it has no special tokens, and takes no text.

    Args:
        home: the folder.
    """

    all_special_ids: tuple[int, ...] = ()
    special_tokens_map: Mapping[str, str] = {}
    pad_token_id = mask_token_id = None

    def __init__(self, home: Path) -> None:
        self.home = home

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of tokens: none are known."""
        return {}

    def encode(self, text: str, **_: object) -> list[int]:
        """Raise a ValueError."""
        raise ValueError(
            f"{self.home} has no tokenizer, so it takes no text, {shortened(text)!r}: give ids, in"
            " a .npy file or an array"
        )

    def decode(self, ids: list[int], **_: object) -> str:
        """Raise a ValueError."""
        raise ValueError(f"{self.home} has no tokenizer, so ids have no text; got {len(ids)} ids")


def special_ids(
    tokenizer: Any,  # noqa: ANN401, of transformers
    mask: int | None,
    shown: Collection[int] | None = None,
    never: Collection[int] | None = None,
    pad: int | Literal["none"] | None = None,
) -> SpecialIds:
    """Return what ids mean: as declared, or as the tokenizer says where left out.

    Args:
        tokenizer: of transformers.
        mask: the id of the mask, which is no token of a text.
        shown: see `SpecialIds`.
        never: likewise.
        pad: likewise; "none" for no padding.
    """
    own = sorted({*tokenizer.all_special_ids} - {mask})
    names = tokenizer.special_tokens_map
    also: tuple[str, ...] = ()
    if pad is None:
        same = (k for k, v in names.items() if v == names.get("pad_token") and k != "pad_token")
        also = tuple(k.removesuffix("_token") for k in same)
    given = {"shown": shown, "never": never, "pad": pad}
    return SpecialIds(
        tuple(own if shown is None else sorted({*shown})),
        tuple(own if never is None else sorted({*never})),
        tokenizer.pad_token_id if pad is None else None if pad == "none" else pad,
        also,
        frozenset(k for k, v in given.items() if v is not None),
    )
