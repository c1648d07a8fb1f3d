"""Compare synthetic rows with new real ones: pairs of columns, copies, and use for prediction.

There are three kinds of rows: those seen in training, real ones that were held out, and synthetic
ones. Each measurement is made for synthetic rows and for equally many held-out rows, both against
the rows seen: a perfect model reaches not 0 or 1 but the value of the held-out rows.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.numerics import seeded
from nelbo.data.columns import Column, Place
from nelbo.data.schema import as_examples
from nelbo.report import figures
from nelbo.report.tables import known

SEEN = 20_000  # rows of the training data that others are compared with, at most
TARGETS = 12  # columns that are predicted, at most
TREES = 100
BINS = 20  # in the histogram of distances


@dataclass(frozen=True)
class Features:
    """Columns as numbers, (N, F), and the index of the column that each belongs to, (F,).

    A number stands for itself or for its rank, 0 if missing, followed by an indicator of missing
    cells; a category becomes one indicator per value.
    """

    values: np.ndarray
    column: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, with their columns as `tables.known` returns them."""

    columns: list[tuple[Place, np.ndarray]]

    @staticmethod
    def of(x: Tensor, columns: tuple[Column, ...]) -> "Rows":
        """Return examples x (N, D) as rows."""
        return Rows(known(x, columns))

    def __len__(self) -> int:
        return len(self.columns[0][1])

    def first(self, count: int) -> "Rows":
        """Return the first `count` rows."""
        return Rows([(place, v[:count]) for place, v in self.columns])

    def features(self, scale: "Rows | None" = None) -> Features:
        """Return numbers in standard deviations of the rows `scale`; as ranks by default."""
        parts, owners = [], []
        for i, (place, v) in enumerate(self.columns):
            missing = np.isnan(v)
            if place.column.group == "symbols":
                part = np.stack([v == code for code in range(place.codes)], 1) / np.sqrt(2)
            elif scale is None:
                part = (_ranks(v) - ((~missing).sum() + 1) / 2)[:, None]
            else:
                of = scale.columns[i][1]
                spread = np.nanstd(of) or 1.0
                part = ((v - np.nanmean(of)) / spread)[:, None]
            indicator = [missing[:, None]] if place.column.missing else []
            parts.append(np.hstack([np.nan_to_num(part), *indicator]))
            owners += [i] * parts[-1].shape[1]
        return Features(np.hstack(parts).astype(np.float64), np.array(owners))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, 1 for the least, the mean of ranks for ties; NaN for NaN."""
    known = ~np.isnan(values)
    ranks = np.full(len(values), np.nan)
    _, which, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    ranks[known] = (counts.cumsum() - (counts - 1) / 2)[which]
    return ranks


@dataclass(frozen=True)
class Pairs:
    """A rank correlation for each pair of columns, in rows seen, held out, and synthetic.

    Categories and missing cells count as indicators; a pair is represented by the two indicators
    whose correlation is the largest in the rows seen.
    """

    names: list[tuple[str, str]]
    seen: np.ndarray
    held: np.ndarray
    made: np.ndarray

    @property
    def difference(self) -> float:
        """Mean |synthetic - seen|."""
        return float(np.abs(self.made - self.seen).mean())

    @property
    def expected(self) -> float:
        """Mean |held out - seen|."""
        return float(np.abs(self.held - self.seen).mean())


def pairs(seen: Rows, held: Rows, made: Rows) -> Pairs:
    """Return the correlations between columns, of as many held-out as synthetic rows."""
    count = min(len(held), len(made))  # so that both have the same noise
    features = [rows.features() for rows in (seen, held.first(count), made.first(count))]
    owner = features[0].column
    tables = [_correlations(each.values) for each in features]
    names, found = [], []
    for i in range(len(seen.columns)):
        for j in range(i):
            block = np.ix_(owner == i, owner == j)
            place = np.abs(tables[0][block]).argmax()
            names.append((seen.columns[i][0].column.name, seen.columns[j][0].column.name))
            found.append([table[block].flat[place] for table in tables])
    return Pairs(names, *np.array(found).reshape(-1, 3).T)


def _correlations(values: np.ndarray) -> np.ndarray:
    """Return the correlations between columns; 0 if one is constant."""
    centred = values - values.mean(0)
    norm = np.sqrt(np.square(centred).sum(0))
    unit = centred / np.where(norm > 0, norm, 1.0)
    return np.asarray(unit.T @ unit)


@dataclass(frozen=True)
class Copies:
    """Distances of rows, (N,), to the nearest of the rows seen.

    The unit is a standard deviation of numbers; a different category has distance 1.
    """

    held: np.ndarray
    made: np.ndarray

    @property
    def nearer(self) -> tuple[float, float]:
        """Probability that a synthetic row is nearer to the rows seen than a held-out row.

        The second number is its standard error. The probability is ½ for new rows of the same
        distribution and 1 for copies.
        """
        n, m = len(self.held), len(self.made)
        ranks = _ranks(np.concatenate([self.held, self.made]))[n:]
        share = 1 - (ranks.sum() - m * (m + 1) / 2) / (n * m)
        return float(share), float(np.sqrt((n + m + 1) / (12 * n * m)))

    @property
    def exact(self) -> tuple[int, int]:
        """Numbers of held-out and of synthetic rows that equal a row seen."""
        return int((self.held < 1e-9).sum()), int((self.made < 1e-9).sum())


def copies(seen: Rows, held: Rows, made: Rows) -> Copies:
    """Measure how near held-out and synthetic rows are to the rows seen."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1).fit(seen.features(seen).values)
    of_held, of_made = (
        search.kneighbors(rows.features(seen).values)[0][:, 0] for rows in (held, made)
    )
    return Copies(of_held, of_made)


@dataclass(frozen=True)
class Use:
    """Accuracy of predicting a column of held-out rows from their other columns.

    The predictor is a random forest trained on rows seen, or on equally many synthetic ones; or
    the most frequent value (`always`). For a number, the question is whether it exceeds its
    median.
    """

    name: str
    always: float
    real: float
    synthetic: float


def use(seen: Rows, held: Rows, made: Rows, seed: int = 0) -> list[Use]:
    """Measure how well synthetic rows train a predictor, for each of the first columns."""
    from sklearn.ensemble import RandomForestClassifier

    count = min(len(seen), len(made))
    kinds = seen.first(count), made.first(count), held
    features = [rows.features(seen) for rows in kinds]
    found = []
    for i, (place, values) in enumerate(seen.columns[:TARGETS]):
        middle = np.nanmedian(values)
        others = features[0].column != i
        (y_real, y_made, y) = (_target(place, rows.columns[i][1], middle) for rows in kinds)
        right = []
        for target, trained in ((y_real, features[0]), (y_made, features[1])):
            forest = RandomForestClassifier(TREES, min_samples_leaf=2, random_state=seed)
            with warnings.catch_warnings():  # a category may have nearly as many values as rows
                warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
                forest.fit(trained.values[:, others], target)
            right.append(float((forest.predict(features[2].values[:, others]) == y).mean()))
        kinds_of, counts = np.unique(y_real, return_counts=True)
        always = float((y == kinds_of[counts.argmax()]).mean())
        found.append(Use(place.column.name, always, *right))
    return found


def _target(place: Place, values: np.ndarray, middle: float) -> np.ndarray:
    """Return classes, (N,); -1 where missing."""
    if place.column.group == "symbols":
        return np.nan_to_num(values, nan=-1).astype(np.int64)
    return np.where(np.isnan(values), -1, (values > middle).astype(np.int64))


@dataclass(frozen=True)
class Quality:
    """Measurements of synthetic rows."""

    pairs: Pairs
    copies: Copies
    uses: list[Use]


def measure(
    columns: tuple[Column, ...], seen: Tensor, held: Tensor, made: Tensor, seed: int = 0
) -> Quality:
    """Measure pairs, copies and use from examples (N, D) seen, held out, and synthetic."""
    with seeded(seed):
        order = torch.randperm(len(seen))[:SEEN], torch.randperm(len(held))[: len(made)]
    seen, held = (as_examples(x[rows]) for x, rows in zip((seen, held), order, strict=True))
    a, b, c = (Rows.of(x, columns) for x in (seen, held, made))
    return Quality(pairs(a, b, c), copies(a, b, c), use(a, b, c, seed))


def figure(of_pairs: Pairs, of_rows: Copies) -> str:
    """Draw correlations, synthetic against real, and the distances to the rows seen, as SVG."""
    with figures.plot(760, 300, 1, 2) as (canvas, (left, right)):
        for values, colour, size in (
            (of_pairs.held, figures.ORANGE, 3.0),
            (of_pairs.made, figures.BLUE, 4.0),
        ):
            left.plot(of_pairs.seen, values, "o", color=colour, markersize=size, alpha=0.7)
        left.axline((0, 0), slope=1, color=figures.MUTED, linewidth=0.8)
        left.set(xlabel="correlation in rows seen", ylabel="in others", title="pairs of columns")
        least = 1e-3 * max(of_rows.held.max(), of_rows.made.max(), 1e-9)
        log = [np.log10(np.maximum(v, least)) for v in (of_rows.held, of_rows.made)]
        edges = np.linspace(min(v.min() for v in log), max(v.max() for v in log) + 1e-9, BINS + 1)
        for v, colour, name in zip(
            log, (figures.ORANGE, figures.BLUE), ("real, held out", "synthetic"), strict=True
        ):
            height = np.histogram(v, edges)[0] / len(v)
            right.stairs(height, edges, color=colour, linewidth=1.5, label=name)
        right.set_yticks([])
        right.spines["left"].set_visible(False)
        right.xaxis.set_major_formatter(lambda v, _: f"{10**v:.2g}")
        right.set(xlabel="standard deviations", title="to the nearest row seen")
        canvas.legend(loc="outside upper left", ncols=2, handlelength=1.4)
        return figures.svg(canvas, "quality", "correlations and nearest rows")
