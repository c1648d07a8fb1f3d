"""`nelbo evaluate`: the bound of a run or of another library's model."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from nelbo.cli.common import Device, Seed, Spacing, Splits, json_text, place_of, say


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
    variates: bool | None = None,
    sampler: Literal["left-to-right", "greedy", "margin", "entropy", "random"] | None = None,
    tokens_per_step: int | None = None,
    surrogate: str | None = None,
    masks: Literal["plain", "unigram", "draws", "two-levels"] | None = None,
    importance_samples: int | None = None,
    own_samples: int | None = None,
    ode: bool = False,
    dequantise: Literal["encoder", "truncated-normal", "uniform"] | None = None,
    tolerance: float | None = None,
    save: Path | None = None,
    resume: Path | None = None,
    figure: Path | None = None,
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
    """Measure the bound on -log P(x) of a data set, with its error and its network calls.

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
        Measure the model with this number of steps; by default in continuous time. Several, as in
        10,50,200, give a table of bounds, and of their parts over time.
    grid
        The times of the steps: best for this run, found once and kept in its folder; or uniform.
    calls
        Maximal number of network calls per example, by default 24. With fewer than 8, only a
        random sample of the examples is evaluated; with fewer than 2, such as 0.1 for many rows,
        each example of the sample gets two calls, here 5 % of the rows. A pilot chooses the times:
        for a run once, on its validation split, kept in your cache; otherwise with a part of these
        calls.
    target_error
        Instead of --calls: the Monte Carlo standard error to reach, in the unit of the result. If
        few calls per example suffice, only a random sample of the examples is evaluated.
    variates
        Use control variates, which reduce the error without network calls; or --no-variates. By
        default, where no pilot is kept, those that take at most 1/32 of the run by
        counted operations; a note says what is left out.
    sampler
        For a masked model: also state the exact -log P(x) of a sampler that shows its symbols
        left-to-right, or the most certain first, by the largest probability (greedy), the margin
        between the two largest, or the entropy. It takes one network call for each step. This
        sampler is another model than the bound's, so its -log P(x) may lie on either side of the
        bound. random, for at most 16 symbols, is the exact
        -log P(x) of the bound's own sampler, at 2^L calls for L symbols.
    tokens_per_step
        Number of symbols that --sampler shows in each step, by default 1; they are drawn
        independently, given those shown before.
    surrogate
        For a masked model: a cheaper model of the same symbols, a run folder or hf:FOLDER. Most
        masks are evaluated by it alone, and the model is called on a few, to correct the
        difference. Its calls are not counted.
    masks
        For a text of tokens: the estimator of its bound, from the simplest to the one that uses
        most. plain spreads the number of masked tokens evenly; unigram also corrects for how rare
        each token is; draws also for its cost in other masks of the same text; two-levels also
        uses a surrogate. By default a pilot chooses.
    importance_samples
        K, for the tighter bound of K importance-weighted samples at --steps T: K T calls each.
    own_samples
        With --importance-samples: measure this number of samples of the model itself, in place of
        the data. Their -log P(x) can also be bounded from below, which shows how loose the bound
        is. Prompts, lengths and labels come from the data.
    ode
        Compute the likelihood by the probability-flow ODE instead, at two tolerances.
    dequantise
        With --ode: the distribution of the first latent given the data; by default encoder.
    tolerance
        Absolute and relative tolerance of --ode, per example, by default 1e-4; the second, looser
        one is 10 times as large.
    save
        A .npz file for the bound of each example, its error and its terms, in nats; for texts of
        tokens also the cost of each token.
    resume
        A file for what has been measured so far, written every half minute and when the command
        is stopped. The same command with this file continues, and gives exactly the result of an
        evaluation that was never interrupted.
    figure
        With several --steps: a .png file with the bound and its terms over the number of steps,
        and with the diffusion term over time.
    columns
        Also print the cost of each column of a table, at --steps, by default 32, for at most 1000
        examples.
    lines
        For a model of tokens, hf:FOLDER: read each line of a text file as one example.
    prompt_field
        In JSON lines, or in a data set of datasets (hub:NAME, or a folder of save_to_disk): the
        field with the text that shows before the answer; by default prompt.
    answer_field
        The field with the text that is scored; by default answer, or text.
    trust_remote_code
        Run the code in the folder of hf:FOLDER, after printing what will run.
    precision
        Precision of the weights of hf:FOLDER, by default as they are stored; sums are float64. For
        diffusers:FOLDER and openai:FILE: bf16, by autocast of the network.
    device_map
        Where to put the weights of hf:FOLDER, instead of --device, in the form of transformers:
        auto spreads a large model over all devices.
    json
        Print one JSON object.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo.cli import display
    from nelbo.evaluation.alternatives import Alternative
    from nelbo.evaluation.result import BothSides, Evaluation
    from nelbo.runs.evaluation import evaluate as measure
    from nelbo.runs.sweep import sweep

    counts = numbers(steps)
    others = (
        *(grid, sampler, surrogate, importance_samples, own_samples, dequantise, tolerance, save),
        *(masks, resume, tokens_per_step),
    )
    if len(counts) > 1 and (ode or columns or any(v is not None for v in others)):
        raise ValueError(
            "several --steps cannot be combined with --grid, --sampler, --tokens-per-step,"
            " --surrogate, --masks, --importance-samples, --own-samples, --ode, --dequantise,"
            " --tolerance, --save, --resume or --columns; give one number"
        )
    if len(counts) <= 1:
        Alternative(importance_samples, ode, dequantise, tolerance, own_samples).check(
            steps=steps,
            calls=calls,
            target_error=target_error,
            sampler=sampler,
            surrogate=surrogate,
            masks=masks,
            resume=resume,
            columns=columns,
            spell=lambda name: f"--{name.replace('_', '-')}",
        )
    if own_samples is not None and save is not None:
        raise ValueError("--save is for the bound of the data; leave it or --own-samples out")
    if grid is not None and steps is None and not columns:
        raise ValueError("--grid chooses the times of the steps; give --steps T too")
    if columns and json:
        raise ValueError("--columns prints a table, and --json one object; give one of them")
    if device_map is not None and device != "auto":
        raise ValueError(f"--device-map places the weights; leave --device {device} out")
    if figure is not None:
        if len(counts) <= 1:
            raise ValueError("--figure needs several --steps, as in 10,50,200")
        if figure.suffix.lower() != ".png":
            raise ValueError(f"--figure writes a .png file; got {figure}")
        check_writable(figure)
    if save is not None:
        if save.suffix != ".npz":
            raise ValueError(f"--save writes a .npz file; got {save}")
        check_writable(save)
    with process_group() as rank:
        note = notes() if rank == 0 else str
        common: dict[str, Any] = {
            "data": data,
            "split": split,
            "splits": splits,
            "calls": calls,
            "target_error": target_error,
            "variates": variates,
            "lines": lines,
            "prompt_field": prompt_field,
            "answer_field": answer_field,
            "precision": precision,
            "device_map": device_map,
            "trust_remote_code": trust_remote_code,
            "seed": seed,
            "device": None if device_map else str(place_of(device, rank == 0)),
            "progress": True,
            "tell": note,
        }
        if len(counts) > 1:
            several = sweep(run, counts, **common)
            for line in chain.from_iterable(each.notes for each in several):
                note(line)
            if rank == 0 and figure is not None:
                from nelbo.report.sweep_figure import sweep_png

                write(figure, sweep_png(several))
            if rank == 0 and json:
                print(json_text({"sweep": [each.to_dict() for each in several]}))
            elif rank == 0:
                display.sweep(several)
            return
        found = measure(
            run,
            steps=counts[0] if counts else None,
            grid=grid,
            per_example=save is not None,
            sampler=sampler,
            tokens_per_step=tokens_per_step,
            surrogate=surrogate,
            masks=masks,
            resume=resume,
            importance_samples=importance_samples,
            own_samples=own_samples,
            ode=ode,
            dequantise=dequantise,
            tolerance=tolerance,
            columns=columns,
            **common,
        )
        if rank:
            return
        if isinstance(found, BothSides):
            print(json_text(found.to_dict()) if json else found)
            return
        if save is not None:
            write(save, display.npz(found))
        if json:
            print(json_text(found.to_dict()))
        else:
            display.result(found)
        for line in found.notes:
            note(line)
        if isinstance(found, Evaluation) and found.columns is not None:
            display.columns(found.columns)


def numbers(steps: str | None) -> list[int]:
    """Return the numbers of steps of an option such as 50 or 10,50,200, from the fewest.

    Raises:
        ValueError: they are not whole numbers from 1, or one occurs twice.
    """
    from nelbo._utils.scalars import integer

    if steps is None:
        return []
    try:
        found = sorted(int(each) for each in steps.split(","))
    except ValueError:
        raise ValueError(
            f"--steps must be a number, or several as in 10,50,200; got {steps!r}"
        ) from None
    for each in found:
        integer("steps", each, 1)
    if len({*found}) < len(found):
        raise ValueError(f"--steps has a number twice; got {steps!r}")
    return found


def notes() -> Callable[[str], None]:
    """Return a function that prints each note once."""
    shown: set[str] = set()

    def note(line: str) -> None:
        if line not in shown:
            shown.add(line)
            say(f"note: {line}")

    return note
