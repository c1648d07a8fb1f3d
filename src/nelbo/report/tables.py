"""The part of the report on tables: costs of columns, and synthetic rows beside real ones."""

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.text import shortened
from nelbo.data.columns import Column, Place, places
from nelbo.evaluation.per_dimension import by_column
from nelbo.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 12  # columns in a figure, at most
NAME = 200  # characters of a column's name, at most
BINS = 24  # in the histogram of a column of numbers


def known(x: Tensor, columns: tuple[Column, ...]) -> list[tuple[Place, np.ndarray]]:
    """Return the place and the values (N,) of each column; NaN where missing, also in samples."""
    values, at = x.double().numpy(), places(columns)
    absent = {p.index: values[:, i] == 2 for i, p in enumerate(at) if p.indicator}
    found = {
        p.index: (p, np.where(absent.get(p.index, False), np.nan, values[:, i]))
        for i, p in enumerate(at)
        if not p.indicator
    }
    for place, v in found.values():
        if place.column.missing and place.column.group != "numbers":
            v[v == place.codes - 1] = np.nan
    return [found[index] for index in sorted(found)]


def shares(place: Place, real: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the fractions of real and of synthetic values in common bins, (bins + 1,) each.

    The last bin counts missing values.
    """
    column = place.column
    if column.group == "numbers" or place.codes > 2 * BINS:
        some = real[~np.isnan(real)]
        at = np.linspace(0, 1, BINS + 1)[1:-1]
        inner = np.unique(np.quantile(some, at)) if len(some) else np.empty(0)
        edges = np.concatenate([[-np.inf], inner, [np.inf]])
    else:
        edges = np.arange(place.codes + 1) - 0.5
    counted = (np.histogram(v[~np.isnan(v)], edges)[0] for v in (real, made))
    first, second = (
        np.append(count, np.isnan(v).sum()) / len(v)
        for count, v in zip(counted, (real, made), strict=True)
    )
    return first, second


def distance(place: Place, real: np.ndarray, made: np.ndarray) -> float:
    """Return the total variation between the binned marginals: 0 if equal, 1 if disjoint."""
    first, second = shares(place, real, made)
    return float(np.abs(first - second).sum() / 2)


def expected_distance(place: Place, real: np.ndarray, made: np.ndarray) -> float:
    """Return the approximate distance of two samples of these sizes from the same distribution."""
    pooled = (np.add(*shares(place, real, made))) / 2
    sizes = 1 / len(real) + 1 / len(made)
    return float(np.sqrt(2 / math.pi * pooled * (1 - pooled) * sizes).sum() / 2)


def rows(
    columns: tuple[Column, ...], real: Tensor, made: Tensor, cost: np.ndarray
) -> list[tuple[str, ...]]:
    """Return a line of text per column.

    It has the name, the cost with its error, the distance between the marginals, the expected
    distance of two real samples, and the fractions of missing values.
    """
    found: list[tuple[str, ...]] = []
    each = by_column(torch.as_tensor(cost), columns).numpy()
    pairs = zip(known(real, columns), known(made, columns), strict=True)
    for i, ((place, a), (_, b)) in enumerate(pairs):
        error = each[:, i].std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        missing = f"{np.isnan(a).mean():.1%} / {np.isnan(b).mean():.1%}"
        found.append(
            (
                escape(shortened(place.column.name, NAME)),
                f"{each[:, i].mean():.3f} ± {error:.3f}".replace("-", "−"),
                f"{distance(place, a, b):.3f}",
                f"{expected_distance(place, a, b):.3f}",
                missing if place.column.missing else "",
            )
        )
    return found


def marginals(columns: tuple[Column, ...], real: Tensor, made: Tensor) -> str:
    """Return histograms of the first columns, real and synthetic, as SVG."""
    pairs = list(zip(known(real, columns), known(made, columns), strict=True))[:SHOWN]
    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    with figures.plot(240 * across, 170 * down + 30, down, across) as (figure, axes):
        for ax in axes[len(pairs) :]:
            ax.set_axis_off()
        for ax, ((place, a), (_, b)) in zip(axes, pairs, strict=False):
            a, b = a[~np.isnan(a)], b[~np.isnan(b)]
            edges = _edges(place, np.concatenate([a, b]))
            for v, colour, name in ((a, figures.ORANGE, "real"), (b, figures.BLUE, "synthetic")):
                height = np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / max(len(v), 1)
                ax.stairs(
                    height, edges, color=colour, linewidth=1.5, label=None if place.index else name
                )
            _ticks(ax, place)
            ax.set_title(shortened(place.column.name, 32), fontsize=11, color=figures.INK)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.4)
        return figures.svg(figure, "marginals", "real and synthetic columns")


def _edges(place: Place, values: np.ndarray) -> np.ndarray:
    if place.column.group != "numbers" and place.codes <= 2 * BINS:
        return np.arange(place.codes + 1 - place.column.missing) - 0.5
    low, high = np.quantile(values, [0.002, 0.998]) if len(values) else (0.0, 1.0)
    return np.linspace(low, max(high, low + 1e-9), BINS + 1)


def _ticks(ax: "Axes", place: Place) -> None:
    """Label codes by the values that they stand for."""
    column = place.column
    if column.group == "levels":
        assert column.precision is not None and column.low is not None
        at = [code for code in ax.get_xticks() if 1 <= code <= column.points]
        values = [column.low + column.precision * (code - 1) for code in at]
        ax.set_xticks(at, [f"{value:g}" for value in values])
    elif column.group == "symbols":
        names = column.categories[:6]
        ax.set_xticks(range(1, len(names) + 1), [shortened(name, 8) for name in names])
