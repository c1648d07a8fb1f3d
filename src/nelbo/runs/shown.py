"""A run as text at a prompt and as HTML in a notebook."""

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
    """Return the two lines and the last events of training, for a notebook."""
    first, second = text(run).split("\n")
    rows = "".join(
        f"<tr><td>{e['step']}</td><td>{e['train']:.4f}</td><td>{e['validation']:.4f}</td></tr>"
        for e in run.metrics[-5:]
    )
    head = "<tr><th>step</th><th>train</th><th>validation</th></tr>"
    return f"<p>{escape(first)}<br>{escape(second)}</p><table>{head}{rows}</table>"
