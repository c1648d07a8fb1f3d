"""Fine-tune a run: start from its best weights and train its T-step bound in a new run.

The times are the best grid of the source run. They are stored in the configuration of the new run,
so that its T-step bound and samples use exactly these times. The initial weights are kept until
later ones have a better T-step bound.
"""

from dataclasses import replace
from pathlib import Path

from nelbo._utils.distributed import main_process_first
from nelbo._utils.progress import tracker
from nelbo.models import custom
from nelbo.runs import own_data
from nelbo.runs.folder import check_new
from nelbo.runs.loading import load
from nelbo.runs.run import Run
from nelbo.runs.training import OnEvent, Training, begin

DROPOUT = 0.3  # minimum: training repeats the same examples at only T times


def name_of(source: Path, steps_of_bound: int) -> Path:
    """Return the default folder of the fine-tuned run, beside its source.

    >>> name_of(Path("runs/digits"), 8).as_posix()
    'runs/digits-8steps'
    """
    return source.with_name(f"{source.absolute().name}-{steps_of_bound}steps")


def fine_tune(
    source: str | Path,
    steps_of_bound: int,
    out: str | Path | None = None,
    *,
    steps: int | None = None,
    device: str = "auto",
    progress: bool = False,
    on_event: OnEvent | None = None,
    network: custom.Network | None = None,
) -> Run:
    """Train the T-step bound from the best weights of the run `source`, with T = `steps_of_bound`.

    Args:
        source: a run folder; it is not changed.
        steps_of_bound: T.
        out: the new run folder; by default `source`-Tsteps, such as digits-8steps.
        steps: training steps; by default two thirds of those of `source`.
        device: where to train.
        progress: show progress bars on the error stream.
        on_event: as for `nelbo.train`.
        network: as for `nelbo.load`.

    Raises:
        FileNotFoundError: `source` is not a run.
        ValueError: `out` exists; T is not a valid number of steps; the loss becomes non-finite.
        Interrupted: after Ctrl-C, with the run saved; `resume` continues it.
    """
    source = Path(source)
    out = Path(out) if out else name_of(source, steps_of_bound)
    main_process_first(lambda: check_new(out))
    run = load(source, network)
    grid = run.grid(steps_of_bound, tracker("best times") if progress else iter)
    model, before = run.config.model, run.config.train
    train = replace(
        before,
        steps=max(1, 2 * before.steps // 3) if steps is None else steps,
        warmup=min(before.warmup, 50),
        cross_entropy=0.0,
        grid=tuple(grid.times.tolist()),
    )
    model = replace(model, dropout=max(model.dropout, DROPOUT))
    config = replace(run.config, model=model, train=train)
    dataset = own_data.load(config)
    if config.within:  # in the folder of the run, and not in that of the new one
        own_data.remember_place(config, progress)
    training = Training(out, config, dataset, device, on_event, network)
    return begin(training, progress, run.model)
