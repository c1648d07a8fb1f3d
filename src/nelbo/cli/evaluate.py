"""`nelbo evaluate`: the bound of a run or of another library's model."""

from collections.abc import Callable
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nelbo.cli.common import (
    Device,
    Seed,
    Spacing,
    Splits,
    examples_of,
    grid_of,
    json_text,
    place_of,
    say,
    say_notes,
)

if TYPE_CHECKING:
    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.times import TimeDiscretization
    from nelbo.evaluation.result import BoundEstimate
    from nelbo.runs.run import Run


def evaluate(
    run: str,
    *,
    data: str | None = None,
    split: str | None = None,
    splits: Splits | None = None,
    steps: str | None = None,
    grid: Spacing | None = None,
    calls: float | None = None,
    target_error: float | None = None,
    variates: bool = True,
    sampler: str | None = None,
    tokens_per_step: int | None = None,
    surrogate: str | None = None,
    importance_samples: int | None = None,
    own_samples: int | None = None,
    ode: bool = False,
    dequantise: Literal["encoder", "truncated-normal", "uniform"] | None = None,
    tolerance: float | None = None,
    save: Path | None = None,
    columns: bool = False,
    lines: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    trust_remote_code: bool = False,
    precision: Literal["bf16", "fp16", "float32", "float64"] | None = None,
    device_map: str | None = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: bool = False,
) -> None:
    """State the bound on -log P(x) of a data set, with its error and its price.

    Under torchrun the processes share the work; the result is the same.

    Parameters
    ----------
    run
        A run folder; or another library's model, diffusers:FOLDER, openai:FILE or hf:FOLDER, with
        --data.
    data
        Other data of the kind that the run was trained on; by default the run's own data.
    split
        train, validation or test; all for data without splits. The default is test for the run's
        own data, and all for other data.
    steps
        State the bound of the model with this number of steps; by default in continuous time. Of
        several, as in 10,50,200, a table of bounds and of where they are spent.
    grid
        The times of the steps: best for this run, found once and kept in its folder; or uniform.
    calls
        Maximal number of network calls per example, by default 24. With fewer than 8, only a
        random sample of the examples is evaluated; with fewer than 2, such as 0.1 for many rows,
        that fraction of them gets two calls each. A pilot chooses the times: once per run, on its
        validation split, kept in your cache; otherwise out of these calls.
    target_error
        Instead of --calls: the Monte Carlo standard error to reach, in the unit of the result. If
        few calls per example suffice, only a random sample of the examples is evaluated.
    variates
        Use control variates, which reduce the error without network calls. Without them the
        evaluation is quicker for many levels and a small network, so that more calls may pay.
    sampler
        Beside the bound, state the exact -log P(x) of the sampler of a masked model that shows its
        symbols left-to-right; or first those of which it is surest, by their largest probability
        (greedy), the margin of the two largest, or the entropy. It takes one network call for each
        step, and is another P(x) than that of the bound, higher or lower. Or random, for at most
        16 symbols: the -log P(x) of which the bound is one, at 2^16 calls.
    tokens_per_step
        How many symbols the --sampler shows in each step, by default 1; given what shows before,
        they are independent.
    surrogate
        For a masked model: a cheaper one with the same symbols, a run folder or hf:FOLDER. It
        reads most of the masks, and the model is asked for the difference. Its calls are not
        counted.
    importance_samples
        K, for the tighter bound of K importance-weighted samples at --steps T: K T calls each.
    own_samples
        With --importance-samples: instead of the data, measure this number of samples of the model
        itself, whose -log P(x) has a lower end too: so the two say how loose the bound of the
        samples is. Prompts, lengths and labels are those of the data.
    ode
        Compute the likelihood by the probability-flow ODE instead, to two tolerances.
    dequantise
        How --ode passes from the data to the first latent; by default encoder.
    tolerance
        Absolute and relative tolerance of --ode, per example, by default 1e-4; the looser one is
        10 times as large.
    save
        A .npz file for the bound of each example, its error and its terms, in nats.
    columns
        Also print the cost of each column of a table, at --steps, by default 32, for at most 1000
        examples.
    lines
        For a model of tokens, hf:FOLDER: each line of a text file is an example of its own.
    prompt_field
        Of JSON lines, or of a data set of datasets (hub:NAME, or a folder of save_to_disk): the
        name of the text that shows before the answer; by default prompt.
    answer_field
        The name of the text that is scored; by default answer, or text.
    trust_remote_code
        Run the code that the folder of hf:FOLDER brings, after printing which.
    precision
        Of the weights of hf:FOLDER, by default as they are stored; sums are float64.
    device_map
        Where to put the weights of hf:FOLDER, in place of --device, as transformers takes it: auto
        spreads a large model over all devices.
    json
        Print one JSON object.
    """
    import torch

    from nelbo import integrations
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo._utils.progress import tracker
    from nelbo._utils.scalars import integer
    from nelbo.cli import display
    from nelbo.cli.sweep import numbers, sweep
    from nelbo.diffusion.batch import Batch, rows_of
    from nelbo.diffusion.latent import LatentModel
    from nelbo.evaluation.alternatives import Alternative
    from nelbo.evaluation.both_sides import both_sides
    from nelbo.evaluation.evaluate import evaluate as bound
    from nelbo.evaluation.latent_bound import evaluate_latent
    from nelbo.evaluation.result import Evaluation, rated
    from nelbo.evaluation.unmasking_order import beside, order_for
    from nelbo.integrations.text_records import TextForm
    from nelbo.runs.commands import model_of
    from nelbo.runs.config import read_config
    from nelbo.runs.loading import load

    counts = numbers(steps)
    if len(counts) > 1:
        others = (grid, sampler, surrogate, importance_samples, dequantise, tolerance, save)
        others_too = (prompt_field, answer_field, precision, device_map)
        some = any(v is not None for v in (*others, *others_too))
        if ode or columns or lines or trust_remote_code or some:
            raise ValueError(
                "several --steps go with --data, --split, --splits, --calls, --target-error,"
                " --no-variates, --seed, --device and --json alone; give one number"
            )
        with process_group() as rank:
            options = {"data": data, "split": split, "splits": splits, "calls": calls}
            options |= {"target_error": target_error, "variates": variates, "seed": seed}
            sweep(run, counts, place_of(device, rank == 0), options, tell=rank == 0, json=json)
        return
    count = counts[0] if counts else None
    tighter = Alternative(importance_samples, ode, dequantise, tolerance)
    tighter.check(
        steps=count,
        calls=calls,
        target_error=target_error,
        sampler=sampler,
        surrogate=surrogate,
        spell=lambda name: f"--{name.replace('_', '-')}",
    )
    if own_samples is not None and (importance_samples is None or save or columns):
        raise ValueError(
            "--own-samples measures the bound of --importance-samples K at --steps T; give these,"
            " and leave --save and --columns out"
        )
    if grid is not None and steps is None and not columns:
        raise ValueError("--grid spaces a number of steps; give --steps T too")
    spacing = grid or "best"
    if columns and json:
        raise ValueError("--columns prints a table, and --json one object; give one of them")
    if columns and (integrations.is_foreign(run) or not read_config(Path(run)).schema.columns):
        raise ValueError("--columns prints what the columns of a run's table cost; leave it out")
    if not integrations.is_foreign(run) and (precision is not None or device_map is not None):
        raise ValueError("--precision and --device-map are for hf:FOLDER; leave them out")
    if device_map is not None and device != "auto":
        raise ValueError(f"--device-map places the weights; leave --device {device} out")
    if save is not None:
        if save.suffix != ".npz":
            raise ValueError(f"--save writes a .npz file; got {save}")
        check_writable(save)
    with process_group() as rank:
        place = place_of(device, rank == 0)
        track = tracker("evaluate") if rank == 0 else iter
        if integrations.is_foreign(run):
            foreign = integrations.load(
                run,
                steps=count,
                trust_remote_code=trust_remote_code,
                precision=precision,
                device_map=device_map,
            )
            place = foreign.model.device if foreign.placed else place
            for note in foreign.notes if rank == 0 else ():
                say(note)
            model, weights = foreign.model, foreign.weights
            times: TimeDiscretization | None = foreign.times
            tell = _note if rank == 0 else None
            form = TextForm(lines, prompt_field, answer_field)
            x, split = foreign.examples(data, split, splits, tell, form=form)
            batch = Batch.of(x)
            if not foreign.placed:
                model.to(place)
            for note in foreign.check(batch):
                if tell is not None:
                    tell(note)
        else:
            loaded = load(run)
            weights = loaded.weights
            batch, split = examples_of(loaded, data, split, rank == 0, splits)
            model = loaded.model
            model.to(place)  # the best grid is measured there too
            times = None if count is None else grid_of(loaded, count, spacing)
        order = None
        if isinstance(model, LatentModel):
            if ode or not importance_samples is target_error is surrogate is sampler is None:
                raise ValueError(
                    "--ode, --importance-samples, --target-error, --surrogate and --sampler are"
                    " for models of the data themselves, and this is one of their latents; give"
                    " --calls"
                )
            codes = model.codes
        elif own_samples is not None and importance_samples is not None and times is not None:
            rows = torch.arange(integer("own_samples", own_samples, 1)) % len(batch)
            both = both_sides(
                model,
                own_samples,
                times=times,
                samples=importance_samples,
                condition=rows_of(batch.condition, rows),
                seed=seed,
                weights=weights,
                track=track,
            )
            if rank == 0:
                print(json_text(both.to_dict()) if json else both)
            return
        else:
            codes = model.process.codes
            order = order_for(model, batch, sampler, tokens_per_step)
        find: Callable[..., Evaluation | BoundEstimate]
        if isinstance(model, LatentModel):
            find = partial(evaluate_latent, model, times=foreign.times, calls=calls)
        elif (otherwise := tighter.measure(model, times)) is not None:
            find = otherwise
        else:
            find = partial(bound, model)
            if not integrations.is_foreign(run):
                find = partial(loaded.measure, own=data is None, tell=say)
            find = partial(find, times=times, calls=calls, target_error=target_error)
            find = partial(find, per_example=save is not None, variates=variates)
            if surrogate is not None:
                cheaper = model_of(surrogate, trust_remote_code)
                find = partial(find, surrogate=cheaper.to(place))
        result = find(batch, seed=seed, weights=weights, split=split, track=track)
        if isinstance(result, Evaluation) and not isinstance(model, LatentModel):
            bar = tracker("in order") if rank == 0 else iter
            result = beside(result, model, batch, order, bar)
        if integrations.is_foreign(run):
            result = rated(result, lambda of: foreign.rates(of.nats, batch))
        else:
            result = loaded.rated(result, batch)
        if isnan(result.nats):
            raise ValueError(
                f"the bound of {split} is not a number; look for extreme values in the data,"
                " example by example with: nelbo score"
            )
        if rank == 0:
            if save is not None:
                write(save, display.npz(result))
            if json:
                print(json_text(result.to_dict()))
            else:
                display.result(result)
            for note in result.notes:
                _note(note)
            say_notes(batch.x)
            if line := display.worse_than_uniform(result, codes):
                _note(line)
        if columns:
            _show_columns(loaded, batch, count or 32, spacing, seed, rank == 0)


def _note(line: str) -> None:
    say(f"note: {line}")


def _show_columns(
    run: "Run",
    batch: "Batch",
    steps: int,
    grid: Spacing,
    seed: int,
    tell: bool,
) -> None:
    """Print the cost of each column of a table under the model of its rows."""
    from nelbo.cli import display
    from nelbo.evaluation.per_dimension import by_column, by_dimension

    known = run.config.schema.columns
    (bound,) = by_dimension(run.model, batch[:1000], grid_of(run, steps, grid), seed=seed)
    if not tell:
        return
    names = [column.name for column in known]
    display.columns(names, by_column(-bound.elbo, known), "nats", steps)
