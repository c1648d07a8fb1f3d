"""Convert the arrays found by a reader to a schema, stored tensors and splits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from nelbo.data.found import Found, Stored, pieces
from nelbo.data.rows import Rows
from nelbo.data.schema import Schema
from nelbo.data.splits import ADVICE, SALT, SPLITS

#: beyond this many values per dimension, integers are better treated as real or binned
MOST_LEVELS = 65536

#: advice for images of real numbers
TO_LEVELS = (
    "if they are pixels that were {how}, save np.rint({back}).astype(np.uint8): levels,"
    " whose probability has bits/dim"
)
FROM_UNIT = TO_LEVELS.format(how="divided by 255", back="255 * x")
FROM_SIGNED = TO_LEVELS.format(how="scaled to [-1, 1]", back="127.5 * (x + 1)")
#: distance of a scaled level from a whole number, at most, by float32
ROUNDING = 0.02


def infer(found: Found, levels: int | None) -> tuple[Schema, list[str]]:
    """Return the schema of the examples found, and notes on what was inferred.

    Args:
        found: the arrays.
        levels: the number of levels, if the user gave one.

    Raises:
        ValueError: parts differ in shape or kind, or integers cannot be levels.
    """
    first, *rest = found.parts
    shape, integers = found.parts[first].shape[1:], _integers(found.parts[first])
    for part in rest:
        x = found.parts[part]
        if x.shape[1:] != shape or _integers(x) != integers:
            raise ValueError(
                f"the examples of {found.label(first)} are {_describe(found.parts[first])} but "
                f"those of the {part} split are {_describe(x)}; save all splits alike"
            )
    if found.tokenizer is not None:
        return Schema("levels", shape, found.levels, tokenizer=found.tokenizer), []
    if found.alphabet is not None:
        return Schema("levels", shape, found.levels, alphabet=found.alphabet), []
    if levels is not None:
        return Schema("levels", shape, levels), []
    if not integers:
        notes = []
        if all(_whole(x) for x in found.parts.values()):
            notes = [
                "all values are whole numbers in a real type; --levels K counts them as levels"
            ]
        elif len(shape) == 3 and all(_within(x, 0) for x in found.parts.values()):
            notes = [f"real numbers in [0, 1], so a density, in nats; {FROM_UNIT}"]
        elif len(shape) == 3 and all(_within(x, -1) for x in found.parts.values()):
            notes = [f"real numbers in [-1, 1], so a density, in nats; {FROM_SIGNED}"]
        return Schema("real", shape, None), notes
    return _inferred_levels(found, shape)


def _inferred_levels(found: Found, shape: tuple[int, ...]) -> tuple[Schema, list[str]]:
    for part, x in found.parts.items():
        _refuse_negative(x, found.label(part))
    low = min(int(x.min()) for x in found.parts.values())
    high = max(int(x.max()) for x in found.parts.values())
    if low == high:
        raise ValueError(
            f"all values of {found.source} are {low}, so there is nothing to learn; if that is"
            " intended, give the number of possible levels with --levels"
        )
    if found.levels is not None:
        return Schema("levels", shape, found.levels), []
    if high >= MOST_LEVELS:
        raise ValueError(
            f"{found.source} has integers up to {high}, more than {MOST_LEVELS} levels; save "
            f"them as float64 to model a density, or bin them"
        )
    if high > 127 and all(x.dtype == np.uint8 for x in found.parts.values()):
        return Schema("levels", shape, 256), ["8-bit data: 256 levels; --levels overrides"]
    if high > 32767 and all(x.dtype == np.uint16 for x in found.parts.values()):
        return Schema("levels", shape, 65536), ["16-bit data: 65536 levels; --levels overrides"]
    return Schema("levels", shape, high + 1), [f"{high + 1} levels found; --levels overrides"]


def unscaled(found: Found, levels: int) -> Found:
    """Return parts of real numbers as the levels that were scaled to [0, 1] or [-1, 1], noted.

    Parts that are not such are returned as they are.

    Raises:
        ValueError: all numbers are 0 or 1, which could be levels or black and white.
    """
    parts, notes = dict(found.parts), []
    for part, x in parts.items():
        if not _within(x, -1) or isinstance(x, Rows):
            continue
        if levels > 2 and bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"{found.label(part)} holds the real numbers 0 and 1 only: give integers, 0 and"
                f" {levels - 1} for black and white, or 0 and 1 for the two lowest levels"
            )
        for low in (0, -1) if x.min() >= 0 else (-1,):
            back = (levels - 1) * (x.astype(np.float64) - low) / (1 - low)
            if np.abs(back - np.rint(back)).max() < ROUNDING:
                parts[part] = np.rint(back).astype(_smallest(levels))
                notes.append(
                    f"{found.label(part)} read as levels 0..{levels - 1} that were scaled to"
                    f" [{low}, 1]"
                )
                break
    return replace(found, parts=parts, notes=(*found.notes, *notes))


def store(found: Found, schema: Schema) -> dict[str, Tensor]:
    """Return the parts as tensors (N, *schema.shape) in the schema's storage type, or as Rows.

    Rows stay unread, and are typed as the tensors that they replace.

    Raises:
        ValueError: a part has another shape, or values that the schema cannot hold.
    """
    return {part: _store(x, found.label(part), schema) for part, x in found.parts.items()}


def _store(x: Stored, label: str, schema: Schema) -> Tensor:
    if not len(x):
        raise ValueError(f"{label} is empty: its shape is {x.shape}; give at least 1 example")
    if x.shape[1:] != schema.shape:
        raise ValueError(
            f"the examples of {label} have the shape {x.shape[1:]} where {schema.shape} is "
            "needed; give data of that shape"
        )
    if schema.levels is None:
        if _integers(x):
            raise ValueError(
                f"{label} holds integers where real numbers are needed; if they are in the same "
                f"units, save them as float64"
            )
        return torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, Rows) and not _whole(x):
        odd, most = x[x != np.rint(x)][0], schema.levels - 1
        fix = "round it if it is a level; for a density of real numbers, train without --levels"
        if _within(x, -1):
            scaled, back = ("[0, 1]", "x") if x.min() >= 0 else ("[-1, 1]", "(x + 1) / 2")
            back = f"np.rint({most} * {back}).astype(int)"
            fix = f"if these are levels scaled to {scaled}, give {back}"
        raise ValueError(
            f"{label} holds {odd:g}, which is not one of the {schema.levels} levels 0..{most};"
            f" {fix}"
        )
    _refuse_negative(x, label)
    codes = schema.levels + (schema.absent is not None)
    if x.max() >= codes:
        high = int(x.max())
        raise ValueError(
            f"{label} holds the value {high}, beyond the {schema.levels} levels "
            f"0..{schema.levels - 1}; rescale it, or take a model of more: leave its levels"
            f" out if you gave them, or train with --levels {high + 1} or more"
        )
    if isinstance(x, Rows):
        return cast(Tensor, x)
    # only a split with a shorter text needs the code that says so
    used = max(schema.levels, int(x.max()) + 1)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=_smallest(used)))


def split(
    parts: Mapping[str, Tensor], source: str, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return train, validation and test; a missing one is a tenth of train, drawn by the seed.

    Examples keep their order in the file within each split.

    Raises:
        ValueError: there is nothing to train on, or too little to split.
    """
    train = parts["train"] if "train" in parts else parts.get("all")
    if train is None:
        raise ValueError(
            f"{source} has no training examples, only {', '.join(parts)}; name them train, or"
            f" {ADVICE}"
        )
    missing = [name for name in ("validation", "test") if name not in parts]
    if not missing:
        return {name: parts[name] for name in SPLITS}, []
    count = len(train)
    if count <= len(missing):
        raise ValueError(
            f"{source} has {count} training examples, too few to split {' and '.join(missing)} "
            f"off; at least {len(missing) + 1} are needed"
        )
    take = max(1, count // 10)
    # Raw bits of PCG64 are the same in every numpy; those of Generator.permutation may change.
    # The salt separates them from a user's default_rng(seed), which may have made the data.
    bits = np.random.PCG64([SALT, seed]).random_raw(count)
    order = torch.from_numpy(bits.argsort(kind="stable"))
    pieces = order.split([take] * len(missing) + [count - take * len(missing)])
    new = {
        name: _take(train, piece.sort().values)
        for name, piece in zip((*missing, "train"), pieces, strict=True)
    }
    splits = {name: new[name] if name in new else parts[name] for name in SPLITS}
    how = "split 80/10/10" if len(missing) == 2 else f"{missing[0]} is 10% of train"
    sizes = ", ".join(f"{len(x)} {name}" for name, x in splits.items())
    return splits, [f"{how} by seed {seed}: {sizes}"]


def together(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate stored examples."""
    if isinstance(parts[0], Rows):
        return cast(Tensor, parts[0].join(cast(Sequence[Rows], parts[1:])))
    return torch.cat(list(parts))


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return cast(Tensor, x.take(rows.numpy())) if isinstance(x, Rows) else x[rows]


def refuse_constant(train: Tensor, source: str) -> None:
    """Raise ValueError if a dimension of the real examples (N, ...) is constant."""
    if len(train) < 2:
        raise ValueError(
            f"{source} has only {len(train)} training example; a density needs at least 2"
        )
    constant = train.amin(0) == train.amax(0)
    if not constant.any():
        return
    index = constant.nonzero()[0].tolist()
    where = f"column {index[0]}" if len(index) == 1 else f"pixel {tuple(index)}"
    others = int(constant.sum()) - 1
    pixels = train.ndim == 4 and train.amin() >= 0 and train.amax() <= 1
    more = f"; {FROM_UNIT}" if pixels else ""
    raise ValueError(
        f"{where} of {source} is always {train[(0, *index)].item():g} in the training split"
        f"{f' (and {others} more are constant)' if others else ''}: a density is unbounded "
        f"there; drop it, or add noise to it{more}"
    )


def _integers(x: Stored) -> bool:
    return x.dtype.kind in "bui"


def _within(x: Stored, low: int) -> bool:
    """Return whether all values lie in [low, 1], like those of scaled images."""
    return not _integers(x) and not isinstance(x, Rows) and x.min() >= low and x.max() <= 1


def _whole(x: Stored) -> bool:
    return _integers(x) or all(
        bool((some == np.rint(some)).all()) for some in pieces(cast(np.ndarray, x))
    )


def _describe(x: Stored) -> str:
    return f"{'integers' if _integers(x) else 'real numbers'} of the shape {x.shape[1:]}"


def _refuse_negative(x: Stored, label: str) -> None:
    if x.min() < 0:
        raise ValueError(
            f"{label} has negative integers, the least is {int(x.min())}; add {-int(x.min())} so "
            f"that levels begin at 0, or save it as float64 to model a density"
        )


def _smallest(levels: int) -> type[np.generic]:
    if levels <= 1 << 8:
        return np.uint8
    if levels <= 1 << 15:
        return np.int16
    return np.int32 if levels <= 1 << 31 else np.int64
