"""The page about a trained run: some of its test examples, and what each step costs on them."""

import math
from html import escape
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Distribution, Independent

from nelbo._utils.numerics import LOG_2, seeded
from nelbo._utils.progress import Track
from nelbo._utils.text import shortened
from nelbo.data.schema import Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.reverse import Beta, ReverseKernel
from nelbo.diffusion.schedules import even_times
from nelbo.evaluation.per_dimension import kl_of_dimensions, of_dimensions, own_step, steps_of
from nelbo.explain.panels import Panel, body, sub
from nelbo.explain.toy import MARGINAL, SUM
from nelbo.explain.values import Choice, Values, bell, curve
from nelbo.explain.words import dim_names, meanings, predictions_as_text, values_as_text
from nelbo.pages.images import Canvas, heated, is_image, uri
from nelbo.runs.run import Run

STEPS = (4, 8, 16)  # numbers of uniform steps
EXAMPLES = 3
DRAWS = 32  # of each latent, for the mean costs
DIMS = 8  # dimensions whose distributions are drawn, at most; of an image, fewer
PIXELS = 3
SIDE = 32  # pixels of the longer side of a picture, at most
CHARACTERS = 400  # of a text, at most


class Step(NamedTuple):
    """Draws of z_t for all examples, (B·R, ...), and the prediction from them."""

    t: Tensor
    z: Tensor
    prediction: Prediction


def kernels_of(model: Model) -> dict[str, ReverseKernel]:
    """Return the reverse kernels to compare, by name: the model's own first."""
    found = steps_of(model)
    own = found.pop(own_step(model))
    if Beta().fits(model.process):
        found[Beta().name(model.process)] = Beta()
    found.pop(own_step(model), None)
    return {own_step(model): own, **found}


def values(run: Run, seed: int, track: Track = iter) -> tuple[Values, str]:
    """Return all numbers of the page, and the name of the examples."""
    model, schema = run.model, run.config.schema
    batch, split = run.batch()
    with seeded(seed, 9):
        rows = torch.randperm(len(batch))[:EXAMPLES].sort().values
    batch = batch[rows].to(model.device)
    draws = max(1, min(DRAWS, model.rows // len(batch)))
    schedule = model.process.schedule
    steps = [n for n in STEPS if n <= (schedule.steps or n)] or [1]
    kernels = kernels_of(model)
    with measuring(model, batch):
        grids = [even_times(schedule, n, n).to(model.device) for n in steps]
        many = batch[torch.arange(len(batch)).repeat_interleave(draws)]
        paths = []
        for n in track(range(len(grids))):
            with seeded(seed, n):
                paths.append(_path(model, many, grids[n]))
        costs = []
        for n, path in enumerate(paths):
            with seeded(seed, n, 1):
                costs.append([_costs(model, many.x, path, kernel) for kernel in kernels.values()])
        dims = _shown(schema, torch.stack(costs[-1][0]).sum(0))
        found = Values(_choices(schema, rows, steps, kernels, dims), {"bell": bell()})
        _put_examples(found, model, schema, batch.x, dims)
        for n, path in enumerate(paths):
            for k, each in enumerate(costs[n]):
                _put_costs(found, each, len(batch), {"steps": n, "kernel": k})
            _put_pictures(found, model, schema, batch.x, path, costs[n], n, draws)
            for b in range(len(batch)):
                _put_curves(found, model, kernels, batch.x, path, dims, (b, n), draws)
    return found, split


def _path(model: Model, batch: Batch, times: Tensor) -> list[Step]:
    """Draw z_1..z_T ~ q(z|x) and predict from each."""
    path: list[Step] = []
    for i, time in enumerate(times):
        t = time.expand(len(batch))
        before = times[i - 1].expand(len(batch))
        if i:
            z = draw(model.process.transition(path[-1].z, before, t))
        else:
            z = draw(model.process.marginal(model.embed(batch.x), t))
        path.append(Step(t, z, model.predict(z, t, batch.condition)))
    return path


def _costs(model: Model, x: Tensor, path: list[Step], kernel: ReverseKernel) -> list[Tensor]:
    """Return the costs of the dimensions, (B·R, D) each, nats: prior, KLs from T down, decoder."""
    process, e = model.process, model.embed(x)
    first, last = path[0], path[-1]
    prior = process.prior(model.shape, last.t)
    found = [kl_of_dimensions(process.marginal(e, last.t), prior)]
    for i in range(len(path) - 1, 0, -1):
        s, now = path[i - 1].t, path[i]
        q = process.posterior(now.z, e, s, now.t)
        found.append(kl_of_dimensions(q, kernel(now.prediction, now.z, s, now.t, process)))
    p = model.decoder(first.prediction, first.z, first.t, process)
    found.append(-of_dimensions(p).log_prob(x))
    return [cost.reshape(len(x), -1).cpu() / LOG_2 for cost in found]


def _put_costs(found: Values, costs: list[Tensor], count: int, chosen: dict[str, int]) -> None:
    every = torch.stack([cost.sum(1) for cost in costs], 1).reshape(count, -1, len(costs))
    total = every.sum(2)
    for b in range(count):
        at = {"x": b, **chosen}
        found.put("terms", every[b].mean(0), **at)
        found.put("here", every[b, 0, 1:].flip(0), **at)
        found.put("total", total[b].mean().item(), **at)
        if total.shape[1] > 1:
            error = total[b].std().item() / math.sqrt(total.shape[1])
            found.put("error", error, **at)


# ---- examples: as pictures, texts or rows


def _choices(
    schema: Schema,
    rows: Tensor,
    steps: list[int],
    kernels: dict[str, ReverseKernel],
    dims: list[int],
) -> list[Choice]:
    names = [escape(shortened(name, 24)) for name in dim_names(schema)]
    made = [
        Choice("x", "The example <i>x</i>", [f"number {i}" for i in rows.tolist()]),
        Choice("steps", "Number of steps <i>T</i>", [str(n) for n in steps], len(steps) - 1),
        Choice("kernel", "The reverse step <i>P</i>(<i>z</i><sub>t−1</sub>|<i>z</i><sub>t</sub>)",
               [escape(name) for name in kernels]),
        Choice("dim", "The dimension shown", [names[d] for d in dims], priced=False),
    ]  # fmt: skip
    return made


def _shown(schema: Schema, costs: Tensor) -> list[int]:
    """Return the dimensions that are drawn: of those that cost most, in order."""
    count = PIXELS if is_image(schema) else DIMS
    order = costs.mean(0).argsort(descending=True).tolist()
    return order[:count] if is_image(schema) else sorted(order[:count])


def _put_examples(found: Values, model: Model, schema: Schema, x: Tensor, dims: list[int]) -> None:
    process = model.process
    kinds = [part for part, v in zip(process.factors, process.split(x[:1]), strict=True)
             for _ in range(v[0].numel())]  # fmt: skip
    flat = x.reshape(len(x), -1)
    e = [part.embed(v).reshape(len(x), -1) if part.width == 1 else v.reshape(len(x), -1)
         for part, v in zip(process.factors, process.split(x), strict=True)]  # fmt: skip
    embedded = torch.cat([v.double() for v in e], 1)
    for b in range(len(x)):
        for n, d in enumerate(dims):
            e_d = _finite(embedded[b, d]) if kinds[d].has_flow else None
            found.put("e", e_d, x=b, dim=n)
            found.put("x_code", _finite(flat[b, d].double()), x=b, dim=n)
    found.constants["names"] = dim_names(schema) if not is_image(schema) else []
    found.constants["shown"] = dims
    if is_image(schema):
        _, h, w = schema.shape
        found.constants["places"] = [
            [100 * (d % w) / w, 100 * (d % (h * w) // w) / h, 100 / w, 100 / h] for d in dims
        ]


def _finite(v: Tensor) -> float | None:
    return v.item() if v.isfinite() else None


def _put_pictures(
    found: Values,
    model: Model,
    schema: Schema,
    x: Tensor,
    path: list[Step],
    costs: list[list[Tensor]],
    n: int,
    draws: int,
) -> None:
    if is_image(schema):
        canvas = Canvas(model.process, schema, x)
        for b in range(len(x)):
            row = slice(b * draws, b * draws + 1)
            if n == 0:
                found.put("image_x", _picture(canvas.data(x[b : b + 1])[0]), x=b)
            latents = [_picture(canvas.latent(s.z[row], s.t[0].item())[0]) for s in path]
            found.put("image_z", latents, x=b, steps=n)
            means = [canvas.prediction(s.prediction.e_hat[row], s.z[row])[0] for s in path]
            found.put("image_f", [_picture(mean) for mean in means], x=b, steps=n)
            for k, each in enumerate(costs):
                maps = [cost[row].reshape(-1, *schema.shape[1:]).sum(0) for cost in each]
                tops = [max(m.max().item(), 1e-9) for m in maps]
                heat = [_picture(heated(m.clamp(min=0).numpy()[None], top)[0])
                        for m, top in zip(maps, tops, strict=True)]  # fmt: skip
                found.put("image_cost", heat, x=b, steps=n, kernel=k)
                found.put("heat", tops, x=b, steps=n, kernel=k)
        return
    meaning = meanings(schema, model.process)
    for b in range(len(x)):
        row = slice(b * draws, b * draws + 1)
        if n == 0:
            found.put("row_x", values_as_text(x[b].flatten(), meaning, known=True), x=b)
        texts = [values_as_text(s.z[row].flatten(), meaning) for s in path]
        found.put("row_z", texts, x=b, steps=n)
        guessed = [
            predictions_as_text(
                model.process, s.prediction.map(itemgetter(row)), s.z[row], meaning
            )
            for s in path
        ]
        found.put("row_f", guessed, x=b, steps=n)
        for k, each in enumerate(costs):
            found.put("row_cost", [cost[row][0] for cost in each], x=b, steps=n, kernel=k)


def _picture(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return uri(image)


# ---- the distributions of single dimensions


def _put_curves(
    found: Values,
    model: Model,
    kernels: dict[str, ReverseKernel],
    x: Tensor,
    path: list[Step],
    dims: list[int],
    at: tuple[int, int],
    draws: int,
) -> None:
    process, (b, n) = model.process, at
    row = slice(b * draws, b * draws + 1)
    e = model.embed(x[b : b + 1])
    one = [Step(s.t[:1], s.z[row], s.prediction.map(lambda v: v[row])) for s in path]
    marginals = [process.marginal(e, s.t) for s in one]
    pairs = list(pairwise(one))
    backs = [process.posterior(now.z, e, s.t, now.t) for s, now in pairs]
    last = model.decoder(one[0].prediction, one[0].z, one[0].t, process)
    prior = process.prior(model.shape, one[-1].t)
    for m, d in enumerate(dims):
        found.put("z", [s.z.flatten()[d].double().item() for s in one], x=b, steps=n, dim=m)
        found.put("marginal", [curve(q, d, *_ends(q, d)) for q in marginals], x=b, steps=n, dim=m)
        found.put("back", [curve(q, d, *_ends(q, d)) for q in backs], x=b, steps=n, dim=m)
        found.put("prior", curve(prior, d, *_ends(prior, d)), steps=n, x=b, dim=m)
        for k, kernel in enumerate(kernels.values()):
            steps = [kernel(now.prediction, now.z, s.t, now.t, process) for s, now in pairs]
            each = [curve(last, d, *_ends(last, d))]
            each += [curve(p, d, *_ends(p, d)) for p in steps]
            found.put("f", each, x=b, steps=n, kernel=k, dim=m)


def _ends(distribution: Distribution, dim: int) -> tuple[float, float]:
    """Return the range of nearly all of 200 draws of a dimension, and a margin."""
    assert isinstance(distribution, Independent)
    shape = distribution.base_dist.batch_shape
    with seeded(0):
        some = draw(distribution, shape=(200, *shape)).reshape(200, -1)[:, dim].double()
    low, high = some.min().item(), some.max().item()
    margin = 0.15 * (high - low) + 1e-3 * max(1.0, abs(low))
    return low - margin, high + margin


# ---- the page


PICTURES = "".join(
    f'<figure><div class="framed"><img id="picture-{name}" alt="{alt}"><span class="mark"></span>'
    f"</div><figcaption>{caption}</figcaption></figure>"
    for name, alt, caption in (
        ("x", "the example", "<i>x</i>"),
        ("z", "its latent", sub("z", "t")),
        ("f", "the prediction", f"<i>x̂</i> = E[<i>x</i>|{sub('z', 't')}]"),
        ("cost", "the cost of each pixel", "cost of this step"),
    )
)
ROWS = (
    '<div class="wide"><table><thead><tr><th></th><th><i>x</i></th>'
    f"<th>{sub('z', 't')}</th><th><i>x̂</i>({sub('z', 't')})</th><th>bits</th></tr></thead>"
    '<tbody id="rows"></tbody></table></div>'
)


def panels(schema: Schema) -> list[Panel]:
    """Return the panels of the page."""
    z, z_before, x = sub("z", "t"), sub("z", "t−1"), "<i>x</i>"
    image = is_image(schema)
    return [
        Panel(
            "pictures" if image else "table",
            "The latent, and the prediction of the network",
            f"<i>q</i>({z}|{x}) → <i>x̂</i>({z}) → <i>f</i>({z}, t) ="
            f" {sub('m', 't')}({z}, <i>x̂</i>)",
            "3 and 7",
            ("diffusion/model.py:Model.predict", "evaluation/per_dimension.py:by_dimension"),
            wide=True,
            inside=f'<div class="pictures">{PICTURES}</div>' if image else ROWS,
        ),
        MARGINAL,
        Panel(
            "back",
            "One reverse step, with and without x",
            f'<span class="q"><i>q</i>({z_before}|{z},{x})</span> '
            f'<span class="p"><i>P</i>({z_before}|{z})</span>',
            "6 and 7",
            (
                "diffusion/process.py:ForwardProcess.posterior",
                "diffusion/gaussian.py:GaussianDiffusion.m_t",
                "diffusion/model.py:Model.reverse",
            ),
        ),
        Panel(
            "cost",
            "What this step costs, over all dimensions",
            f"KL(<i>q</i>({z_before}|{z},{x}) ‖ <i>P</i>({z_before}|{z}))",
            "5",
            ("diffusion/elbo.py:diffusion_term",),
            wide=True,
        ),
        SUM,
    ]


def page(run: Run, seed: int = 0, track: Track = iter) -> str:
    """Return the body of the page about a run."""
    found, split = values(run, seed, track)
    name = escape(shortened(str(run.path), 80))
    head = (
        f'<h1>One example, step by step <span class="muted">· nelbo explain {name}</span></h1>'
        f'<p class="lead">Move <i>t</i> with the arrow keys, from the noise on the right to the'
        f" data on the left, and watch what each step costs on examples of the {escape(split)}"
        " data.</p>"
    )
    foot = (
        "<p>Blue is what the encoder <i>q</i> knows, orange what the model <i>P</i> says, green"
        " the data, and purple what their difference costs. All numbers were computed by the"
        f" library, in bits; means are over {DRAWS} draws at most. The times are evenly spaced;"
        " <code>nelbo evaluate</code> measures the whole test set, <code>nelbo explain"
        " toy</code> shows a model of which log <i>P</i>(<i>x</i>) is known.</p>"
    )
    return body(head, found, panels(run.config.schema), foot)
