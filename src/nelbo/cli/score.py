"""`nelbo score`: how strange each example is to a run."""

from pathlib import Path
from typing import Literal

from nelbo.cli.common import (
    Device,
    RunFolder,
    Seed,
    Splits,
    examples_of,
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
    device: Device = "cpu",
) -> None:
    """Say how strange each example of DATA is to a run: nats, error, rank and percentile.

    Under torchrun its processes share the work.

    Parameters
    ----------
    data
        Examples of the kind the run was trained on; the run's own test split where left out.
    out
        A .csv file, one line per example in the order of the data. Of a table each line names the
        three columns that contribute most, and by how many nats more than usual; that takes 32
        network calls more for each row.
    score
        Larger is stranger: the bound on -log P(x); complexity, the bound less the length of a
        lossless code of the example; typicality, how far the bound is from the usual.
    against
        The split of the run's own data among which rank and percentile are told. An example of
        the same law ranks anywhere in validation, but too high among what was trained on.
    split
        Of DATA: all of it where left out.
    calls
        Network calls per example, at most, at least 8; 24 where left out.
    figure
        A .png file: the scores of the run's splits and of DATA.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo._utils.progress import tracker
    from nelbo.data.splits import SPLITS
    from nelbo.diffusion.model import find_device
    from nelbo.evaluation import anomaly_scores
    from nelbo.runs.run import load

    for path, suffix in ((out, ".csv"), (figure, ".png")):
        if path is not None:
            if path.suffix.lower() != suffix:
                raise ValueError(f"the file must end in {suffix}; got {str(path)!r}")
            check_writable(path)
    with process_group() as rank:
        loaded = load(run)
        schema, place = loaded.config.schema, find_device(device)
        batch, name = examples_of(loaded, data, split, rank == 0, splits)
        reference, _ = loaded.batch(split=against)
        loaded.model.to(place)
        track = tracker("score")
        scorer = anomaly_scores.Scorer(
            score, schema, loaded.model, reference, calls=calls, seed=seed, track=track
        )
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
        say(f"{strange} of {len(batch)} examples are above 95 % of the {against} split; {out}")
