"""One self-contained HTML page about a run: the bound, where its bits go, and what it samples.

The page refers to nothing outside itself and follows from the run and the seed. Its headline is
the number of `nelbo evaluate RUN`; its samples are those of `nelbo sample RUN`.
"""

import math
import platform
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import torch
from torch import Tensor

import nelbo
from nelbo import figures
from nelbo._numerics import LOG_2, draw, seeded
from nelbo._progress import tracker
from nelbo.checkpoint import Run, write
from nelbo.config import ModelConfig, TrainConfig, configure
from nelbo.data import Schema, as_examples
from nelbo.dimensions import by_dimension
from nelbo.estimate import Grid
from nelbo.evaluate import ROWS, Evaluation, evaluate
from nelbo.heads import LevelLogits, Prediction
from nelbo.model import Model, measuring
from nelbo.process import Absorbing, Gaussian, Levels
from nelbo.reverse import Beta, Learned, Mixture, Posterior, Reverse

Track = Callable[[Iterable[int]], Iterable[int]]

STEPS = (2, 4, 8, 16, 32, 64)
SAMPLE_STEPS = 32
EXAMPLES = 256  # of the test data at most, where the page measures more than the headline
MASK = np.array([104, 124, 158], np.uint8)  # a grey that no grey pixel has


def report(run: Run, out: Path, seed: int = 0, progress: bool = False) -> Path:
    """Write the page about `run` to `out`.

    Args:
        run: a trained run, from `nelbo.checkpoint.load`.
        out: the HTML file; replaced whole.
        seed: everything random follows from it: the same run and seed make the same page.
        progress: show bars on the error stream.

    Returns:
        `out`.
    """
    stored, split = run.examples()
    x = as_examples(stored)
    few = _some(x, min(EXAMPLES, max(16, ROWS // (run.model.dims * run.model.head.outputs))), seed)

    def track(what: str) -> Track:
        return tracker(what) if progress else iter

    result = evaluate(
        run.model, x, seed=seed, weights=run.weights, split=split, track=track("test bound")
    )
    curves, cost = measure_steps(run.model, few, seed, track("steps"))
    each = cost.numpy()
    image = is_image(run.config.schema)
    path = trajectory(run.model, 64 if image else 512, seed, track("samples"))
    sections = (
        _headline(run, result),
        _terms(run.model, result),
        _steps(curves, result.unit, len(few)),
        _training(run, result.unit),
        _images(run, few, path) if image else _vectors(run.config.schema, x, path, seed),
        _pixels(run, few, each, result.unit) if image else _columns(each, result.unit),
        _again(run, seed),
    )
    body = "\n".join(section for section in sections if section)
    template = Template(files("nelbo").joinpath("report.html").read_text(encoding="utf-8"))
    title = escape(f"nelbo: {_name(run)}")
    write(out, template.substitute(title=title, body=body).encode())
    return out


# What is measured


def is_image(schema: Schema) -> bool:
    """Grey or RGB images that are worth showing as such."""
    return len(schema.shape) == 3 and schema.shape[0] in (1, 3) and min(schema.shape[1:]) >= 4


def _some(x: Tensor, count: int, seed: int) -> Tensor:
    """`count` examples at most, drawn without replacement, in their order."""
    with seeded(seed, 1):
        return x[torch.randperm(len(x))[:count].sort().values]


def steps_of(model: Model) -> dict[str, Reverse]:
    """The reverse steps this model can take, by name; the tightest first, its own included."""
    if not isinstance(model.process, Gaussian):
        return {"categorical step": model.step}
    found: dict[str, Reverse] = {}
    if isinstance(model.head, LevelLogits):
        found["mixture step"] = Mixture(model.head.values)
    if isinstance(model.step, Learned):
        found["Gaussian step, learned σ²"] = model.step
    found["Gaussian step, σ² = β̃"] = Posterior()
    if isinstance(model.step, Beta):
        found["Gaussian step, σ² = β"] = model.step
    return found


def measure_steps(
    model: Model, x: Tensor, seed: int, track: Track = iter
) -> tuple[list[figures.StepCurve], Tensor]:
    """Each reverse step at T = 2, 4, ..., 64, and ∞, which they share; and the costs of each
    dimension (N, *shape) with the model's own step at 64. In the unit of the evaluation."""
    kinds = steps_of(model)
    limit = evaluate(model, x, calls=32, seed=seed)
    scale = 1.0 if limit.bits_per_dim is None else 1 / LOG_2
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    cost = torch.empty(0)
    for i in track(range(len(STEPS))):
        grid = Grid.uniform(STEPS[i])
        bounds = by_dimension(model, x, grid, tuple(kinds.values()), seed)
        for (name, step), bound in zip(kinds.items(), bounds, strict=True):
            each = scale * sum(bound, start=torch.zeros(()))
            if type(step) is type(model.step):
                cost = each
            total = each.flatten(1).sum(1) / (1 if scale == 1 else model.dims)
            error = (total.var(correction=1) / len(x)).sqrt() if len(x) > 1 else torch.zeros(())
            found[name].append((total.mean().item(), error.item()))
    value = limit.nats if limit.bits_per_dim is None else limit.bits_per_dim
    last = value, float(np.nan_to_num(limit.standard_error.total))
    curves = []
    for name, points in found.items():
        values, errors = zip(*points, last, strict=True)
        curves.append(figures.StepCurve(name, STEPS, values, errors))
    return curves, cost


@dataclass(frozen=True)
class Trajectory:
    """Ancestral samples x, and z_t and the prediction at z_t at some of the times."""

    x: Tensor
    times: list[float]
    z: list[Tensor]
    predictions: list[Prediction]


def trajectory(
    model: Model, count: int, seed: int, track: Track = iter, steps: int = SAMPLE_STEPS
) -> Trajectory:
    """The samples of `sample.ancestral` on a uniform grid, with what happened on the way."""
    grid = Grid.uniform(steps).times.to(model.device)
    shots = set(torch.linspace(0, steps - 1, 8).round().int().tolist())
    seen: list[tuple[float, Tensor, Prediction]] = []
    with measuring(model), seeded(seed):
        z = model.process.prior(model.shape, grid[-1].expand(count)).sample()
        for i in track(range(steps - 1, -1, -1)):
            t = grid[i].expand(count)
            prediction = model.predict(z, t)
            if i in shots:
                seen.append((grid[i].item(), z, prediction))
            if i > 0:
                z = draw(model.step(prediction, z, grid[i - 1].expand(count), t, model.process))
        x = model.decoder(prediction, z, t, model.process).sample()
    times, latents, predictions = zip(*seen, strict=True)
    return Trajectory(x.cpu(), list(times), list(latents), list(predictions))


# Data, latents and predictions as 8-bit RGB images


class Canvas:
    """Images of a schema as pixels: levels from first to last, real data between two quantiles."""

    def __init__(self, model: Model, schema: Schema, x: Tensor) -> None:
        self.process, self.levels = model.process, schema.levels
        limits = torch.tensor([0.002, 0.998], dtype=torch.float64)
        few = x.double().flatten()[: 2**20]
        low, high = (0.0, schema.levels - 1.0) if schema.levels else few.quantile(limits).tolist()
        self.low, self.high = low, max(high, low + 1e-12)

    def data(self, x: Tensor) -> np.ndarray:
        """x (N, C, H, W) in the data's units as (N, H, W, 3)."""
        pixels = (x.double().cpu().movedim(1, -1).numpy() - self.low) / (self.high - self.low)
        pixels = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
        return np.broadcast_to(pixels, (*pixels.shape[:3], 3))

    def embedded(self, e: Tensor) -> np.ndarray:
        """e in the space of a Gaussian process."""
        assert isinstance(self.process, Gaussian)
        if isinstance(self.process.embedding, Levels):
            return self.data((e + 1) / 2 * self.high)
        return self.data(self.process.embedding.shift + self.process.embedding.scale * e)

    def latent(self, z: Tensor, t: float) -> np.ndarray:
        """z_t, brought to the range of the data; masks in a colour of their own."""
        if isinstance(self.process, Absorbing):
            masked = (z == self.process.mask).cpu().movedim(1, -1).numpy()
            pixels = self.data(z)
            return np.where(masked, MASK, pixels).astype(np.uint8)
        if isinstance(self.process.embedding, Levels):
            alpha = self.process.alpha(torch.tensor(t, dtype=torch.float64)).item()
            z = z / (math.sqrt(alpha) + 2 * math.sqrt(1 - alpha))
        return self.embedded(z)

    def prediction(self, prediction: Prediction) -> np.ndarray:
        """The mean of the data that is predicted."""
        if isinstance(self.process, Absorbing):
            probabilities = prediction.e_hat.exp()
            values = torch.arange(probabilities.shape[-1]).to(probabilities)
            return self.data(probabilities @ values)
        return self.embedded(prediction.e_hat)


# The sections


def _headline(run: Run, result: Evaluation) -> str:
    value = result.nats if result.bits_per_dim is None else result.bits_per_dim
    error = result.standard_error
    unit = "bits/dim" if result.bits_per_dim is not None else "nats"
    facts = {
        "Examples": f"{result.examples} of {result.split}, each once",
        "Dimensions": f"{result.dims} {_shape(run.config.schema)}",
        "Per example": f"{result.nats:.2f} nats",
        "Network calls": f"{result.calls_per_example:g} per example",
        "Time": "continuous, T = ∞",
        "Error from the data": _spread(error.data),
        "Error from Monte Carlo": _spread(error.monte_carlo),
        "Weights": result.weights,
        "Seed": str(result.seed),
        "Precision": result.precision,
        "Model hash": result.model_hash,
        "Data hash": result.data_hash,
    }
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<header><h1>{escape(_name(run))} <span class="muted">· nelbo report</span></h1>'
        f'<p class="number">{_rounded(value, error.total)}'
        f" <small>± {_spread(error.total)} {unit}</small></p>"
        f'<p class="lead">{_meaning(run.config.schema, result)}</p>'
        f'<dl class="facts">{listed}</dl></header>'
    )


def _meaning(schema: Schema, result: Evaluation) -> str:
    if schema.levels is None:
        return (
            "An upper bound on the mean of −log P(x) over the test data, in nats per example. P is"
            " a density in the units of the data: lower is better, below zero is possible, and"
            " only models of the same data in the same units compare."
        )
    bits, plain = result.nats / LOG_2, result.dims * math.log2(schema.levels)
    return (
        "An upper bound on the mean of −log<sub>2</sub> P(x) over the test data: coded with this"
        f" model, a test example takes on average no more than {bits:,.0f} bits, where"
        f" {schema.levels} equally likely levels in each of its {result.dims:,} dimensions would"
        f" take {plain:,.0f}."
    )


def _terms(model: Model, result: Evaluation) -> str:
    values, unit = list(vars(result.terms).items()), result.unit
    what = {
        "prior": "KL( q(z<sub>T</sub>|x) ‖ P(z<sub>T</sub>) )",
        "reconstruction": "E −log P(x|z<sub>1</sub>)",
        "diffusion": "∫ d/dt KL( q ‖ P ) dt",
    }
    rows = [
        (f'<span class="key" style="background:{shade}"></span>{name}', what[name], _term(v))
        for (name, v), shade in zip(values, _shades(), strict=False)
    ]
    rows.append(("bound", "", _term(sum(v for _, v in values))))
    edges = [point.t_from for point in result.curve] + [result.curve[-1].t_to]
    curve = figures.density(
        edges,
        [point.value for point in result.curve],
        [point.standard_error for point in result.curve],
        unit,
        [(t, _gamma(model, t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)],
    )
    left = figures.terms(values, unit) + _table(("term", "", unit), rows, total=True)
    return _section(
        "Where the bits go",
        "The bound is the sum of three terms. The area under the curve is the diffusion term; the"
        " band is one standard error.",
        f'<div class="two"><div>{left}</div><figure>{curve}</figure></div>',
    )


def _gamma(model: Model, t: float) -> str:
    gamma = model.process.schedule(torch.tensor([t], dtype=torch.float64).to(model.device)).item()
    if math.isinf(gamma):
        return "∞" if gamma > 0 else "−∞"
    return f"{gamma:.3g}".replace("-", "−")


def _steps(curves: list[figures.StepCurve], unit: str, examples: int) -> str:
    rows = [
        (
            str(steps),
            *(f"{_rounded(c.values[i], c.errors[i])} ± {_spread(c.errors[i])}" for c in curves),
        )
        for i, steps in enumerate((*STEPS, "∞"))
    ]
    head = ("steps T", *(curve.name for curve in curves))
    return _section(
        "The price of few steps",
        "With T steps a sample costs T network calls, and the bound belongs to exactly that"
        f" sampler. Uniform times; the same {examples} test examples for every T; bars are one"
        " standard error, nearly all of which the points share.",
        f'<div class="two"><figure>{figures.step_curves(curves, unit)}</figure>'
        f'<div class="wide">{_table(head, rows)}</div></div>',
    )


def _training(run: Run, unit: str) -> str:
    events = [e for e in run.metrics if math.isfinite(e.get("validation", math.nan))]
    if not events:
        return ""
    best = min(range(len(events)), key=lambda i: events[i]["validation"])
    last, train = events[-1], run.config.train
    parameters = sum(p.numel() for p in run.model.network.parameters())
    rows = [
        ("steps", f"{last['step']:,} of {train.steps:,}, {train.batch} examples each"),
        ("time", _duration(last["seconds"])),
        ("network", f"{run.config.model.network}, {parameters:,} parameters"),
        ("best validation", f"{events[best]['validation']:.4f} at step {events[best]['step']:,}"),
        ("last validation", f"{last['validation']:.4f}"),
        ("last training", f"{last['train']:.4f}"),
    ]
    curve = figures.training(events, best, unit)
    return _section(
        "Training",
        "The weights with the best validation bound are kept (open circle). Validation measures"
        " the moving average of the weights.",
        f'<div class="two"><figure>{curve}</figure>{_table(("", unit), rows)}</div>',
    )


def _images(run: Run, x: Tensor, path: Trajectory) -> str:
    canvas = Canvas(run.model, run.config.schema, x)
    grids = "".join(
        f"<figure><h3>{title}</h3>{_picture(canvas.data(images[:64]), 8, title)}</figure>"
        for title, images in (("Samples", path.x), ("Test data", x))
    )
    latents = [canvas.latent(z[:6], t) for z, t in zip(path.z, path.times, strict=True)]
    predictions = [canvas.prediction(_first_of(p, 6)) for p in path.predictions]
    labels = [f"{t:.2f}" for t in path.times]
    final = canvas.data(path.x[:6])
    absorbing = isinstance(run.model.process, Absorbing)
    grey = " Masked pixels are blue-grey." if absorbing else ""
    mean = "Mean of P(x|z<sub>t</sub>)" if absorbing else "Prediction x̂(z<sub>t</sub>)"
    return _section(
        "Samples",
        f"{len(path.x)} samples in {SAMPLE_STEPS} steps beside as many test examples, none of them"
        " chosen. Below, how the first six came about: from noise at t = 1 to the sample x."
        f"{grey}",
        f'<div class="two">{grids}</div><div class="two" style="margin-top:32px">'
        f"<div><h3>Latent z<sub>t</sub></h3>{_strip([*latents, final], [*labels, 'x'])}</div>"
        f"<div><h3>{mean}</h3>{_strip([*predictions, final], [*labels, 'x'])}</div></div>",
    )


def _first_of(prediction: Prediction, count: int) -> Prediction:
    return Prediction(prediction.e_hat[:count])


def _strip(columns: list[np.ndarray], labels: list[str]) -> str:
    cells = "".join(
        f"<figure>{_picture(images, 1, label, 96)}<figcaption>{label}</figcaption></figure>"
        for images, label in zip(columns, labels, strict=True)
    )
    style = f"grid-template-columns:repeat({len(columns)},1fr)"
    return f'<div class="strip" style="{style}">{cells}</div>'


def _vectors(schema: Schema, x: Tensor, path: Trajectory, seed: int) -> str:
    real = _some(x, len(path.x), seed).flatten(1)[:, :4].double().numpy()
    sampled = path.x.flatten(1)[:, :4].double().numpy()
    d = real.shape[1]
    which = f"the first {d} dimensions" if d < math.prod(schema.shape) else "all dimensions"
    shaken = "; integers are shaken a little to tell them apart" if schema.levels else ""
    return _section(
        "Samples",
        f"{len(sampled)} samples in {SAMPLE_STEPS} steps and {len(real)} test examples, {which}"
        f"{shaken}.",
        f"<figure>{figures.pairs(real, sampled, schema.levels)}</figure>",
    )


def _pixels(run: Run, x: Tensor, each: np.ndarray, unit: str) -> str:
    """Images: the mean map, and the cheapest, the typical and the dearest examples."""
    name = "bits" if unit == "bits/dim" else "nats"
    maps = each.sum(1)
    total = maps.sum((1, 2))
    order = np.argsort(total, kind="stable")
    n = len(order)
    chosen = [*order[: min(2, n)], *order[n // 2 : n // 2 + 2], *order[-2:]][: min(6, n)]
    high = max(float(np.quantile(maps[chosen], 0.995)), 1e-9)
    shown = Canvas(run.model, run.config.schema, x).data(x[chosen])
    heated = figures.heated(maps[chosen], high)
    cells = "".join(
        f"<figure>{_picture(np.stack([image, map_]), 2, 'an example and its costs', 460)}"
        f"<figcaption>{total[i]:.1f} {name}</figcaption></figure>"
        for image, map_, i in zip(shown, heated, chosen, strict=True)
    )
    scale = f'<div class="scale" style="background:linear-gradient(90deg,{_gradient()})"></div>'
    ends = f'<div class="ends"><span>0</span><span>{high:.3g} {name} per pixel</span></div>'
    return _section(
        "The price of each pixel",
        f"The bound at 64 steps before it is summed over pixels{_channels(run)}: its mean over {n}"
        " test examples, and the cheapest, the middle and the dearest two of them.",
        f'<div class="two"><figure><h3>Mean</h3>{figures.heat(maps.mean(0), name)}</figure>'
        f'<div><h3>Single examples</h3><div class="pairs">{cells}</div>{scale}{ends}</div></div>',
    )


def _channels(run: Run) -> str:
    return ", colours together" if run.config.schema.shape[0] > 1 else ""


def _gradient() -> str:
    stops = figures.heated(np.linspace(0, 1, 9)[None, None], 1.0)[0, 0]
    return ",".join(f"rgb({r},{g},{b})" for r, g, b in stops)


def _columns(each: np.ndarray, unit: str) -> str:
    flat = each.reshape(len(each), -1)
    name = "bits" if unit == "bits/dim" else "nats"
    error = flat.std(0, ddof=1) / math.sqrt(len(flat)) if len(flat) > 1 else np.zeros(len(flat[0]))
    return _section(
        "The price of each dimension",
        f"The bound at 64 steps before it is summed over dimensions, mean over {len(each)} test"
        " examples; bars are one standard error.",
        f"<figure>{figures.dimensions(flat.mean(0), error, name)}</figure>",
    )


def _again(run: Run, seed: int) -> str:
    path = shlex.quote(str(run.path))
    commands = "\n".join(
        (
            "# the run",
            _train_command(run),
            "# the bound at the top",
            f"nelbo evaluate {path} --seed {seed}",
            "# the bound of few steps, on all test examples",
            f"nelbo evaluate {path} --steps 8 --seed {seed}",
            "# samples",
            f"nelbo sample {path} --n 64 --steps {SAMPLE_STEPS} --seed {seed} --out samples."
            + ("png" if is_image(run.config.schema) else "npz"),
            "# this page",
            f"nelbo report {path} --seed {seed}",
        )
    )
    versions = (
        f"nelbo {nelbo.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    return _section(
        "To obtain it again",
        f"{versions}.",
        f"<pre>{escape(commands)}</pre><h3>config.json</h3>"
        f"<pre>{escape(run.config.to_json().strip())}</pre>",
    )


def _train_command(run: Run) -> str:
    """The command with every option that differs from what the others bring."""
    config = run.config
    own = {
        f.name: getattr(section, f.name)
        for section, kind in ((config.model, ModelConfig), (config.train, TrainConfig))
        for f in fields(kind)
    }
    lead = {n: own[n] for n in ("process", "network", "head") if own[n] != "symbols"}
    given: dict[str, str | int | float] = {}
    for name, value in lead.items():
        if vars(configure(config.schema, config.preset, **given)[0])[name] != value:
            given[name] = value
    model, train = configure(config.schema, config.preset, **given)
    rest = {n: v for n, v in own.items() if v != (vars(model) | vars(train))[n]}
    words = ["nelbo", "train", str(config.source), "--out", str(run.path)]
    for name, value in {
        **({} if config.preset == "auto" else {"preset": config.preset}),
        **({} if config.size is None else {"size": config.size}),
        **given,
        **rest,
    }.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


# Words, numbers and tags


def _name(run: Run) -> str:
    return Path(run.config.source).name or run.config.source


def _shape(schema: Schema) -> str:
    shape = " × ".join(map(str, schema.shape))
    return f"({shape}" + (", real)" if schema.levels is None else f", {schema.levels} levels)")


def _rounded(value: float, error: float) -> str:
    return f"{value:.{_digits(error)}f}".replace("-", "−")


def _spread(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.{_digits(error)}f}"


def _digits(error: float) -> int:
    """Decimals that show two digits of an error."""
    if not error > 0:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(error))))


def _term(value: float) -> str:
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _shades() -> list[str]:
    return [f"var({figures.VARIABLES[colour]})" for colour in figures.TERMS]


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]], total: bool = False) -> str:
    rows = list(rows)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = [
        f"<tr{' class=sum' if total and i == len(rows) - 1 else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _picture(images: np.ndarray, columns: int, label: str, side: int = 900) -> str:
    address = figures.uri(figures.mosaic(images, columns, side))
    return f'<img alt="{escape(label)}" src="{address}">'
