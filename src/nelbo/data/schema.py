"""The schema of an example, and a data set as tensors with a schema.

Data stay in their original space: integers 0..levels-1, or real numbers in their own units.
Scaling belongs to the model, so that its likelihood is one of the data.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor
from torch.nn.functional import one_hot
from typing_extensions import override

from nelbo._utils.numerics import widened
from nelbo._utils.validation import Record
from nelbo.data.columns import Column, places
from nelbo.data.rows import Rows
from nelbo.data.tokenizer import Tokenizer

Kind = Literal["levels", "real", "table"]


@dataclass(frozen=True)
class Label(Record):
    """A label that examples are conditioned on: one of several classes, or a real number.

    Args:
        name: name of the label, such as "class".
        classes: names of the classes; empty for a real number.
        mean: mean of a real number in the training data.
        spread: its standard deviation there.

    Raises:
        ValueError: these values contradict each other.
    """

    name: Annotated[str, MinLen(1)]
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    spread: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"{self.name} must have at least 2 distinct classes; got {self.classes}"
            )

    @property
    def features(self) -> int:
        """Number of features that represent the label to a network."""
        return len(self.classes) or 2

    def encode(self, values: Tensor) -> Tensor:
        """Encode values (N,) as (N, features): one-hot, or standardised with a constant 1.

        All features are zero only if the value is missing, NaN.
        """
        known = ~values.isnan()
        if self.classes:
            codes = torch.where(known, values, 0).long()
            return one_hot(codes, len(self.classes)).double() * known[:, None]
        values = torch.where(known, (values.double() - self.mean) / self.spread, 0)
        return torch.stack([values, known.double()], 1)

    def describe(self) -> str:
        """Describe the possible values."""
        if not self.classes:
            return f"{self.name} is a number"
        few = ", ".join(self.classes[:12]) + (", .." if len(self.classes) > 12 else "")
        return f"{self.name} is one of {few}"


@dataclass(frozen=True)
class Schema(Record):
    """The schema of one example; saved as JSON in a run.

    Args:
        kind: "levels", integers 0..levels-1 with a probability; "real", with a density; or
            "table", with a density if one of the columns is real.
        shape: shape of one example: (C, H, W) for images, (D,) for vectors.
        levels: number of values of one dimension; None if real or a table.
        condition: the labels that the distribution of the examples is conditioned on.
        alphabet: for text, the sorted characters of the levels; the last level stands for any
            other character. "" if the levels are bytes; None if the data are not text.
        tokenizer: for text, whose tokens the levels are, in place of an alphabet.
        columns: the columns of a table; `columns` gives the place of each in an example.
        left_out: names of the other columns of the table, which the model does not know.

    Raises:
        ValueError: these values contradict each other.
    """

    kind: Kind
    shape: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)]
    levels: int | None
    condition: tuple[Label, ...] = ()
    alphabet: str | None = None
    tokenizer: Tokenizer | None = None
    columns: tuple[Column, ...] = ()
    left_out: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "levels" and self.levels is not None:
            raise ValueError(
                f"{self.kind} data have no levels, so levels must be None; got {self.levels}"
            )
        if self.kind == "levels" and (self.levels is None or self.levels < 2):
            raise ValueError(f"levels must be an integer of at least 2; got {self.levels}")
        if self.alphabet is not None:
            count = len(self.alphabet) + 1 if self.alphabet else 256
            sorted_once = self.alphabet == "".join(sorted(set(self.alphabet)))
            if not sorted_once or len(self.shape) != 1 or self.levels != count:
                raise ValueError(
                    f"an alphabet of text is sorted and goes with {count} levels and a shape"
                    f" (L,); got {self.alphabet!r}, {self.levels} levels and {self.shape}"
                )
        if self.tokenizer is not None and (self.alphabet is not None or len(self.shape) != 1):
            raise ValueError(
                f"tokens of text have no alphabet, and the shape (L,); got the shape {self.shape}"
            )
        if (self.kind == "table") != bool(self.columns):
            raise ValueError(
                f"columns are for a table; the schema of {self.kind} data has {self.columns}"
            )
        names = [column.name for column in self.columns]
        if len({*names}) < len(names):
            raise ValueError(f"columns must have different names; got {names}")
        if self.columns and self.shape != (len(places(self.columns)),):
            raise ValueError(
                f"these columns make examples of shape ({len(places(self.columns))},);"
                f" got {self.shape}"
            )

    @staticmethod
    def of_table(columns: Iterable[Column], names: Iterable[str] = ()) -> "Schema":
        """Return the schema of a table with these columns; `names` are all its column names."""
        columns = tuple(columns)
        known = {column.name for column in columns}
        left_out = tuple(name for name in names if name not in known)
        shape = (len(places(columns)),)
        return Schema("table", shape, None, columns=columns, left_out=left_out)

    @property
    def text(self) -> bool:
        """Whether the examples are chunks of text."""
        return self.alphabet is not None or self.tokenizer is not None

    @property
    def absent(self) -> int | None:
        """The code of a place beyond the end of a shorter text; None if the data are not text."""
        return self.levels if self.text else None

    @property
    def symbol(self) -> str:
        """The name of a symbol of text."""
        return "token" if self.tokenizer is not None else "character" if self.alphabet else "byte"

    def rates(self, bits_per_dim: float | None, x: Tensor) -> dict[str, float]:
        """Return a bound per symbol of a text and its perplexity; {} if the data are not text.

        Of tokens, it is also that of a character and of a byte. The perplexity is 2 to the bits
        per symbol: the number of equally likely symbols that would be as hard to predict.

        Args:
            bits_per_dim: the mean bound.
            x: the examples, (N, *shape), in order.
        """
        if not self.text or bits_per_dim is None:
            return {}
        sizes = {unit: int(size.sum()) for unit, size in self.sizes(x).items()}
        if self.tokenizer is not None and "byte" not in sizes:
            text = self.tokenizer.decode(x[:][x[:] != self.absent].tolist())
            sizes |= {"character": len(text), "byte": len(text.encode())}
        count = sizes[self.symbol]
        bits = {f"bits_per_{unit}": bits_per_dim * (count / size) for unit, size in sizes.items()}
        return bits | {"perplexity": 2**bits_per_dim}

    def sizes(self, x: Tensor) -> dict[str, Tensor]:
        """Return the number of symbols of each text, (N,), by their name; {} for other data.

        Of tokens, it is also that of characters and of bytes, where the tokenizer joins the text
        of tokens (`Tokenizer.sizes`). A character that two texts divide counts in the first.

        Args:
            x: the examples, (N, *shape).
        """
        if not self.text:
            return {}
        ids = x[:].long()
        found = {self.symbol: ids.ne(self.levels or 0).sum(1)}
        each = None if self.tokenizer is None else self.tokenizer.sizes()
        if each is not None:
            known = torch.cat([each, each.new_zeros(1, 2)])[ids]
            found |= {"character": known[..., 0].sum(1), "byte": known[..., 1].sum(1)}
        return found

    @property
    def density(self) -> bool:
        """Whether the likelihood is a density, in nats; otherwise it is a probability, in bits."""
        return self.kind == "real" or any(column.kind == "real" for column in self.columns)

    @override
    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, without those of columns at their default."""
        columns = [column.to_dict() for column in self.columns]
        made = {"shape": list(self.shape), "columns": columns, "left_out": list(self.left_out)}
        return super().to_dict() | made


@dataclass(frozen=True)
class Dataset:
    """Examples of one schema.

    Args:
        source: the name of a built-in set, an absolute path, or a URL.
        schema: the schema of one example.
        splits: name to (N, *schema.shape), in the smallest storage: uint8, int16, int32 or
            int64 for levels, float32 or float64 for reals. `as_examples` widens a batch.
        notes: one sentence for each inferred property.
        labels: name of a split to (N, len(schema.condition)), float64: the index of each
            example's class, or its number; NaN if it has none.
    """

    source: str
    schema: Schema
    splits: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    labels: dict[str, Tensor] = field(default_factory=dict)

    def whole(self) -> "Dataset":
        """Return the data without texts that are shorter than others, and a note if there are."""
        if self.schema.absent is None:
            return self
        keep = {name: (x[:] < self.schema.absent).all(1) for name, x in self.splits.items()}
        if all(k.all() for k in keep.values()):
            return self
        short = next((name for name, k in keep.items() if not k.any()), None)
        if short is not None:
            raise ValueError(
                f"{self.source} is shorter than a chunk of {self.schema.shape[0]}, and a model of"
                " values, not of symbols, takes whole chunks; give more text"
            )
        note = "a model of values, not of symbols, takes whole chunks: the last ones are left out"
        splits = {name: x[keep[name]] for name, x in self.splits.items()}
        return replace(self, splits=splits, notes=(*self.notes, note))

    def split(self, name: str) -> Tensor:
        """Return the examples of a split.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self.splits and [*self.splits] == ["all"]:
            raise ValueError(f"these data have no splits; leave split out; got {name!r}")
        if name not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}; got {name!r}")
        return self.splits[name]


def as_examples(x: Tensor) -> Tensor:
    """Convert stored examples to the type of models: int64 for levels, float64 for reals; (N,
    ...)."""
    if isinstance(x, Rows):
        return x  # widened when they are read
    return widened(x)


def fingerprint(x: Tensor) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a tensor's shape and values, any shape.

    The values count, not their storage: uint8, int64 and float32 of the same numbers agree. For
    the rows of large files, the bytes of the files are hashed instead.
    """
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    known = x.fingerprint() if isinstance(x, Rows) else None
    if known is not None:
        digest.update(known)
        return digest.hexdigest()[:16]
    # In pieces, so that a large set of bytes never exists as float64; + 0.0 turns -0.0 to 0.0.
    chunks = x.chunks() if isinstance(x, Rows) else [x.detach()]
    for piece in (piece for chunk in chunks for piece in chunk.reshape(-1).split(1 << 20)):
        digest.update((piece.to("cpu", torch.float64) + 0.0).numpy().astype("<f8").tobytes())
    return digest.hexdigest()[:16]
