"""Checks of examples from callers: their type, their shape, and each code against the model."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from nelbo.diffusion.model import Model
    from nelbo.diffusion.parametrization import Parametrization
    from nelbo.diffusion.process import ForwardProcess

TOGETHER = 2**24  # numbers checked at a time


def as_tensor(x: "Tensor | np.ndarray") -> Tensor:
    """Return examples as a tensor, which shares their memory if possible.

    Raises:
        ValueError: if they are neither a tensor nor an array of numbers.
    """
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biuf":
            raise ValueError(f"x must be an array of numbers; got one of the type {x.dtype}")
        native = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    if not isinstance(x, Tensor) and not hasattr(x, "chunks"):  # `data.rows.Rows`
        raise ValueError(
            f"x must be a tensor or a NumPy array of examples (N, ...); got {type(x).__name__}"
        )
    return x


def check_examples(model: "Model", x: Tensor) -> None:
    """Check that x holds examples of the model, (N, *model.shape).

    Raises:
        ValueError: if the shape or type differs, there are none, or a value is not a code of its
            dimension; it names the first such row.
    """
    if not len(x.shape) or tuple(x.shape[1:]) != model.shape:
        wanted = ", ".join(("N", *map(str, model.shape)))
        raise ValueError(
            f"the model is for examples of shape {model.shape}; got {tuple(x.shape[1:])}: x must"
            f" be ({wanted})"
        )
    if not len(x):
        raise ValueError(f"x is empty: its shape is {tuple(x.shape)}; give at least 1 example")
    if not isinstance(x, Tensor):
        return  # read from files, which are checked when read
    if x.dtype.is_complex:
        raise ValueError(f"x must be real numbers; got {x.dtype}")
    process = model.process
    legal = list(map(_legal, process.factors, model.head.factors))
    levels = [codes for codes in legal if codes is not None]
    if levels and process.alike and x.is_floating_point():
        most = levels[0].shape[-1] - 1
        fix = "if x holds them already, x.long()"
        if x.numel() and x.min() >= 0 and x.max() <= 1:
            fix = f"if x is scaled to [0, 1], (x * {most}).round().long()"
        raise ValueError(
            f"x is {x.dtype}, but the model takes integers 0..{most}, not scaled; {fix}"
        )
    size = max(1, TOGETHER // model.dims)
    for first in range(0, len(x), size):
        rows, at = x[first : first + size].flatten(1), 0
        groups = zip(model.head.factors, legal, process.split(rows), strict=True)
        for head, codes, part in groups:
            wrong = _not_a_number(part, head) if codes is None else _no_code(part, codes)
            if process.absent is not None:
                wrong &= part != process.absent
            if wrong.any():
                _refuse(part, wrong, codes, first, at)
            at += part.shape[1]


def _legal(process: "ForwardProcess", head: "Parametrization") -> Tensor | None:
    """Return a mask of the codes of each dimension, (D or 1, K); None for real numbers."""
    allowed = head.allowed()
    if allowed is None and process.codes:
        allowed = torch.ones(1, process.codes, dtype=torch.bool)
    return allowed


def _not_a_number(x: Tensor, head: "Parametrization") -> Tensor:
    """Mark infinite values, and NaN except in columns where cells may be missing."""
    return ~x.isfinite() & ~(x.isnan() & head.may_be_missing.to(x.device))


def _no_code(x: Tensor, codes: Tensor) -> Tensor:
    count = codes.shape[-1]
    whole = x.long()
    out = (x != whole) | (whole < 0) | (whole >= count)  # as int64: 256 as a byte would be 0
    if len(codes) == 1 and codes.all():
        return out
    known = codes.to(x.device).expand(x.shape[1], -1)
    place = whole.clamp(0, count - 1)
    return out | ~known[torch.arange(x.shape[1], device=x.device), place]


def _refuse(x: Tensor, wrong: Tensor, codes: Tensor | None, first: int, at: int) -> None:
    row, dim = wrong.nonzero()[0].tolist()
    value, rows = x[row, dim].item(), int(wrong.any(1).sum())
    more = f" (and {rows - 1} more rows have such values)" if rows > 1 else ""
    if codes is None:
        must = "a finite number"
    else:
        own = codes[min(dim, len(codes) - 1)].nonzero().flatten().tolist()
        must = f"one of the model's integers {own[0]}..{own[-1]}"
    raise ValueError(
        f"row {first + row} of x has {value:g} in dimension {at + dim}, which must be {must}{more}"
    )
