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
    variates: bool = True,
    sampler: str | None = None,
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
        State the bound of the model with this number of steps; by default in continuous time. For
        several, as in 10,50,200: a table of bounds, and of where over time they are spent.
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
        step, and has another P(x) than the bound is of, higher or lower. Or random, for at most
        16 symbols: the exact -log P(x) that the bound is on, at 2^16 calls.
    tokens_per_step
        How many symbols the --sampler shows in each step, by default 1; given what shows before,
        they are independent.
    surrogate
        For a masked model: a cheaper one with the same symbols, a run folder or hf:FOLDER. It
        reads most of the masks, and the model is asked for the difference. Its calls are not
        counted.
    masks
        Of a text of tokens: how its bound is estimated. plain masks have exact counts in strata;
        unigram uses how rare each token is, and draws how hard it was in other masks of the same
        text too; two-levels take a surrogate. By default a pilot chooses.
    importance_samples
        K, for the tighter bound of K importance-weighted samples at --steps T: K T calls each.
    own_samples
        With --importance-samples: instead of the data, measure this number of samples of the model
        itself, whose -log P(x) can be bounded from below too, so that the two bounds show how
        loose each is. Prompts, lengths and labels are those of the data.
    ode
        Compute the likelihood by the probability-flow ODE instead, to two tolerances.
    dequantise
        How --ode passes from the data to the first latent; by default encoder.
    tolerance
        Absolute and relative tolerance of --ode, per example, by default 1e-4; the looser one is
        10 times as large.
    save
        A .npz file for the bound of each example, its error and its terms, in nats; of texts of
        tokens also for the cost of each token.
    resume
        Of a text of tokens: a file for what has been measured so far, written every half minute
        and when the command is stopped. With it the same command continues where it stood.
    figure
        With several --steps: a .png file with the bound and its terms against the steps, and where
        the bits are spent.
    columns
        Also print the cost of each column of a table, at --steps, by default 32, for at most 1000
        examples.
    lines
        For a model of tokens, hf:FOLDER: each line of a text file is an example of its own.
    prompt_field
        In JSON lines, or in a data set of datasets (hub:NAME, or a folder of save_to_disk): the
        field with the text that shows before the answer; by default prompt.
    answer_field
        The field with the text that is scored; by default answer, or text.
    trust_remote_code
        Run the code that the folder of hf:FOLDER brings, after printing which.
    precision
        Precision of the weights of hf:FOLDER, by default as they are stored; sums are float64. For
        diffusers:FOLDER and openai:FILE: bf16, by autocast around the network.
    device_map
        Where to put the weights of hf:FOLDER, in place of --device, as transformers takes it: auto
        spreads a large model over all devices.
    json
        Print one JSON object.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo.cli import display
    from nelbo.evaluation.alternatives import Alternative
    from nelbo.evaluation.result import BothSides, Evaluation
    from nelbo.runs.evaluation import evaluate as measure
    from nelbo.runs.evaluation import sweep

    counts = numbers(steps)
    others = (
        *(grid, sampler, surrogate, importance_samples, own_samples, dequantise, tolerance, save),
        *(prompt_field, answer_field, precision, device_map, masks, resume),
    )
    flags = (ode, columns, lines, trust_remote_code)
    if len(counts) > 1 and (any(flags) or any(v is not None for v in others)):
        raise ValueError(
            "several --steps go with --data, --split, --splits, --calls, --target-error,"
            " --no-variates, --seed, --device, --figure and --json alone; give one number"
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
        raise ValueError("--grid spaces a number of steps; give --steps T too")
    if columns and json:
        raise ValueError("--columns prints a table, and --json one object; give one of them")
    if device_map is not None and device != "auto":
        raise ValueError(f"--device-map places the weights; leave --device {device} out")
    if figure is not None:
        if len(counts) <= 1:
            raise ValueError("--figure draws several --steps, as in 10,50,200; give these")
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
            lines=lines,
            prompt_field=prompt_field,
            answer_field=answer_field,
            precision=precision,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
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
            f"--steps is a number, or several as in 10,50,200; got {steps!r}"
        ) from None
    for each in found:
        integer("steps", each, 1)
    if len({*found}) < len(found):
        raise ValueError(f"--steps has a number twice; got {steps!r}")
    return found


def notes() -> Callable[[str], None]:
    """Return a function that prints each note once."""
    said: set[str] = set()

    def note(line: str) -> None:
        if line not in said:
            said.add(line)
            say(f"note: {line}")

    return note
