"""`nelbo score`: the score of each example under a run or another library's model."""

from pathlib import Path
from typing import Any, Literal

from nelbo.cli.common import (
    Device,
    Seed,
    Splits,
    examples_of,
    place_of,
    say,
    say_notes,
    say_of_formulas,
)


def score(
    run: str,
    data: str | None = None,
    *,
    out: Path,
    score: Literal["bound", "complexity", "typicality"] = "bound",
    against: str | None = None,
    split: str | None = None,
    splits: Splits | None = None,
    calls: int | None = None,
    steps: int | None = None,
    lines: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    trust_remote_code: bool = False,
    precision: Literal["bf16", "fp16", "float32", "float64"] | None = None,
    device_map: str | None = None,
    figure: Path | None = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Compute the anomaly score of each example of DATA: nats, error, rank and percentile.

    Under torchrun the processes share the work.

    Parameters
    ----------
    run
        A run folder; or another library's model, diffusers:FOLDER, openai:FILE or hf:FOLDER.
    data
        Examples of the kind that the run was trained on; by default the run's own test split.
    out
        A .csv file with one line per example, in the order of the data. For a table, each line
        names the three columns that contribute most, and by how many nats more than usual; this
        takes 32 more network calls for each row. For a text, each line has the scored tokens,
        characters and bytes, those that are known, and the bits per each of them, with errors.
    score
        The score, larger for more anomalous examples. bound: the bound on -log P(x); complexity:
        the bound minus the length of a lossless code of the example; typicality: the distance of
        the bound from its usual value.
    against
        The split of the run's own data that rank and percentile refer to: validation, the default,
        train or test. A new example from the same distribution has a uniform rank in validation,
        but ranks too high in train. For another library's model: a file or folder of examples of
        the usual kind; without it there is no rank.
    split
        Split of DATA; by default all of it.
    calls
        Maximal number of network calls per example, at least 8; by default 24.
    steps
        For another library's model: its number of steps; by default its own, or continuous time.
    lines
        For hf:FOLDER: read each line of a text file as one example.
    prompt_field
        For hf:FOLDER: the field of the text that shows, as for evaluate.
    answer_field
        For hf:FOLDER: the field of the text that is scored, as for evaluate.
    trust_remote_code
        Run the code in the folder of hf:FOLDER, after printing what will run.
    precision
        Precision of the weights of hf:FOLDER, as for evaluate.
    device_map
        Where to put the weights of hf:FOLDER, as for evaluate.
    figure
        A .png file with the scores of DATA, and of the run's splits or of --against.
    """
    from nelbo import integrations
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo._utils.progress import tracker
    from nelbo.data.splits import SPLITS
    from nelbo.evaluation import anomaly_scores
    from nelbo.runs.loading import load

    for path, suffix in ((out, ".csv"), (figure, ".png")):
        if path is not None:
            if path.suffix.lower() != suffix:
                raise ValueError(f"the file must end in {suffix}; got {str(path)!r}")
            check_writable(path)
    others = (steps, prompt_field, answer_field, precision, device_map)
    if integrations.is_foreign(run):
        if device_map is not None and device != "auto":
            raise ValueError(f"--device-map places the weights; leave --device {device} out")
        options = {
            "score": score,
            "against": against,
            "split": split,
            "splits": splits,
            "calls": calls,
            "steps": steps,
            "lines": lines,
            "prompt_field": prompt_field,
            "answer_field": answer_field,
            "trust_remote_code": trust_remote_code,
            "precision": precision,
            "device_map": device_map,
            "seed": seed,
        }
        _foreign(run, data, out, figure, None if device_map else device, options)
        return
    if lines or trust_remote_code or any(v is not None for v in others):
        raise ValueError(
            "--steps, --lines, --prompt-field, --answer-field, --trust-remote-code, --precision"
            " and --device-map are for other libraries' models; leave them out"
        )
    usual = "validation" if against is None else against
    if usual not in SPLITS:
        raise ValueError(
            f"--against must be one of the run's splits, {', '.join(SPLITS)}; got {against!r}"
        )
    with process_group() as rank:
        loaded = load(Path(run))
        place = place_of(device, rank == 0)
        batch, name = examples_of(loaded, data, split, rank == 0, splits)
        loaded.model.to(place)
        scorer = loaded.scorer(score, usual, calls, seed, tracker("score"))
        scored = scorer(batch)
        each = {}
        if figure is not None:
            each = {
                k: scorer(anomaly_scores.first(loaded.batch(split=k)[0])).score for k in SPLITS
            }
        if rank:
            return
        content = scored.csv()
        write(out, content)
        say_of_formulas(out, content)
        if figure is not None:
            from nelbo.report.score_figure import histogram

            write(figure, histogram(each | {name: scored.score}, f"{score}, nats"))
        strange = int((scored.percentile > 95).sum())
        say_notes(batch.x)
        say(f"{strange} of {len(batch)} examples score above 95 % of the {usual} split; see {out}")


def _foreign(
    source: str,
    data: str | None,
    out: Path,
    figure: Path | None,
    device: str | None,
    options: dict[str, Any],
) -> None:
    """Write the scores under another library's model."""
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import write
    from nelbo.cli.evaluate import notes
    from nelbo.runs.foreign_scores import score_foreign

    with process_group() as rank:
        note = notes() if rank == 0 else str
        place = None if device is None else str(place_of(device, rank == 0))
        scored = score_foreign(source, data, device=place, progress=True, tell=note, **options)
        if rank:
            return
        write(out, scored.csv())
        for line in scored.notes:
            note(line)
        if figure is not None:
            from nelbo.report.score_figure import histogram

            usual = {} if scored.reference is None else {"against": scored.reference}
            content = histogram(usual | {"data": scored.score}, f"{options['score']}, nats")
            write(figure, content)
        if scored.reference is None:
            say(f"{len(scored)} examples, without ranks, as --against is left out; see {out}")
            return
        strange = int((scored.percentile > 95).sum())
        say(
            f"{strange} of {len(scored)} examples score above 95 % of {options['against']}; see"
            f" {out}"
        )
