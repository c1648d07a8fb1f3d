"""One self-contained HTML page about a run: its bound, where the bits go, and its samples.

The page loads nothing from outside itself. It is determined by the run and the seed, except for
the measured coding times. Its headline is the result of `nelbo evaluate RUN`; its samples are
those of `nelbo sample RUN`.
"""

from itertools import chain, repeat
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from nelbo._utils.arguments import checked
from nelbo._utils.files import check_writable
from nelbo._utils.progress import Track, tracks
from nelbo.data.schema import Schema, as_examples
from nelbo.data.sources import Source
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.result import Evaluation
from nelbo.integrations import Foreign
from nelbo.integrations.conditions import Condition
from nelbo.pages.images import is_image
from nelbo.pages.page import write_page
from nelbo.report import sections
from nelbo.report.quality import measure
from nelbo.report.reproduce import again
from nelbo.report.studies import (
    SAMPLE_STEPS,
    measure_files,
    measure_steps,
    some,
    trajectory,
)
from nelbo.runs.foreign import is_foreign, name_of
from nelbo.runs.subjects import AnyRun, run_of
from nelbo.sampling.imputation import within
from nelbo.sampling.samplers import ancestral

PAGE = "report.html"
SYNTHETIC = 1000  # rows sampled for a table


@checked
def report(
    run: AnyRun | Foreign | Model | object,
    out: str | PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    *,
    data: Source | None = None,
    condition: Condition | None = None,
    steps: int | None = None,
    calls: float | None = None,
    device: str | None = None,
) -> Path:
    """Write the page about `run` to `out`.

    Args:
        run: a trained run, its folder or its name on the hub; or with `data`, another library's
            model of images, "diffusers:FOLDER" or "openai:FILE", loaded, a pipeline, or of
            `nelbo.wrap`.
        out: the HTML file; it is replaced as a whole. By default report.html, in the run folder if
            there is one.
        seed: seed of everything random: the same run and seed make the same page, except for
            measured times.
        progress: show bars on the error stream; by default if it is a terminal.

        data: for another library's model: the images on which it is measured.
        condition: for another library's model: c of the images, as for `nelbo.evaluate`.
        steps: for another library's model: its number of steps; by default its own.
        calls: for another library's model: network calls per image, at most; 24 by default.
        device: for another library's model: where to run it, "cpu" or "cuda".

    Returns:
        `out`.

    Raises:
        ValueError: another library's model without data, or an option that is only for one.
    """
    options: dict[str, object] = {"data": data, "condition": condition, "steps": steps}
    options |= {"calls": calls, "device": device}
    if is_foreign(run):
        from nelbo.report.foreign import report_foreign

        if data is None:
            raise ValueError(f"{name_of(run)} comes without data; give some with --data")
        page = Path(PAGE if out is None else out)
        return report_foreign(
            run,
            data,
            page,
            condition=condition,
            steps=steps,
            calls=calls,
            device=device,
            seed=seed,
            progress=progress,
        )
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise ValueError(f"{given[0]} is for another library's model; leave it out")
    run, track = run_of(run), tracks(progress)
    out = run.path / PAGE if out is None else Path(out)
    check_writable(out)
    schema = run.config.schema
    model = run.model
    batch, _ = run.batch()
    result = run.evaluate(seed=seed, progress=progress, tell=str)
    assert isinstance(result, Evaluation)
    x, unit = as_examples(batch.x), result.unit
    rows = some(model, x, seed)
    few = x[rows]
    limit = -result.per_example.elbo[rows]  # of continuous time, from the bound above
    curves, cost = measure_steps(model, batch[rows], limit, seed, track("step counts"), run.grid)
    count = 64 if is_image(schema) else SYNTHETIC if schema.columns else len(few)
    grid = run.grid(SAMPLE_STEPS, track("best times"))
    condition = run.conditions(count, seed=seed)
    parts = [
        sections.headline(run, result),
        sections.terms(model, result),
        sections.steps(curves, model, unit, len(few)),
        sections.training(run, unit),
    ]
    coded = measure_files(model, few, run.grid, track("files"))
    if is_image(schema):
        path = trajectory(model, count, grid, seed, track("samples"), condition)
        parts += [sections.images(run, few, path), sections.pixels(run, few, cost.numpy(), unit)]
    elif schema.columns:
        seen = run.examples("train")
        made, how = _rows(model, condition, count, schema, grid, seed, track("samples"))
        parts.append(sections.table(schema, few, made, how, cost.numpy(), unit))
        parts.append(sections.quality(measure(schema.columns, seen, x, made, seed)))
    else:
        path = trajectory(model, count, grid, seed, track("samples"), condition)
        parts += [sections.vectors(schema, few, path), sections.columns(cost.numpy(), unit)]
    parts += [sections.files(run, coded), again(run, seed)]
    write_page(out, f"nelbo: {sections.name_of(run)}", "\n".join(parts))
    return out


def _rows(
    model: Model,
    condition: Tensor | None,
    count: int,
    schema: Schema,
    grid: TimeGrid,
    seed: int,
    track: Track,
) -> tuple[Tensor, str]:
    """Return synthetic rows as `nelbo sample` draws them, and a sentence that describes them."""

    tracks = chain([track], repeat(iter))  # few rows are drawn again

    def draw(rows: Tensor, seed: int) -> Tensor:
        given = rows_of(condition, rows)
        return ancestral(model, len(rows), grid, seed, next(tracks), given).cpu()

    notes: list[str] = []
    try:
        return within(draw, count, schema, seed, notes.append), notes[0]
    except ValueError:  # hardly any row is within the ranges of training
        return draw(torch.arange(count), seed), (
            "as the model draws them; hardly any lie within the ranges and categories of the"
            " training data"
        )
