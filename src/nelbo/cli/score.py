"""`nelbo score`: the anomaly score of each example under a run."""

from pathlib import Path
from typing import Literal

from nelbo.cli.common import (
    Device,
    RunFolder,
    Seed,
    Splits,
    examples_of,
    place_of,
    say,
    say_notes,
    say_of_formulas,
)


def score(
    run: RunFolder,
    data: str | None = None,
    *,
    out: Path,
    score: Literal["bound", "complexity", "typicality"] = "bound",
    against: Literal["validation", "train", "test"] = "validation",
    split: str | None = None,
    splits: Splits | None = None,
    calls: int | None = None,
    figure: Path | None = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Compute the anomaly score of each example of DATA: nats, error, rank and percentile.

    Under torchrun the processes share the work.

    Parameters
    ----------
    data
        Examples of the kind that the run was trained on; by default the run's own test split.
    out
        A .csv file with one line per example, in the order of the data. For a table, each line
        names the three columns that contribute most, and by how many nats more than usual; this
        takes 32 more network calls for each row.
    score
        The score, larger for more anomalous examples. bound: the bound on -log P(x); complexity:
        the bound minus the length of a lossless code of the example; typicality: the distance of
        the bound from its usual value.
    against
        The split of the run's own data that rank and percentile refer to. A new example from the
        same distribution has a uniform rank in validation, but ranks too high in train.
    split
        Split of DATA; by default all of it.
    calls
        Maximal number of network calls per example, at least 8; by default 24.
    figure
        A .png file with the scores of the run's splits and of DATA.
    """
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
    with process_group() as rank:
        loaded = load(run)
        place = place_of(device, rank == 0)
        batch, name = examples_of(loaded, data, split, rank == 0, splits)
        loaded.model.to(place)
        scorer = loaded.scorer(score, against, calls, seed, tracker("score"))
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
        say(
            f"{strange} of {len(batch)} examples score above 95 % of the {against} split; see"
            f" {out}"
        )
