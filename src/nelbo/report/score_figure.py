"""A picture of anomaly scores beside those of reference data."""

import io
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from nelbo.report.figures import BLUE, GREEN, INK, ORANGE, plot, readable

BINS = 40  # of the picture
COLOURS = (BLUE, GREEN, ORANGE, INK)


def histogram(scores: Mapping[str, Tensor], label: str) -> bytes:
    """Return a PNG picture of the densities of several sets of scores, the last one in ink.

    Scores far from all the others are counted in the outermost bins.
    """
    ends = [readable(each.tolist()) for each in scores.values()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    high = high if high > low else low + 1
    edges = np.linspace(low, high, BINS + 1)
    colours = [*COLOURS[: len(scores) - 1], INK]
    buffer = io.BytesIO()
    with plot(620, 320) as (figure, [ax]):
        for (name, each), colour in zip(scores.items(), colours, strict=True):
            values = each.clamp(low, high).numpy()
            last = colour == INK
            ax.hist(
                values,
                edges.tolist(),
                density=True,
                histtype="stepfilled" if last else "step",
                color=colour,
                alpha=0.35 if last else 1,
                label=f"{name} ({len(each)})",
                linewidth=1.8,
            )
        ax.set_xlabel(label)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.legend()
        figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    return buffer.getvalue()
