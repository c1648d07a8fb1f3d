"""A picture of the bounds of several numbers of steps, and of where they are spent."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nelbo.evaluation.result import Evaluation
from nelbo.report.figures import INK, TERM_COLOURS, plot, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 860, 340  # CSS pixels
SHADES = (0.25, 0.9)  # of the fewest and of the most steps, in the colour map


def sweep_png(found: Sequence[Evaluation]) -> bytes:
    """Return a PNG picture of the bound against the number of steps T, with its terms; and of what
    it is spent on, summed up from the data to the noise.

    Args:
        found: evaluations of one model on the same examples, from the fewest steps.
    """
    buffer = io.BytesIO()
    with plot(WIDTH, HEIGHT, 1, 2) as (figure, [left, right]):
        _against_steps(left, found)
        _over_time(right, found)
        figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    return buffer.getvalue()


def _against_steps(ax: "Axes", found: Sequence[Evaluation]) -> None:
    """Draw the bound with its error, and its terms, against T on a logarithmic axis."""
    steps = [each.steps or math.nan for each in found]
    for name, colour in zip(vars(found[0].terms), TERM_COLOURS, strict=False):
        values = [vars(each.terms)[name] for each in found]
        ax.plot(steps, values, marker="o", markersize=3, linewidth=1, color=colour, label=name)
    bounds = [each.value for each in found]
    errors = np.nan_to_num([each.standard_error.total for each in found])
    ax.errorbar(steps, bounds, errors, fmt="o-", color=INK, label="bound", elinewidth=1.2)
    low, high = readable(bounds)
    rest = [value for each in found for value in vars(each.terms).values()]
    ax.set_ylim(min(low, *rest) - 0.03 * (high - min(low, *rest)), high)
    for x, value in zip(steps, bounds, strict=True):
        if value > high:
            ax.text(x, high, f"{value:.3g} ↑", color=INK, ha="center", va="top", size=9)
    ax.set_xscale("log", base=2)
    ax.set_xticks(steps, [str(each.steps) for each in found])
    ax.minorticks_off()
    ax.grid(axis="y")
    ax.set_xlabel("number of steps T")
    ax.set_ylabel(f"bound on −log P(x), {found[0].unit}")
    ax.legend()


def _over_time(ax: "Axes", found: Sequence[Evaluation]) -> None:
    """Draw all terms but the prior, summed up from the data, t = 0, to the noise."""
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"](np.linspace(*SHADES, len(found)))
    ends = []
    for each, shade in zip(found, shades, strict=True):
        terms = vars(each.terms)
        begin = each.value - terms["prior"] - terms["diffusion"]
        t = [0.0, *(point.t_from for point in each.curve), each.curve[-1].t_to]
        spent = begin + np.cumsum([0.0, 0.0, *(point.value for point in each.curve)])
        ax.plot(t, spent, color=shade, linewidth=1.6, label=f"T = {each.steps}")
        ends += [begin, float(spent[-1])]
    low, high = readable(ends)
    ax.set_ylim(min(low, 0.0), high)
    ax.set_xlim(0, 1)
    ax.grid(axis="y")
    ax.set_xlabel("t   (0 is the data, 1 the noise)")
    ax.set_ylabel(f"cost from 0 to t, {found[0].unit}")
    ax.legend(ncols=1 + (len(found) > 6))
