"""The dimensions of an example in words: their names, and what codes and predictions stand for."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.text import shortened
from nelbo.data.columns import Place, places
from nelbo.data.readers.text import OTHER
from nelbo.data.schema import Schema
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.process import ForwardProcess
from nelbo.pages.images import is_image

HIDDEN = "▒"  # a hidden character


def dim_names(schema: Schema) -> list[str]:
    """Return a name for each dimension of an example, flattened."""
    if schema.columns:
        return [
            f"{p.column.name}, known?" if p.indicator else p.column.name
            for p in places(schema.columns)
        ]
    if len(schema.shape) == 1:
        what = schema.symbol if schema.text else "dimension"
        return [f"{what} {i + 1}" for i in range(schema.shape[0])]
    if is_image(schema):
        c, h, w = schema.shape
        colour = [f", channel {k + 1}" if c > 1 else "" for k in range(c)]
        return [
            f"row {i + 1}, column {j + 1}{colour[k]}"
            for k in range(c)
            for i in range(h)
            for j in range(w)
        ]
    return [str(tuple(i + 1 for i in at)) for at in np.ndindex(*schema.shape)]


class Meaning(NamedTuple):
    """The place of a dimension in a table or the symbols of a text, and its mask, if any."""

    place: Place | None
    symbols: Sequence[str]
    mask: int | None
    gaussian: bool

    def of(self, code: float) -> str:
        """Return what a code stands for."""
        if math.isnan(code):
            return "missing"
        if self.symbols:
            return repr(self.symbols[int(code)]) if int(code) < len(self.symbols) else HIDDEN
        column = self.place.column if self.place else None
        if self.place and self.place.indicator:
            return ("", "known", "missing")[int(code)]
        if column is None or column.group == "numbers":
            return _short(code)
        if column.group == "symbols":
            words = ("(other)", *column.categories, "missing")
            return shortened(words[int(code)], 24)
        assert column.precision is not None and column.low is not None
        if column.missing and code >= column.codes - 1:
            return "missing"
        return _short(column.low + column.precision * (code - 1))


def _short(v: float) -> str:
    return f"{v:.6g}".replace("-", "−")


def meanings(schema: Schema, process: ForwardProcess) -> list[Meaning]:
    """Return the meaning of each dimension of an example, flattened."""
    dims = math.prod(schema.shape)
    symbols: Sequence[str] = schema.alphabet + OTHER if schema.alphabet else ""
    if (tokens := schema.tokenizer) is not None:
        symbols = [tokens.decode([k]) for k in range(tokens.count)]
    at: list[Place | None] = [*places(schema.columns)] if schema.columns else [None] * dims
    parts = [part for part in process.factors for _ in range(dims)]
    if len(process.factors) > 1:
        sizes = [v.shape[1] for v in process.split(torch.zeros(1, dims))]
        pairs = zip(process.factors, sizes, strict=True)
        parts = [part for part, size in pairs for _ in range(size)]
    return [
        Meaning(place, symbols, part.mask, part.has_flow)
        for place, part in zip(at, parts, strict=False)
    ]


def values_as_text(z: Tensor, meaning: list[Meaning], known: bool = False) -> list[str]:
    """Return the values of data (`known`) or of latents as text."""
    return [
        _short(v) if m.gaussian and not known else HIDDEN if not known and v == m.mask else m.of(v)
        for v, m in zip(z.double().tolist(), meaning, strict=True)
    ]


def predictions_as_text(
    process: ForwardProcess, prediction: Prediction, z: Tensor, meaning: list[Meaning]
) -> list[str]:
    """Return a prediction from z, (1, ...), as text: a mean, or the likeliest code."""
    found, at = [], 0
    for part, one, own in zip(process.factors, prediction.factors, process.split(z), strict=True):
        levels = one.levels
        if levels is None and part.has_flow:
            mean = part.mean(one.e_hat, own).flatten().double().tolist()
            found += [meaning[at + i].of(v) for i, v in enumerate(mean)]
        else:
            table = one.e_hat if levels is None else levels.log_probs
            log_p, best = table.reshape(-1, table.shape[-1]).max(-1)
            shown = own.flatten().tolist()
            for i, (code, p) in enumerate(zip(best.tolist(), log_p.exp().tolist(), strict=True)):
                visible = part.mask is not None and shown[i] != part.mask
                m = meaning[at + i]
                found.append(m.of(shown[i]) if visible else f"{m.of(code)} ({p:.2f})")
        at += own[0].numel()
    return found
