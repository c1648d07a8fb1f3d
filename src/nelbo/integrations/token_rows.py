"""Rows of ids: texts of any lengths as one tensor, with the places that are present."""

from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nelbo._utils.text import shortened
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.checks import as_tensor

SCORED, ABSENT = -1, -2  # codes of the conditions where no token shows
TEXTS = "texts are ids, integers (N, L), or a list of rows of them"
LISTED = 12  # ids in a note
NO_TEXT = "there is no text to measure; give at least one"
#: ids, (N, L), or rows of them; or what a tokenizer returns, with its attention_mask
Texts = (
    Tensor | np.ndarray | Sequence[Sequence[int] | Tensor] | Mapping[str, "Tensor | Sequence[Any]"]
)


@dataclass(frozen=True)
class TokenRules:
    """Rules for the texts of a model of tokens; known of a folder before its weights are read.

    Args:
        vocabulary: the number V of ids; None if it is not known yet.
        mask_id: the id of a hidden token; None where noise hides none.
        never: ids that cannot be predicted.
        length: tokens of a text, at most; None for no limit.
    """

    vocabulary: int | None
    mask_id: int | None
    never: frozenset[int]
    length: int | None

    def check(self, batch: Batch) -> None:
        """Raise a ValueError unless ids (N, L) and conditions (N, L) are texts of the model."""
        ids, condition = batch.x, batch.condition
        assert condition is not None
        if condition.shape != ids.shape or not _whole(condition):
            raise ValueError(
                f"there is a condition for each token, an integer; got {condition.dtype} of shape"
                f" {tuple(condition.shape)} for ids of shape {tuple(ids.shape)}; try"
                " model.batch(ids)"
            )
        there, count = condition != ABSENT, self.vocabulary
        longest = max([0, *there.sum(1).tolist()])
        if self.length is not None and longest > self.length:
            raise ValueError(
                f"a text has {longest} tokens, and the model takes at most {self.length};"
                " divide it into chunks"
            )
        never = torch.tensor(sorted(self.never), dtype=torch.long, device=ids.device)
        beyond = ids < 0 if count is None else (ids < 0) | (ids >= count)
        for wrong, why in (
            (beyond, "below 0" if count is None else f"beyond 0..{count - 1}"),
            (
                ids == (-1 if self.mask_id is None else self.mask_id),
                "the model's mask, which is no token of a text",
            ),
            (
                (condition == SCORED) & torch.isin(ids, never),
                "never predicted; let it show, or leave it out",
            ),
            (
                (condition != SCORED) & (condition != ids),
                f"whose condition must be that id where it shows, {SCORED} where it is scored and"
                f" {ABSENT} where it is padding",
            ),
        ):
            if (wrong & there).any():
                row, place = (wrong & there).nonzero()[0].tolist()
                raise ValueError(f"text {row} has id {ids[row, place]} at {place}, {why}")
        empty = ~(condition == SCORED).any(1)
        if empty.any():
            raise ValueError(
                f"text {int(empty.nonzero()[0])} has no token to score: all of it shows, or its"
                " answer is empty"
            )

    def batch(self, rows: Sequence[Sequence[int]], shown: Tensor) -> Batch:
        """Return rows of ids as a batch that is checked.

        Args:
            rows: of any lengths.
            shown: mask of the tokens that show, (N, L).
        """
        ids, present = rows_of(rows, None)
        condition = torch.where(fitting(shown, ids), ids, SCORED)
        return self.aligned(Batch(ids, torch.where(present, condition, ABSENT)))

    def aligned(self, batch: Batch) -> Batch:
        """Return texts that were checked, each from the first place of its row, and no wider.

        So nothing depends on padding before and after them.

        Raises:
            ValueError: as for `check`, of the places of the rows as they were given.
        """
        self.check(batch)
        ids, condition = batch.x, batch.condition
        assert condition is not None
        order = (condition == ABSENT).int().argsort(dim=1, stable=True)
        condition = condition.gather(1, order)
        there = condition != ABSENT
        # an absent token is any, and 0 here
        ids, used = ids.gather(1, order) * there, there.any(0)
        return Batch(ids[:, used], condition[:, used], batch.given)


def rows_of(x: Texts, pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Return ids, (N, L), and a mask of those that are present.

    Args:
        x: ids, (N, L), or a list of texts of any lengths; or a mapping of a tokenizer with these
            as `input_ids`, whose `attention_mask` is 0 for padding at both ends.
        pad_id: padding at both ends of a text, which is absent; within a text it is a token.

    Raises:
        ValueError: they are no integers, or of another shape; or a mask that hides more.
    """
    if isinstance(x, Mapping) and "input_ids" in x:
        ids, present = rows_of(x["input_ids"], pad_id)
        mask, _ = rows_of(x.get("attention_mask", torch.ones_like(ids)), None)
        if mask.shape != ids.shape or (_within(mask > 0) != (mask > 0)).any():
            raise ValueError(
                "an attention_mask is 1 for the tokens of a text, and 0 for padding at its ends"
                f" alone; got one of shape {tuple(mask.shape)} for ids {tuple(ids.shape)}"
            )
        return ids, present & (mask > 0)
    if isinstance(x, Tensor | np.ndarray):
        ids = as_tensor(x)
        if ids.ndim != 2 or not _whole(ids):
            raise ValueError(f"{TEXTS}; got {ids.dtype} of shape {tuple(ids.shape)}")
        if not len(ids):
            raise ValueError(f"{NO_TEXT}; got ids of shape {tuple(ids.shape)}")
        ids = ids.long()
        present = torch.ones_like(ids, dtype=torch.bool)
    else:
        rows = _rows_in(x)
        longest = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(r, (0, longest - len(r))) for r in rows])
        end = torch.tensor([len(row) for row in rows])
        present = torch.arange(longest) < end[:, None]
    if pad_id is not None:
        present = _within(present & (ids != pad_id))
    return ids, present


def _within(there: Tensor) -> Tensor:
    """Return a mask of the places between the first and the last that are there, (N, L)."""
    return (there.int().cumsum(1) > 0) & (there.flip(1).int().cumsum(1).flip(1) > 0)


def _whole(ids: Tensor) -> bool:
    return not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool


def _rows_in(texts: Texts) -> list[Tensor]:
    """Return the ids of each text of a list.

    Raises:
        ValueError: an item is no row of integers, or there is none.
    """
    if isinstance(texts, str | Mapping) or not isinstance(texts, Sized):
        raise ValueError(f"{TEXTS}; got {shortened(repr(texts))}")
    if not len(texts):
        raise ValueError(f"{NO_TEXT}; got {texts!r}")
    rows = []
    for i, text in enumerate(texts):
        try:
            row = torch.as_tensor(text)
        except (TypeError, ValueError, RuntimeError):
            row = torch.zeros(())
        if row.ndim != 1 or not (_whole(row) or not len(row)):
            raise ValueError(f"{TEXTS}; got {shortened(repr(text))} as text {i}")
        rows.append(row.long())
    return rows


def fitting(mask: Tensor, ids: Tensor) -> Tensor:
    """Return a mask of tokens that show, expanded to ids."""
    if mask.dtype != torch.bool or mask.shape[-1:] != ids.shape[1:] or mask.ndim > 2:
        raise ValueError(
            f"shown tokens are a mask of booleans (L,) or (N, L) for ids of shape"
            f" {tuple(ids.shape)}; got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.expand_as(ids).to(ids.device)


def listed(ids: Collection[int]) -> str:
    """Return ids in words, the first ones in order if they are many."""
    if not ids:
        return "no ids"
    some = ", ".join(map(str, sorted(ids)[:LISTED]))
    return f"ids {some}, .. ({len(ids)})" if len(ids) > LISTED else f"ids {some}"
