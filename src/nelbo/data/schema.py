"""What one example is, and a data set as tensors with their schema.

Data stay in the space they came in: integers 0..levels-1, or real numbers in their own units.
Scaling belongs to the model, so that its likelihood is one of the data.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["levels", "real"]


@dataclass(frozen=True)
class Schema:
    """What one example is; saved as JSON in a run.

    Args:
        kind: "levels", integers 0..levels-1 with a probability; or "real", with a density.
        shape: of one example: (C, H, W) for images, (D,) for vectors.
        levels: how many values one dimension has; None if real.

    Raises:
        ValueError: if these contradict each other.
    """

    kind: Kind
    shape: tuple[int, ...]
    levels: int | None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f'kind must be "levels" or "real"; got {self.kind!r}')
        if not self.shape or not all(_is_int(n) and n > 0 for n in self.shape):
            raise ValueError(f"shape must be positive integers, as in (1, 8, 8); got {self.shape}")
        if self.kind == "real" and self.levels is not None:
            raise ValueError(
                f"real data have no levels, so levels must be None; got {self.levels}"
            )
        if self.kind == "levels" and not (_is_int(self.levels) and (self.levels or 0) >= 2):
            raise ValueError(f"levels must be an integer of at least 2; got {self.levels}")

    def to_dict(self) -> dict[str, object]:
        """As JSON knows it: `Schema.from_dict(schema.to_dict()) == schema`."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: object) -> "Schema":
        """The schema that `to_dict` gave.

        Raises:
            ValueError: on a missing or unknown key, or an impossible value.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            got = sorted(map(str, values)) if isinstance(values, Mapping) else repr(values)
            raise ValueError(f"a schema has the keys {sorted(names)}; got {got}")
        if not isinstance(values["shape"], list | tuple):
            raise ValueError(f"shape must be a list of integers; got {values['shape']!r}")
        return cls(values["kind"], tuple(values["shape"]), values["levels"])


@dataclass(frozen=True)
class Dataset:
    """Examples of one schema.

    Args:
        source: the name of a built-in set, or an absolute path.
        schema: what one example is.
        splits: name to (N, *schema.shape), in the smallest storage: uint8, int16, int32 or
            int64 for levels, float32 or float64 for reals. `as_examples` widens a batch.
        notes: one sentence for each thing that was inferred and not asked for.
    """

    source: str
    schema: Schema
    splits: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def as_examples(x: Tensor) -> Tensor:
    """Stored examples in the type models take: int64 for levels, float64 for reals; (N, ...)."""
    return x.double() if x.is_floating_point() else x.long()


def fingerprint(x: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of a tensor's shape and values, any shape.

    The values count, not their storage: uint8, int64 and float32 of the same numbers agree.
    """
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    # In pieces, so that a large set of bytes never exists as float64; + 0.0 turns -0.0 into 0.0.
    for piece in x.detach().reshape(-1).split(1 << 20):
        digest.update((piece.to("cpu", torch.float64) + 0.0).numpy().astype("<f8").tobytes())
    return digest.hexdigest()[:16]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
