"""The sections of the page that `report` writes, each from measurements to HTML."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.numerics import LOG_2
from nelbo.data.schema import Schema
from nelbo.diffusion.model import Model
from nelbo.evaluation.per_dimension import own_step
from nelbo.evaluation.result import Evaluation
from nelbo.pages.images import Canvas, heated, is_image
from nelbo.report import figures, tables
from nelbo.report.markup import (
    duration,
    html_table,
    number,
    picture,
    rounded,
    seconds,
    section,
    spread,
    strip,
)
from nelbo.report.quality import Quality
from nelbo.report.quality import figure as draw_quality
from nelbo.report.studies import SAMPLE_STEPS, STEPS, Coded, Trajectory

if TYPE_CHECKING:
    from nelbo.runs.run import Run


def headline(run: "Run", result: Evaluation) -> str:
    """Return the bound of a run, its meaning, and everything needed to reproduce it."""
    facts = {
        "Examples": f"{result.examples}, {result.split} split",
        "Data": _shape(run.config.schema),
        "Dimensions": f"{result.dims:,}",
        "Per example": f"{result.nats:.2f} nats",
        "Time": "continuous, T = ∞",
    }
    return header(name_of(run), result, _meaning(run.config.schema, result), facts)


def header(
    name: str,
    result: Evaluation,
    meaning: str,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
) -> str:
    """Return the head of a page: a bound, its meaning as HTML, facts of it by name, and notes."""
    error = result.standard_error
    facts = {
        **facts,
        "Network calls": f"{result.calls_per_example:g} per example",
        "Error from the data": spread(error.data),
        "Error from Monte Carlo": spread(error.monte_carlo),
        "Weights": result.weights,
        "Seed": str(result.seed),
        "Precision": result.precision,
        "Model hash": result.model_hash,
        "Data hash": result.data_hash,
    }
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<header><h1>{escape(name)} <span class="muted">· nelbo report</span></h1>'
        f'<p class="number">{rounded(result.value, error.total)}'
        f" <small>± {spread(error.total)} {result.unit}</small></p>"
        f'<p class="lead">{meaning}</p><dl class="facts">{listed}</dl>'
        f"{f'<ul>{items}</ul>' if items else ''}</header>"
    )


def _meaning(schema: Schema, result: Evaluation) -> str:
    x = f"x|{escape(result.given)}" if result.given else "x"
    if schema.density:
        return (
            f"An upper bound on the mean of −log P({x}) over the test data, in nats per example."
            " P is a density in the units of the data: lower is better, below zero is possible,"
            " and only models of the same data in the same units can be compared."
        )
    bits = result.nats / LOG_2
    coded = (
        f"An upper bound on the mean of −log<sub>2</sub> P({x}) over the test data: coded with"
        f" this model, a test example takes about {bits:,.0f} bits on average"
    )
    if schema.levels is None:
        return f"{coded}."
    plain = result.dims * math.log2(schema.levels)
    return (
        f"{coded}, where {schema.levels}"
        f" equally likely levels in each of its {result.dims:,} dimensions would take"
        f" {plain:,.0f}."
    )


def terms(model: Model, result: Evaluation) -> str:
    """Return the section on the three terms and the diffusion term over time."""
    values, unit = list(vars(result.terms).items()), result.unit
    what = {
        "prior": "KL( q(z<sub>T</sub>|x) ‖ P(z<sub>T</sub>) )",
        "reconstruction": "E −log P(x|z<sub>1</sub>)",
        "diffusion": "∫ d/dt KL( q ‖ P ) dt" if result.steps is None else "Σ KL( q ‖ P )",
        "decoder": "E −log P(x|z)",
        "encoder": "E log q(z|x)",
    }
    rows = [
        (
            f'<span class="key" style="background:{shade}"></span>{name}',
            what[name],
            number(v),
        )
        for (name, v), shade in zip(values, _shades(), strict=False)
    ]
    rows.append(("bound", "", number(sum(v for _, v in values))))
    edges = [point.t_from for point in result.curve] + [result.curve[-1].t_to]
    curve = figures.density(
        edges,
        [point.value for point in result.curve],
        [point.standard_error for point in result.curve],
        unit,
        [(t, _gamma(model, t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)],
    )
    left = figures.terms(values, unit) + html_table(("term", "", unit), rows, total=True)
    return section(
        "Where the bits go",
        "The bound is the sum of three terms. The area under the curve is the diffusion term; the"
        " band is one standard error.",
        f'<div class="two"><div>{left}</div><figure>{curve}</figure></div>',
    )


def _gamma(model: Model, t: float) -> str:
    if (steps := model.process.schedule.steps) is not None:
        t = round(t * steps) / steps  # a model of these times alone
    gamma = model.process.schedule(torch.tensor([t], dtype=torch.float64).to(model.device)).item()
    if math.isinf(gamma):
        return "∞" if gamma > 0 else "−∞"
    return f"{gamma:.3g}".replace("-", "−")


def steps(curves: list[figures.StepCurve], model: Model, unit: str, examples: int) -> str:
    """Return the section on the bound against the number of steps."""
    rows = [
        (
            str(steps),
            *(f"{rounded(c.values[i], c.errors[i])} ± {spread(c.errors[i])}" for c in curves),
        )
        for i, steps in enumerate((*STEPS, "∞"))
    ]
    head = ("steps T", *(curve.name.replace(" = ", "&nbsp;=&nbsp;") for curve in curves))
    return section(
        "The price of few steps",
        "With T steps a sample costs T network calls, and the bound belongs to exactly that"
        f" sampler. The times are uniform, or the best ones for this model, as in nelbo sample;"
        f" every T uses the same {examples} test examples; bars are one standard error. This run"
        f" uses the {own_step(model)}.",
        f'<div class="two"><figure>{figures.step_curves(curves, unit)}</figure>'
        f'<div class="wide">{html_table(head, rows)}</div></div>',
    )


def files(run: "Run", coded: Coded | None) -> str:
    """Return the section on bytes and seconds of lossless codecs on the same examples, or ""."""
    if coded is None:
        return ""
    every = sorted([*coded.ours, *coded.others], key=lambda rival: rival.size)
    numbers = coded.examples * coded.dims
    rows = [
        (
            f"<b>{escape(rival.name)}</b>" if rival in coded.ours else escape(rival.name),
            f"{rival.size:,}",
            f"{8 * rival.size / numbers:.3f}",
            *(f'<span class="time">{seconds(v)}</span>' for v in rival.seconds),
        )
        for rival in every
    ]
    images = " as one sheet" if is_image(run.config.schema) else ""
    head = ("codec", "bytes", "bits/dim", "coding", "decoding")
    return section(
        "What the bits buy",
        f"The bound is the length of a file: {coded.examples} test examples, compressed and"
        " decompressed exactly, header and checksums included. More steps make a smaller file and"
        f" take longer. The other codecs coded the same examples{images}; the model, which both"
        " sides have, is not part of the files. With few examples the file's header weighs more.",
        f'<div class="wide">{html_table(head, rows)}</div>',
    )


def training(run: "Run", unit: str) -> str:
    """Return the section on the curves of training; "" if the run has no validation yet."""
    events = [e for e in run.metrics if math.isfinite(e.get("validation", math.nan))]
    if not events:
        return ""
    best = min(range(len(events)), key=lambda i: events[i]["validation"])
    last, train = events[-1], run.config.train
    validation = events[best]["validation"]
    error = events[best].get("validation_standard_error") or math.nan
    parameters = sum(p.numel() for p in run.model.network.parameters())
    rows = [
        ("steps", f"{last['step']:,} of {train.steps:,}, {train.batch} examples each"),
        ("time", duration(last["seconds"])),
        ("network", f"{run.config.model.network}, {parameters:,} parameters"),
        (
            f"best validation, {unit}",
            f"{rounded(validation, error)} ± {spread(error)} at step {events[best]['step']:,}",
        ),
        (f"last validation, {unit}", rounded(last["validation"], error)),
        (f"last training, {unit}", rounded(last["train"], error)),
    ]
    curve = figures.training(events, best, unit)
    return section(
        "Training",
        "The weights with the best validation bound are kept (open circle). Validation measures"
        " the moving average of the weights.",
        f'<div class="two"><figure>{curve}</figure>'
        f'<div class="wide">{html_table((), rows)}</div></div>',
    )


def images(run: "Run", x: Tensor, path: Trajectory) -> str:
    """Return the section on samples of images beside test data, and on their trajectories."""
    canvas = Canvas(run.model.process, run.config.schema, x)
    grids = "".join(
        f"<figure><h3>{title}</h3>{picture(canvas.data(images[:64]), 8, title)}</figure>"
        for title, images in (("Samples", path.x), ("Test data", x))
    )
    latents = [canvas.latent(z[:6], t) for z, t in zip(path.z, path.times, strict=True)]
    predictions = [
        canvas.prediction(e_hat[:6], z[:6]) for e_hat, z in zip(path.e_hat, path.z, strict=True)
    ]
    labels = [f"{t:.2f}" for t in path.times]
    final = canvas.data(path.x[:6])
    masks = run.model.process.mask is not None
    grey = " Masked pixels are blue-grey." if masks else ""
    mean = "Mean of P(x|z<sub>t</sub>)" if masks else "Prediction x̂(z<sub>t</sub>)"
    return section(
        "Samples",
        f"{len(path.x)} samples in {SAMPLE_STEPS} steps beside as many test examples, none of them"
        " selected. Below, the trajectories of the first six: from noise at t = 1 to the sample x."
        f"{grey}",
        f'<div class="two">{grids}</div><div class="two" style="margin-top:32px">'
        f"<div><h3>Latent z<sub>t</sub></h3>{strip([*latents, final], [*labels, 'x'])}</div>"
        f"<div><h3>{mean}</h3>{strip([*predictions, final], [*labels, 'x'])}</div></div>",
    )


def vectors(schema: Schema, x: Tensor, path: Trajectory) -> str:
    """Return the section on samples of other data: their first dimensions beside real examples."""
    real = x.flatten(1)[:, :4].double().numpy()
    sampled = path.x[: len(x)].flatten(1)[:, :4].double().numpy()
    d = real.shape[1]
    which = f"the first {d} dimensions" if d < math.prod(schema.shape) else "all dimensions"
    shaken = "; integers are jittered to separate them" if schema.levels else ""
    return section(
        "Samples",
        f"{len(sampled)} samples in {SAMPLE_STEPS} steps and {len(real)} test examples, {which}"
        f"{shaken}.",
        f"<figure>{figures.pairs(real, sampled, schema.levels)}</figure>",
    )


def pixels(run: "Run", x: Tensor, each: np.ndarray, unit: str) -> str:
    """Return the section on costs of pixels: their mean, and examples of low to high cost."""
    name = unit.removesuffix("/dim")
    maps = each.sum(1)
    total = maps.sum((1, 2))
    order = np.argsort(total, kind="stable")
    n = len(order)
    chosen = [*order[: min(2, n)], *order[n // 2 : n // 2 + 2], *order[-2:]][: min(6, n)]
    high = max(float(np.quantile(maps[chosen], 0.995)), 1e-9)
    shown = Canvas(run.model.process, run.config.schema, x).data(x[chosen])
    warm = heated(maps[chosen], high)
    cells = "".join(
        f"<figure>{picture(np.stack([image, map_]), 2, 'an example and its costs', 460)}"
        f"<figcaption>{total[i]:.1f} {name}</figcaption></figure>"
        for image, map_, i in zip(shown, warm, chosen, strict=True)
    )
    scale = f'<div class="scale" style="background:linear-gradient(90deg,{_gradient()})"></div>'
    ends = f'<div class="ends"><span>0</span><span>{high:.3g} {name} per pixel</span></div>'
    return section(
        "The price of each pixel",
        f"The bound at 64 steps before it is summed over pixels{_channels(run)}: its mean over {n}"
        " test examples, and the two cheapest, middle and most expensive ones.",
        f'<div class="two"><figure><h3>Mean</h3>{figures.heat(maps.mean(0), name)}</figure>'
        f'<div><h3>Single examples</h3><div class="pairs">{cells}</div>{scale}{ends}</div></div>',
    )


def _channels(run: "Run") -> str:
    return ", colours together" if run.config.schema.shape[0] > 1 else ""


def _gradient() -> str:
    stops = heated(np.linspace(0, 1, 9)[None, None], 1.0)[0, 0]
    return ",".join(f"rgb({r},{g},{b})" for r, g, b in stops)


def columns(each: np.ndarray, unit: str) -> str:
    """Return the section on the mean cost of each dimension of other data."""
    flat = each.reshape(len(each), -1)
    name = unit.removesuffix("/dim")
    error = flat.std(0, ddof=1) / math.sqrt(len(flat)) if len(flat) > 1 else np.zeros(len(flat[0]))
    return section(
        "The price of each dimension",
        f"The bound at 64 steps before it is summed over dimensions, mean over {len(each)} test"
        " examples; bars are one standard error.",
        f"<figure>{figures.dimensions(flat.mean(0), error, name)}</figure>",
    )


def table(schema: Schema, x: Tensor, made: Tensor, how: str, each: np.ndarray, unit: str) -> str:
    """Return the section on costs of columns, and on synthetic rows beside real ones."""
    name = unit.removesuffix("/dim")
    head = ("column", name, "distance", "of two real samples", "missing, real / synthetic")
    return section(
        "Columns",
        f"The bound at 64 steps before it is summed over columns, mean over {len(each)} test rows;"
        f" and {len(made)} synthetic rows in {SAMPLE_STEPS} steps beside them. The distance is the"
        " total variation between the binned marginals; beside it stands the distance expected of"
        f" two samples from the same distribution. Synthetic rows: {escape(how)}.",
        f"<figure>{tables.marginals(schema.columns, x, made)}</figure>"
        f"{html_table(head, tables.rows(schema.columns, x, made, each))}",
    )


def quality(found: Quality) -> str:
    """Return the section on correlations between columns, novelty and use of synthetic rows."""
    pairs, copies = found.pairs, found.copies
    share, error = copies.nearer
    of_held, of_made = copies.exact
    head = ("column", "most frequent value", "trained on real rows", "on synthetic rows")
    rows = [
        (escape(use.name), *(f"{v:.3f}" for v in (use.always, use.real, use.synthetic)))
        for use in found.uses
    ]
    made, held = len(copies.made), len(copies.held)
    return section(
        "Synthetic rows",
        f"{made} synthetic rows beside {held} real ones that were held out, both compared with"
        f" the training rows. Rank correlations of pairs of columns differ from those of the"
        f" training rows by {pairs.difference:.3f} on average; for as many held-out rows the"
        f" difference is {pairs.expected:.3f}. A synthetic row is"
        f" nearer to the training rows than a held-out one with probability {share:.2f} ±"
        f" {error:.2f} (new rows 0.5, copies 1); {of_made} synthetic and {of_held} held-out rows"
        " equal a training row. The table shows the fraction of held-out rows for which a random"
        " forest predicts a column from the others (for numbers, whether it is above the median),"
        f" ± {0.5 / math.sqrt(held):.3f} at most; the forest was trained on equally many real and"
        " synthetic rows.",
        f"<figure>{draw_quality(pairs, copies)}</figure>{html_table(head, rows)}",
    )


# Words, numbers and tags


def name_of(run: "Run") -> str:
    """Return the name of the data of a run."""
    return Path(run.config.source).name or run.config.source


def _shape(schema: Schema) -> str:
    shape = " × ".join(map(str, schema.shape))
    if schema.columns:
        return f"a table of {len(schema.columns)} columns"
    return f"{shape}, " + ("real" if schema.levels is None else f"{schema.levels} levels")


def _shades() -> list[str]:
    return [f"var({figures.VARIABLES[colour]})" for colour in figures.TERM_COLOURS]
