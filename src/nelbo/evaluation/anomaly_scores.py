r"""Anomaly scores of examples under a model, in nats; a larger score is more anomalous.

    bound        -ELBO(x), the bound on -log P(x)
    complexity   -ELBO(x) - C(x), where C is the length of a generic lossless code: simple
                 examples are cheap under any model (Serrà et al. 2020)
    typicality   | -ELBO(x) - its mean over the reference |: too cheap is anomalous as well

An example so far from all others that its bound overflows float64 has the score infinity.

Scores are compared with those of a reference, by their rank, 1 if above all of them, and their
percentile. The reference is the validation split: the model was fitted to the training examples,
so their bounds are lower than those of new examples of the same distribution. Among held-out
examples, the rank of a new one is uniform, whatever the model: a percentile above 95 has
probability 5 %. This requires that the noise of the estimate has the same distribution for all
examples, so each one has its own draws, stratified over the times, instead of the allocation that
is best for the mean of its set.

In a row of a table, the contribution of a column is its part of the bound on a grid, less the mean
of that part over the reference: in nats, above zero if the cell is unusual given the others. The
part of a category is -log P(x_i|visible cells), with cells made visible in a random order; the
parts of other columns are analogous.
"""

import csv
import io
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nelbo._utils.numerics import LOG_2
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.data.readers.pillow import png
from nelbo.data.schema import Schema
from nelbo.data.sources import Source
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import grid_of, times_of
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.example_bounds import replicates_of
from nelbo.evaluation.intervals import errors_beside
from nelbo.evaluation.per_dimension import by_column, by_dimension

REFERENCE = 1000  # examples of the reference, at most
CALLS = 24  # network calls per example by default
REPLICATES = 4  # replicates of an example, for its standard error
MOST = 3  # columns named for a row, those with the largest contributions
STEPS = 32  # steps of the grid for contributions of columns, one network call each


def code_length(x: Tensor, schema: Schema) -> Tensor:
    """Return C(x) of examples of integers, (N,), nats: PNG for 8-bit images, else zlib.

    Raises:
        ValueError: if the data are real numbers or tables, which have no such code length.
    """
    if schema.levels is None:
        raise ValueError(
            "complexity compares the bound with the length of a lossless code, which real numbers"
            " and tables do not have; try --score bound or --score typicality"
        )
    image = len(schema.shape) == 3 and schema.shape[0] in (1, 3, 4) and schema.levels <= 256
    code = _png if image else _zlib
    lengths = [len(code(example)) for part in x.split(1024) for example in part.numpy()]
    return torch.tensor(lengths, dtype=torch.float64) * 8 * LOG_2


def _png(example: np.ndarray) -> bytes:
    pixels = np.moveaxis(example.astype(np.uint8), 0, -1)
    return png(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _zlib(example: np.ndarray) -> bytes:
    return zlib.compress(np.ascontiguousarray(example).tobytes(), 9)


def _bound(nats: Tensor, x: Tensor, schema: Schema, mean: float) -> Tensor:
    return nats


def _complexity(nats: Tensor, x: Tensor, schema: Schema, mean: float) -> Tensor:
    return nats - code_length(x, schema)


def _typicality(nats: Tensor, x: Tensor, schema: Schema, mean: float) -> Tensor:
    return (nats - mean).abs()


#: name to score(nats (N,), examples, schema, mean nats of the reference), (N,), nats
SCORES: Mapping[str, Callable[[Tensor, Tensor, Schema, float], Tensor]] = {
    "bound": _bound,
    "complexity": _complexity,
    "typicality": _typicality,
}


@dataclass(frozen=True, repr=False)
class Scored:
    """Scores of N examples and of M reference examples, if any; in nats but for percentile, rank.

    Args:
        score: of the examples, (N,).
        nats: the bound on -log P(x), (N,).
        standard_error: Monte Carlo error of the bound, (N,); NaN where it is unknown.
        reference: scores of the reference, (M,); None for no reference.
        bits: factor from nats to bits/dim; None for a density and for texts.
        columns: names of the columns of a table.
        excess: contribution of each column, (N, len(columns)), nats; one draw of each term.
        sizes: of texts, the number of scored tokens, characters and bytes of each, (N,), by the
            name of one, of those that are known.
        notes: a sentence for each choice that the meaning of the bound depends on.
    """

    score: Tensor
    nats: Tensor
    standard_error: Tensor
    reference: Tensor | None
    bits: float | None
    columns: tuple[str, ...] = ()
    excess: Tensor | None = None
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.score)

    def __repr__(self) -> str:
        some = ", ".join(f"{score:.4g}" for score in self.score[:4].tolist())
        found = f"anomaly scores of {len(self)} examples, nats: {some}"
        found += ", .." if len(self) > 4 else ""
        if self.reference is None:
            return f"{found}; against none, so without ranks"
        high = int((self.percentile > 95).sum())
        return f"{found}; {high} above 95 % of {len(self.reference)} reference examples"

    def _usual(self) -> Tensor:
        if self.reference is None:
            raise ValueError("rank and percentile need examples to compare with: give against=")
        return self.reference

    @property
    def rank(self) -> Tensor:
        """Rank: one more than the number of reference scores that are larger, (N,)."""
        return 1 + (self._usual() > self.score[:, None]).sum(1)

    @property
    def percentile(self) -> Tensor:
        """Share of reference scores that are smaller, ties counted half, in per cent; (N,)."""
        below = (self._usual() < self.score[:, None]).double()
        equal = (self._usual() == self.score[:, None]).double()
        return 100 * (below + equal / 2).mean(1)

    def csv(self) -> bytes:
        """Return a CSV file with one line per example, in the order of the data."""
        columns: dict[str, list] = {
            "example": list(range(len(self.score))),
            "score": self.score.tolist(),
            "nats": self.nats.tolist(),
            "standard_error": self.standard_error.tolist(),
        }
        if self.reference is not None:
            columns |= {"rank": self.rank.tolist(), "percentile": self.percentile.tolist()}
        for unit, size in self.sizes.items():
            columns[f"{unit}s"] = size.tolist()
            columns[f"bits_per_{unit}"] = (self.nats / size / LOG_2).tolist()
            columns[f"bits_per_{unit}_error"] = (self.standard_error / size / LOG_2).tolist()
        if self.bits is not None:
            columns["bits_per_dim"] = (self.nats * self.bits).tolist()
        if self.excess is not None:
            most = self.excess.topk(min(MOST, len(self.columns)))
            for k, (nats, index) in enumerate(zip(most[0].T, most[1].T, strict=True), 1):
                columns[f"column_{k}"] = [self.columns[i] for i in index.tolist()]
                columns[f"nats_{k}"] = nats.tolist()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
        return text.getvalue().encode()


def _overflown(nats: Tensor) -> Tensor:
    """Return the nats, infinite where they are NaN because numbers overflowed."""
    return torch.where(nats.isnan(), math.inf, nats)


def first(batch: Batch) -> Batch:
    """Return the first REFERENCE of the examples."""
    return batch[:REFERENCE]


class Scorer:
    """Function from examples to their anomaly scores, for a definition and a reference.

    Args:
        name: of the score, one of SCORES.
        schema: of the examples.
        model: the model.
        reference: examples to compare with, or a `Batch`; the first thousand are used.
        calls: network calls per example, of which a sixth or more decode; 24 where left out.
        seed: of everything random.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: if there is no such score, or it is undefined for such data.
    """

    def __init__(
        self,
        name: str,
        schema: Schema,
        model: Model,
        reference: Tensor | Batch,
        *,
        calls: int | None = None,
        seed: int = 0,
        track: Track = iter,
    ) -> None:
        if name not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}; got {name!r}")
        self.define, self.schema = SCORES[name], schema
        self.calls = CALLS if calls is None else integer("calls", calls)
        seed = integer("seed", seed, 0)
        if self.calls < 2 * REPLICATES:
            raise ValueError(
                f"calls must be at least {2 * REPLICATES}, for an error of each example; got"
                f" {calls}; try {CALLS}"
            )
        self.seed, self.track = seed, track
        self.model, known = model, first(Batch.of(reference))
        self.define(torch.zeros(1), known.x[:1], schema, 0.0)  # raises before the work
        self.usual = self._of_columns(known).mean(0)
        self.replicates, self.counts = self._nats(known), model.scored_counts(known)
        nats = self.replicates.mean(1)
        self.mean = nats.mean().item()
        self.reference = self.define(nats, known.x, schema, self.mean)

    def __call__(self, x: Source | Batch) -> Scored:
        """Return the scores of examples x, (N, *shape), or of a `Batch`."""
        batch, model = batch_of(self.model, x), self.model
        each = self._nats(batch)
        counts = model.scored_counts(batch)
        both = None if counts is None or self.counts is None else (self.counts, counts)
        nats, error = each.mean(1), errors_beside(self.replicates, each, both)
        error = torch.where(nats.isfinite(), error, math.inf)
        score = self.define(nats, batch.x, self.schema, self.mean)
        sizes = self.schema.sizes(batch.x)
        bits = None if model.decoder.density or sizes else 1 / (model.dims * LOG_2)
        found = Scored(score, nats, error, self.reference, bits, sizes=sizes)
        if not self.schema.columns:
            return found
        names = tuple(column.name for column in self.schema.columns)
        excess = _overflown(self._of_columns(batch) - self.usual)
        return replace(found, columns=names, excess=excess)

    def _of_columns(self, batch: Batch) -> Tensor:
        """Return the nats of each column of each row, (N, C); (N, 0) without columns."""
        known = self.schema.columns
        if not known:
            return torch.zeros(len(batch), 0)
        grid = grid_of(self.model, STEPS)
        (bound,) = by_dimension(self.model, batch, grid, seed=self.seed)
        return by_column(-bound.elbo, known)

    def _nats(self, batch: Batch) -> Tensor:
        """Return the bound on -log P(x) of each example and replicate; (N, REPLICATES)."""
        model, draws = self.model, self.calls // REPLICATES - 1
        times = times_of(model, None)
        found = replicates_of(model, batch, times, draws, REPLICATES, self.seed, self.track)
        return _overflown(-found.elbo)
