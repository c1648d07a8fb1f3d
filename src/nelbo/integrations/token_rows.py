"""Rows of ids: texts of any lengths as one tensor, with the places that are present."""

from collections.abc import Mapping, Sequence, Sized

import numpy as np
import torch
from torch import Tensor, nn

from nelbo._utils.text import shortened
from nelbo.diffusion.checks import as_tensor

SCORED, ABSENT = -1, -2  # codes of the conditions where no token shows
TEXTS = "texts are ids, integers (N, L), or a list of rows of them"
Texts = Tensor | np.ndarray | Sequence[Sequence[int] | Tensor]


def rows_of(x: Texts, pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Return ids, (N, L), and a mask of those that are present.

    Args:
        x: ids, (N, L), or a list of texts of any lengths.
        pad_id: padding at both ends of a text, which is absent; within a text it is a token.

    Raises:
        ValueError: they are no integers, or of another shape.
    """
    if isinstance(x, Tensor | np.ndarray):
        ids = as_tensor(x)
        if ids.ndim != 2 or not _whole(ids):
            raise ValueError(f"{TEXTS}; got {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.long()
        present = torch.ones_like(ids, dtype=torch.bool)
    else:
        rows = _rows_in(x)
        longest = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(r, (0, longest - len(r))) for r in rows])
        end = torch.tensor([len(row) for row in rows])
        present = torch.arange(longest) < end[:, None]
    if pad_id is not None:
        is_pad = (ids == pad_id) | ~present
        before, after = is_pad.int().cumprod(1), is_pad.flip(1).int().cumprod(1).flip(1)
        present = (before == 0) & (after == 0)
    return ids, present


def _whole(ids: Tensor) -> bool:
    return not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool


def _rows_in(texts: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Return the ids of each text of a list.

    Raises:
        ValueError: an item is no row of integers, or there is none.
    """
    if isinstance(texts, str | Mapping) or not isinstance(texts, Sized):
        raise ValueError(f"{TEXTS}; got {shortened(repr(texts))}")
    if not len(texts):
        raise ValueError(f"there is no text to measure; give at least one; got {texts!r}")
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
