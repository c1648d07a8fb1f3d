"""Tables in a terminal of 80 columns."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from nelbo.cli import display
from nelbo.evaluation.result import CurvePoint, StandardError, Terms


def measured(steps):
    """A bound as the table of several steps shows it, with a cost of 1 per unit of time."""
    ends = [t / steps for t in range(steps + 1)]
    return SimpleNamespace(
        given="",
        split="the validation split of images.npz",
        unit="bits/dim",
        steps=steps,
        value=1.234567,
        standard_error=StandardError(0.0123, 0.01, 0.007),
        terms=Terms(0.001, 0.9, 1.1),
        curve=[CurvePoint(s, t, t - s, 0.01) for s, t in pairwise(ends)],
        examples=447,
        dims=64,
        calls_per_example=24.0,
        seed=0,
        weights="averaged weights of step 1600",
        precision="float64 around float32",
        data_hash="0123456789abcdef",
    )


def test_several_steps_fit_into_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    display.sweep([measured(2), measured(1000)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 80
    table = "\n".join(lines)
    assert "reconstruction" in table and "1.2346" in table and "…" not in table
    assert "█" * display.BLOCKS in table and "█" * (display.BLOCKS + 1) not in table


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31])
def test_bins_of_a_curve_are_joined_by_their_means(count):
    heights = display._heights(measured(count), 8)
    assert len(heights) <= 8 and heights == pytest.approx([1.0] * len(heights))
