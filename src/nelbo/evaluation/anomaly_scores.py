r"""How strange each example is to a model: scores by name, in nats, larger is stranger.

    bound        -ELBO(x), the bound on -log P(x)
    complexity   -ELBO(x) - C(x), for C the length of a lossless code that knows nothing of the
                 data: what is simple is cheap under any model (Serrà et al. 2020)
    typicality   | -ELBO(x) - the mean over the reference |: too cheap is strange as well

Examples too far from all others for float64 to hold their bound have the score infinity.

A score is told beside those of a reference: its rank there, 1 for stranger than all, and its
percentile. The reference is the validation split. To the training examples the model was fitted,
so their bounds are lower than those of new examples of the same law; among held-out ones such
an example's rank is uniform, whatever the model: a percentile above 95 comes with probability 5 %.
For that the noise of the estimate must have one law for all: each example gets its own draws,
stratified over the times, and not the allocation that is best for the mean of its set.

Of a row of a table, what its columns contribute is their part of the bound on a grid less the mean
of that part over the reference: in nats, above zero where the cell is odd given the others. A
category's part is that of -log P(x_i|what shows) in a random order, and so are parts alike.
"""

import csv
import io
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nelbo._utils.batch_rng import gather_rows, local_shard, shard_rng
from nelbo._utils.numerics import LOG_2, seeded
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.data import Schema
from nelbo.data.readers.pillow import png
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.times import ContinuousTime, TimeGrid, elbo, even_times
from nelbo.evaluation.intervals import errors
from nelbo.evaluation.per_dimension import by_column, by_dimension

REFERENCE = 1000  # examples, at most
CALLS = 24  # network calls per example, if nothing else is asked for
REPLICATES = 4  # of them, for the standard error of an example
MOST = 3  # columns that are named for a row, those that contribute most
STEPS = 32  # of the grid on which columns are told apart, a network call each


def code_length(x: Tensor, schema: Schema) -> Tensor:
    """C(x) of each example of integers, (N,), nats: PNG for images of 8 bits, else zlib.

    Raises:
        ValueError: real numbers or mixed columns, whose probability no code of bytes matches.
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


@dataclass(frozen=True)
class Scored:
    """Scores of N examples and of the M of the reference; all but percentile and rank in nats.

    Args:
        score: (N,).
        nats: the bound on -log P(x), (N,).
        standard_error: its Monte Carlo part, (N,); NaN where it is not known.
        reference: the scores of the reference, (M,).
        bits: from nats to bits/dim, None for a density.
        columns: the names of a table's columns.
        excess: what each contributes, (N, len(columns)), nats; one draw of each term.
    """

    score: Tensor
    nats: Tensor
    standard_error: Tensor
    reference: Tensor
    bits: float | None
    columns: tuple[str, ...] = ()
    excess: Tensor | None = None

    @property
    def rank(self) -> Tensor:
        """One more than the scores of the reference that are larger, (N,)."""
        return 1 + (self.reference > self.score[:, None]).sum(1)

    @property
    def percentile(self) -> Tensor:
        """Share of the reference that is less strange, ties as half, in per cent; (N,)."""
        below = (self.reference < self.score[:, None]).double()
        equal = (self.reference == self.score[:, None]).double()
        return 100 * (below + equal / 2).mean(1)

    def csv(self) -> bytes:
        """One line per example, in the order of the data."""
        columns: dict[str, list] = {
            "example": list(range(len(self.score))),
            "score": self.score.tolist(),
            "nats": self.nats.tolist(),
            "standard_error": self.standard_error.tolist(),
            "rank": self.rank.tolist(),
            "percentile": self.percentile.tolist(),
        }
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
    """The nats, infinite where numbers so far out entered that their squares have no value."""
    return torch.where(nats.isnan(), math.inf, nats)


def first(batch: Batch) -> Batch:
    """Return the first REFERENCE of the examples."""
    return batch[:REFERENCE]


class Scorer:
    """Scores under one definition and one reference.

    Args:
        name: of the score, one of SCORES.
        schema: what an example is.
        model: the model.
        reference: examples to compare with, or a `Batch`; the first thousand are used.
        calls: network calls per example, of which a sixth and more decode; 24 where left out.
        seed: everything random follows from it.
        track: wraps what takes time, for a progress bar.

    Raises:
        ValueError: no such score, or one that makes no sense for such data.
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
                f"calls must be at least {2 * REPLICATES}, the least that gives an example its"
                f" error; got {calls}; try {CALLS}"
            )
        self.seed, self.track = seed, track
        self.model, known = model, first(Batch.of(reference))
        self.define(torch.zeros(1), known.x[:1], schema, 0.0)  # refuses before the work
        self.usual = self._of_columns(known).mean(0)
        self.replicates = self._nats(known)
        nats = self.replicates.mean(1)
        self.mean = nats.mean().item()
        self.reference = self.define(nats, known.x, schema, self.mean)

    def __call__(self, x: Tensor | Batch) -> Scored:
        """Return the scores of examples x, (N, *shape), or of a `Batch`."""
        batch, model = Batch.of(x), self.model
        each = self._nats(batch)
        nats, error = each.mean(1), _overflown(errors([each], self.replicates))
        score = self.define(nats, batch.x, self.schema, self.mean)
        bits = None if model.decoder.density else 1 / (model.dims * LOG_2)
        found = Scored(score, nats, error, self.reference, bits)
        if not self.schema.columns:
            return found
        names = tuple(column.name for column in self.schema.columns)
        excess = _overflown(self._of_columns(batch) - self.usual)
        return replace(found, columns=names, excess=excess)

    def _of_columns(self, batch: Batch) -> Tensor:
        """Nats of each column of each row, (N, C); (N, 0) where there are no columns."""
        known = self.schema.columns
        if not known:
            return torch.zeros(len(batch), 0)
        grid = TimeGrid(even_times(self.model.process.schedule, STEPS, STEPS))
        (bound,) = by_dimension(self.model, batch, grid, seed=self.seed)
        return by_column(-bound.elbo, known)

    def _nats(self, batch: Batch) -> Tensor:
        """The bound on -log P(x) of each example, in replicates; (N, REPLICATES)."""
        model, draws = self.model, self.calls // REPLICATES - 1
        rows = max(1, model.rows // draws)
        parts = []
        with measuring(model, batch):
            for begin in self.track(range(0, len(batch), rows)):
                block = torch.arange(begin, min(begin + rows, len(batch)))
                with seeded(self.seed, begin), local_shard(len(block)) as part:
                    few = batch[part.of(block)].to(model.device)
                    each = [self._draw(model, few, draws) for _ in range(REPLICATES)]
                parts.append(gather_rows(part, torch.stack(each, 1).cpu()))
        return _overflown(torch.cat(parts))

    @staticmethod
    def _draw(model: Model, batch: Batch, draws: int) -> Tensor:
        with shard_rng():
            within = torch.rand(len(batch), 1, dtype=torch.float64)
        u = (torch.arange(draws) + within) / draws
        return -elbo(model, batch, ContinuousTime(model.process.schedule.start), u).elbo
