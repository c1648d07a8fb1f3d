"""One self-contained HTML page about another library's model: its bound, terms and samples."""

from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import torch

from nelbo._utils.files import check_writable
from nelbo._utils.progress import tracks
from nelbo.data.sources import Source
from nelbo.diffusion.batch import Batch
from nelbo.evaluation.result import Evaluation
from nelbo.integrations import Foreign
from nelbo.integrations.conditions import Condition
from nelbo.pages.images import Canvas, is_image
from nelbo.pages.page import write_page
from nelbo.report import sections
from nelbo.report.markup import html_table, picture, rounded, section, spread
from nelbo.runs.evaluation import evaluate
from nelbo.runs.foreign import foreign_of, is_of_tokens, name_of
from nelbo.runs.foreign_samples import drawer

SAMPLES, SAMPLE_STEPS = 16, 32  # samples, in at most so many steps
SHOWN = 6  # examples of low, middle and high bounds


def report_foreign(
    source: object,
    data: Source,
    out: Path,
    *,
    condition: Condition | None = None,
    steps: int | None = None,
    calls: float | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Path:
    """Write a page about another library's model.

    Args:
        source: what stands for it, see `runs.foreign`; a model of images.
        data: examples on which it is measured.
        out: the HTML file; it is replaced as a whole.
        condition: c of the examples, for the bound on P(x|c), as for `nelbo.evaluate`.
        steps: number of steps of the model; by default its own.
        calls: network calls per example, at most.
        device: where to run the networks; by default they stay.
        seed: of everything random.
        progress: show bars on the error stream; by default if it is a terminal.

    Raises:
        ValueError: a model of other data than images, or as for `nelbo.evaluate`.
    """
    check_writable(out)
    images = "the page is about models of images of at least 4x4 pixels"
    if is_of_tokens(source):
        raise ValueError(
            f"{images}; {name_of(source)} is of tokens: nelbo evaluate and nelbo score measure it"
        )
    foreign = foreign_of(source, steps=steps, condition=condition)
    if not is_image(foreign.schema):
        raise ValueError(
            f"{images}; {foreign.name} is of {foreign.schema.kind} of shape"
            f" {foreign.schema.shape}: nelbo evaluate measures it"
        )
    if device is not None:
        foreign.model.to(device)
    result = evaluate(
        foreign, data, calls=calls, seed=seed, per_example=True, device=device, progress=progress
    )
    assert isinstance(result, Evaluation)
    x, _ = foreign.examples(data)
    parts = [
        _headline(foreign.name, result),
        sections.terms(foreign.model.diffusion, result),
        _samples(foreign, seed, progress),
        _examples(foreign, Batch.of(x), result),
    ]
    write_page(out, f"nelbo: {foreign.name}", "\n".join(parts))
    return out


def _headline(source: str, result: Evaluation) -> str:
    """Return the bound, its meaning, and every choice that it depends on."""
    x = f"x|{escape(result.given)}" if result.given else "x"
    meaning = (
        f"An upper bound on the mean of −log P({x}), of the model as it is sampled by these steps."
    )
    facts = {
        "Examples": f"{result.examples} of {result.split}",
        "Steps": "continuous time" if result.steps is None else str(result.steps),
    }
    return sections.header(source, result, meaning, facts, result.notes)


def _samples(foreign: Foreign, seed: int, progress: bool | None) -> str:
    """Return the section on samples, in the steps of the bound or in fewer."""
    few = foreign
    more = foreign.times.steps is None or foreign.times.steps > SAMPLE_STEPS
    if more and foreign.of_steps is not None:
        few = foreign.of_steps(SAMPLE_STEPS)
    given = ""
    if few.condition is not None:
        few = replace(few, condition=few.condition.spread(SAMPLES))
        given = f", of P(x|{escape(few.model.diffusion.conditioned_on)}) for some of the examples"
    canvas = Canvas(foreign.model.diffusion.process, foreign.schema, torch.zeros(1))
    x = drawer(few)(SAMPLES, seed, tracks(progress)("samples"))
    return section(
        "Samples",
        f"{SAMPLES} samples in {few.times.steps} steps{given}, none of them selected.",
        f"<figure>{picture(canvas.data(x), 8, 'samples')}</figure>",
    )


def _examples(foreign: Foreign, batch: Batch, result: Evaluation) -> str:
    """Return the section on the bounds of single images, with their errors."""
    scale = result.value / result.nats
    bound = -result.per_example.elbo * scale
    error = result.per_example_error * scale
    seen = bound.isfinite().nonzero().flatten()
    order = seen[bound[seen].argsort()]
    places = torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().long()
    canvas = Canvas(foreign.model.diffusion.process, foreign.schema, torch.zeros(1))
    cells = "".join(
        f"<figure>{picture(canvas.data(batch.x[i : i + 1]), 1, 'an example', 140)}<figcaption>"
        f"{rounded(bound[i].item(), error[i].item())} ± {spread(error[i].item())}</figcaption>"
        "</figure>"
        for i in order[places].tolist()
    )
    quantiles = np.quantile(bound[seen].numpy(), (0, 0.05, 0.5, 0.95, 1))
    names = ("least", "5 %", "median", "95 %", "largest")
    rows = [(n, f"{q:.4g}") for n, q in zip(names, quantiles, strict=True)]
    mean = error[seen].square().mean().sqrt().item()
    rows.append(("Monte Carlo error of an image, root mean square", spread(mean)))
    return section(
        "The price of each image",
        f"The bound of single images, in {result.unit}, from the cheapest to the dearest, with"
        f" the Monte Carlo error of each; {len(seen)} images were measured.",
        f'<div class="two"><div class="pairs">{cells}</div>'
        f'<div class="wide">{html_table(("", result.unit), rows)}</div></div>',
    )
