"""Are synthetic rows as good as new real ones? Pairs of columns, copies, and use for prediction.

Rows here are of three kinds: those seen in training, real ones that were held out, and synthetic
ones. Whatever is measured of synthetic rows is measured of as many held-out rows too, both against
the rows seen: what a perfect model would reach is not 0 or 1 but the number of the held-out rows.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from nelbo._utils.numerics import seeded
from nelbo.data import as_examples
from nelbo.data.columns import Column, Place
from nelbo.report import figures
from nelbo.report.tables import known

SEEN = 20_000  # rows of the training data that others are compared with, at most
TARGETS = 12  # columns that are predicted, at most
TREES = 100
BINS = 20  # of distances


@dataclass(frozen=True)
class Features:
    """Columns as numbers, (N, F), and which of the columns each belongs to, (F,).

    A number is itself or its rank, 0 where it is missing, after which an indicator stands; a
    category is an indicator of each of its values.
    """

    values: np.ndarray
    column: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Rows of one kind: their columns as `tables.known` gives them."""

    columns: list[tuple[Place, np.ndarray]]

    @staticmethod
    def of(x: Tensor, columns: tuple[Column, ...]) -> "Rows":
        return Rows(known(x, columns))

    def __len__(self) -> int:
        return len(self.columns[0][1])

    def first(self, count: int) -> "Rows":
        return Rows([(place, v[:count]) for place, v in self.columns])

    def features(self, scale: "Rows | None" = None) -> Features:
        """Numbers in standard deviations of the rows `scale`; as ranks where left out."""
        parts, owners = [], []
        for i, (place, v) in enumerate(self.columns):
            missing = np.isnan(v)
            if place.column.group == "symbols":
                part = np.stack([v == code for code in range(place.codes)], 1) / np.sqrt(2)
            elif scale is None:
                part = (rankdata(v, nan_policy="omit") - ((~missing).sum() + 1) / 2)[:, None]
            else:
                of = scale.columns[i][1]
                spread = np.nanstd(of) or 1.0
                part = ((v - np.nanmean(of)) / spread)[:, None]
            indicator = [missing[:, None]] if place.column.missing else []
            parts.append(np.hstack([np.nan_to_num(part), *indicator]))
            owners += [i] * parts[-1].shape[1]
        return Features(np.hstack(parts).astype(np.float64), np.array(owners))


@dataclass(frozen=True)
class Pairs:
    """Of each pair of columns a correlation of ranks: of rows seen, held out, and synthetic.

    Categories and missing cells count as indicators, of which that one stands for a pair whose
    correlation is the largest in the rows seen.
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
    """Correlations between columns, of as many held-out as synthetic rows."""
    count = min(len(held), len(made))  # noise grows where rows are few
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
    """Those of the columns; 0 with a constant one."""
    centred = values - values.mean(0)
    norm = np.sqrt(np.square(centred).sum(0))
    unit = centred / np.where(norm > 0, norm, 1.0)
    return np.asarray(unit.T @ unit)


@dataclass(frozen=True)
class Copies:
    """Distances of rows, (N,), to the nearest of the rows seen.

    In standard deviations of numbers; another category counts as one of them.
    """

    held: np.ndarray
    made: np.ndarray

    @property
    def nearer(self) -> tuple[float, float]:
        """The probability that a synthetic row lies nearer to the rows seen than a held-out row
        does, and its standard error: ½ for new rows of the same law, 1 for copies."""
        n, m = len(self.held), len(self.made)
        ranks = rankdata(np.concatenate([self.held, self.made]))[n:]
        share = 1 - (ranks.sum() - m * (m + 1) / 2) / (n * m)
        return float(share), float(np.sqrt((n + m + 1) / (12 * n * m)))

    @property
    def exact(self) -> tuple[int, int]:
        """How many held-out and synthetic rows equal a row seen."""
        return int((self.held < 1e-9).sum()), int((self.made < 1e-9).sum())


def copies(seen: Rows, held: Rows, made: Rows) -> Copies:
    """Are synthetic rows those of the training data?"""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1).fit(seen.features(seen).values)
    of_held, of_made = (
        search.kneighbors(rows.features(seen).values)[0][:, 0] for rows in (held, made)
    )
    return Copies(of_held, of_made)


@dataclass(frozen=True)
class Use:
    """How often a column is predicted right from the others, of held-out rows.

    By a random forest that was trained on rows seen, or on as many synthetic ones; and by always
    naming what is most frequent. Of a number it is asked whether it lies above its median.
    """

    name: str
    always: float
    real: float
    synthetic: float


def use(seen: Rows, held: Rows, made: Rows, seed: int = 0) -> list[Use]:
    """What synthetic rows are good for, for each of the first columns."""
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
            with warnings.catch_warnings():  # a category may have nearly as many as rows
                warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
                forest.fit(trained.values[:, others], target)
            right.append(float((forest.predict(features[2].values[:, others]) == y).mean()))
        kinds_of, counts = np.unique(y_real, return_counts=True)
        always = float((y == kinds_of[counts.argmax()]).mean())
        found.append(Use(place.column.name, always, *right))
    return found


def _target(place: Place, values: np.ndarray, middle: float) -> np.ndarray:
    """Classes, (N,): -1 where missing."""
    if place.column.group == "symbols":
        return np.nan_to_num(values, nan=-1).astype(np.int64)
    return np.where(np.isnan(values), -1, (values > middle).astype(np.int64))


@dataclass(frozen=True)
class Quality:
    """What is known of synthetic rows."""

    pairs: Pairs
    copies: Copies
    uses: list[Use]


def measure(
    columns: tuple[Column, ...], seen: Tensor, held: Tensor, made: Tensor, seed: int = 0
) -> Quality:
    """All of it, from examples (N, D) of training, held out, and synthetic."""
    with seeded(seed):
        order = torch.randperm(len(seen))[:SEEN], torch.randperm(len(held))[: len(made)]
    seen, held = (as_examples(x[rows]) for x, rows in zip((seen, held), order, strict=True))
    a, b, c = (Rows.of(x, columns) for x in (seen, held, made))
    return Quality(pairs(a, b, c), copies(a, b, c), use(a, b, c, seed))


def figure(of_pairs: Pairs, of_rows: Copies) -> str:
    """Correlations, synthetic against real; and the distances to the rows seen."""
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
