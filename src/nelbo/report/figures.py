"""Figures for a web page: inline SVG in the page's own fonts and colours.

A figure is drawn in marker colours; `svg` replaces them by variables of the page's style
sheet, so the same figure suits paper and a dark screen. Widths are CSS pixels.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from nelbo.pages.images import HEAT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#101112", "#707172", "#d0d1d2"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe & Ito
PINK, YELLOW = "#cc79a7", "#e69f00"
COLOURS = (BLUE, ORANGE, GREEN)
#: of prior, reconstruction, diffusion, and of latents decoder and encoder
TERM_COLOURS = (GREEN, ORANGE, BLUE, PINK, YELLOW)
PAPER = "#fefdfc"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PINK: "--pink",
    YELLOW: "--yellow",
    PAPER: "--paper",
}
STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nelbo",
    "text.parse_math": False,  # names of columns and categories may hold dollars
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}


@contextmanager
def plot(
    width: int, height: int, rows: int = 1, columns: int = 1
) -> Iterator[tuple["Figure", list["Axes"]]]:
    """Yield a figure and its axes, row by row, in the style of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def svg(figure: "Figure", name: str, label: str) -> str:
    """Return a figure as an SVG element whose identifiers start with `name`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's own fonts draw them
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="(\S+ \S+ (\S+) \S+)"', text)
    assert box is not None
    style = f"max-width:{float(box[2]):g}px"
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="{box[1]}" style="{style}">'
    text = re.sub(r"^.*?<svg[^>]*>", lambda _: head, text, count=1, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", text)
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var({variable})", text, flags=re.IGNORECASE)
    return re.sub(r"\n\s*", "\n", text)


def terms(values: Sequence[tuple[str, float]], unit: str) -> str:
    """Draw the terms of the bound: one stacked bar, or separate bars if a term is negative."""
    below = any(value < 0 for _, value in values)
    with plot(470, 150 if below else 90) as (figure, [ax]):
        start = 0.0
        for i, (_, value) in enumerate(values):
            ax.barh(-i if below else 0, value, left=start, height=0.7, color=TERM_COLOURS[i])
            if below:
                ax.axvline(start + value, color=RULE, linewidth=0.8, zorder=0)
            start += value
        ax.set_yticks([-i for i in range(len(values))], [name for name, _ in values])
        if not below:
            ax.set_yticks([])
            ax.set_xlim(0, start)
            ax.set_ylim(-0.5, 0.42)
        else:
            ax.axvline(0, color=MUTED, linewidth=0.8)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(unit)
        return svg(figure, "terms", "the terms of the bound")


def density(
    edges: Sequence[float],
    values: Sequence[float],
    errors: Sequence[float],
    unit: str,
    gamma: Sequence[tuple[float, str]],
) -> str:
    """Draw the diffusion term per unit of t, one step per bin, with -log SNR on the upper axis."""
    width = np.diff(edges)
    height, error = np.array(values) / width, np.nan_to_num(np.array(errors)) / width
    with plot(470, 300) as (figure, [ax]):
        ax.stairs(
            height + error, edges, baseline=height - error, fill=True, color=BLUE, alpha=0.22
        )
        ax.stairs(height, edges, baseline=None, color=BLUE, linewidth=1.6)
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("t   (0 is the data, 1 the noise)")
        ax.set_ylabel(f"{unit} per unit of t")
        top = ax.secondary_xaxis("top")
        top.set_xticks([t for t, _ in gamma], [text for _, text in gamma])
        top.set_xlabel("γ(t) = −log SNR")
        top.spines["top"].set_visible(False)
        return svg(figure, "curve", "the diffusion term over time")


@dataclass(frozen=True)
class StepCurve:
    """The bound against the number of steps; the last value belongs to T = ∞.

    A thin curve accompanies the curve before it, in the same colour.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float]
    thin: bool = False


def step_curves(curves: Sequence[StepCurve], unit: str) -> str:
    """Draw the bound against T on a logarithmic axis, ∞ apart; write far values as numbers."""
    low, top = readable([value for curve in curves for value in curve.values])
    with plot(470, 300) as (figure, [ax]):
        i = -1
        for curve in curves:
            i += not curve.thin
            at = [math.log2(t) for t in curve.steps]
            at.append(at[-1] + 1.4)
            values, shade = list(curve.values), COLOURS[i]
            line = {"color": shade, "linewidth": 0.8} if curve.thin else {"color": shade}
            ax.plot(at[:-1], values[:-1], label=curve.name, **line)
            ax.plot(at[-2:], values[-2:], linestyle=(0, (1, 2)), **line)
            if curve.thin:
                continue
            ax.errorbar(at, values, curve.errors, fmt="o", color=shade, elinewidth=1.2)
            for x, value in zip(at, values, strict=True):
                if value > top:
                    number = f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
                    text = ax.text(x, 1 + 0.07 * i, f"{number} ↑", color=shade, size=10.5)
                    text.set(ha="center", va="bottom", transform=ax.get_xaxis_transform())
        ax.set_xticks(at, [str(t) for t in curves[0].steps] + ["∞"])
        ax.set_ylim(low, top)
        ax.set_xlim(at[0] - 0.5, at[-1] + 0.3)
        ax.grid(axis="y")
        ax.set_xlabel("number of steps T")
        ax.set_ylabel(f"bound on −log P(x), {unit}")
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=2, handlelength=1.4)
        return svg(figure, "steps", "the bound against the number of steps")


def readable(values: Sequence[float], spread: float = 3.5) -> tuple[float, float]:
    """Return limits of an axis that ends `spread` times as far from the minimum as the median."""
    low, high = min(values), max(values)
    least = 1e-3 * max(abs(low), 1e-3)
    usual = low + max(spread * (float(np.median(values)) - low), 0.15 * abs(low), least)
    top = high if high < 1.3 * usual - 0.3 * low else usual
    margin = 0.06 * max(top - low, least)
    return low - margin, top + margin


def training(metrics: Sequence[Mapping[str, float]], best: int, unit: str) -> str:
    """Draw the running bound on training data, the bound on validation data, and the best step."""
    steps = np.array([event["step"] for event in metrics])
    train = np.array([event["train"] for event in metrics])
    valid = np.array([event["validation"] for event in metrics])
    marker = "o" if len(steps) < 12 else ""
    with plot(470, 300) as (figure, [ax]):
        ax.plot(steps, train, marker=marker, color=ORANGE, label="training, running mean")
        ax.plot(steps, valid, marker=marker, color=BLUE, label="validation")
        ax.axvline(steps[best], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.plot(steps[best], valid[best], "o", color=BLUE, markersize=8, markerfacecolor=PAPER)
        later = steps >= steps[-1] // 10
        low, top = readable([*train[later], *valid[later], train.min(), valid.min()], 8)
        ax.set_ylim(low, top)
        ax.grid(axis="y")
        ax.set_xlabel("step")
        ax.set_ylabel(f"bound on −log P(x), {unit}")
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.4)
        return svg(figure, "training", "the bound during training")


def pairs(real: np.ndarray, sampled: np.ndarray, levels: int | None) -> str:
    """Draw real and sampled vectors (N, d): each dimension alone, and each pair."""
    d = real.shape[1]
    low, high = np.quantile(real, 0.002, 0), np.quantile(real, 0.998, 0)
    margin = 0.1 * np.maximum(high - low, 1e-9) if levels is None else 0.6
    low, high = low - margin, high + margin
    count = min(32, max(8, round(1.6 * math.sqrt(len(real)))))
    bins = [_bins(low[i], high[i], levels, count) for i in range(d)]
    shake = np.random.default_rng(0).uniform(-0.35, 0.35, (2, max(len(real), len(sampled)), d))
    shake *= levels is not None
    size = 470 if d < 3 else 720
    with plot(size, 300 if d == 1 else size, d, d) as (figure, axes):
        for index, ax in enumerate(axes):
            row, column = divmod(index, d)
            ax.set_xlim(low[column], high[column])
            if row < column:
                ax.set_axis_off()
                continue
            for x, shade, jitter, name in (
                (real, ORANGE, shake[0], "real"),
                (sampled, BLUE, shake[1], "sampled"),
            ):
                if row == column:
                    inside, edges = np.histogram(x[:, row], bins[row])
                    height = inside / (len(x) * np.diff(edges))  # a density of all values
                    ax.stairs(
                        height, edges, color=shade, linewidth=1.5, label=None if row else name
                    )
                else:
                    points = x + jitter[: len(x)]
                    ax.plot(points[:, column], points[:, row], "o", **_dots(shade, len(x)))
                    ax.set_ylim(low[row], high[row])
            _label(ax, row, column, d)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.4)
        return svg(figure, "pairs", "real and sampled dimensions")


def _bins(low: float, high: float, levels: int | None, count: int) -> np.ndarray:
    if levels is None or high - low > 64:
        return np.linspace(low, high, count + 1)
    return np.arange(math.floor(low), math.ceil(high) + 1) + 0.5 - (math.floor(low) == low) * 0.5


def _dots(colour: str, count: int) -> dict[str, Any]:
    size = 3.2 if count > 100 else 4.5
    return {"color": colour, "markersize": size, "alpha": 0.5, "markeredgewidth": 0}


def _label(ax: "Axes", row: int, column: int, d: int) -> None:
    if row == column:
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    elif column == 0:
        ax.set_ylabel(f"dimension {row + 1}")
    else:
        ax.tick_params(axis="y", labelleft=False)
    if row == d - 1:
        ax.set_xlabel(f"dimension {column + 1}")
    else:
        ax.tick_params(axis="x", labelbottom=False)


def heat(cost: np.ndarray, unit: str) -> str:
    """Draw a map (H, W) of the cost of each pixel."""
    h, w = cost.shape
    with plot(min(470, round(360 * w / h) + 70), 370) as (figure, [ax]):
        image = ax.imshow(cost, cmap=HEAT, interpolation="none", vmin=min(0.0, cost.min()))
        ax.set_axis_off()
        bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
        bar.set_label(f"{unit} per pixel")
        bar.outline.set_visible(False)
        return svg(figure, "heat", "mean cost of each pixel")


def dimensions(mean: np.ndarray, error: np.ndarray, unit: str) -> str:
    """Draw the cost of each dimension of a vector."""
    from matplotlib.ticker import MaxNLocator

    at = np.arange(1, len(mean) + 1)
    with plot(470 if len(mean) <= 8 else 720, 280) as (figure, [ax]):
        if len(mean) <= 64:
            ax.bar(at, mean, 0.7 if len(mean) > 3 else 0.4, color=BLUE)
            ax.set_xlim(0.2, len(mean) + 0.8)
            ax.errorbar(at, mean, error, fmt="none", ecolor=INK, elinewidth=1)
        else:
            edges = np.arange(len(mean) + 1) + 0.5
            ax.stairs(mean, edges, fill=True, color=BLUE)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        ax.set_xlabel("dimension")
        ax.set_ylabel(unit)
        return svg(figure, "dimensions", "mean cost of each dimension")
