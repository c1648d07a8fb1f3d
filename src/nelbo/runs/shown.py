"""A run as text at a prompt and as HTML in a notebook."""

import math
from html import escape
from typing import TYPE_CHECKING

from nelbo._utils.text import shortened
from nelbo.models.conditioning import names

if TYPE_CHECKING:
    from nelbo.runs.run import Run


def text(run: "Run") -> str:
    """Return two lines: the data and the model, the weights and their bound."""
    kind, shape = run.config.schema.kind, " x ".join(map(str, run.config.schema.shape))
    given = names(run.config.schema)
    best = [event for event in run.metrics if event["step"] <= run.step]
    bound = f", validation {best[-1]['validation']:.3f} {best[-1]['unit']}" if best else ""
    return (
        f"Run {run.path}: P(x{f'|{given}' if given else ''}) of {kind}, {shape}, trained on"
        f" {shortened(run.config.source, 64)}\n    {run.weights}{bound};"
        f" {sum(p.numel() for p in run.model.parameters())} weights, {run.model.device}"
    )


def html(run: "Run") -> str:
    """Return the two lines, the validation bound over the steps and the last events."""
    first, second = text(run).split("\n")
    rows = "".join(
        f"<tr><td>{e['step']}</td><td>{e['train']:.4f}</td><td>{e['validation']:.4f}</td></tr>"
        for e in run.metrics[-5:]
    )
    head = "<tr><th>step</th><th>train</th><th>validation</th></tr>"
    curve = _curve([(e["step"], e["validation"]) for e in run.metrics])
    return f"<p>{escape(first)}<br>{escape(second)}</p>{curve}<table>{head}{rows}</table>"


def _curve(points: list[tuple[int, float]]) -> str:
    """Return a picture of the finite values over steps, or nothing for fewer than two."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) < 2:
        return ""
    last = points[-1][0]
    least, most = (f(value for _, value in points) for f in (min, max))
    height = 56 / ((most - least) or 1.0)
    path = " ".join(f"{310 * s / last + 4:.1f},{60 - height * (v - least):.1f}" for s, v in points)
    label = f"validation bound, {most:.3f} at most, {least:.3f} at least, {last} steps"
    return (
        f'<svg width="320" height="64" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2"/></svg>'
    )
