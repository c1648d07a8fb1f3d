"""Train a model into a run folder, and resume it exactly (see `nelbo.training.trainer`)."""

import inspect as python
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

from nelbo._utils import spelling
from nelbo._utils.arguments import checked
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.progress import interactive
from nelbo._utils.scalars import integer, real
from nelbo.data.sources import Declaration, Source, Splits, load
from nelbo.data.splits import declare
from nelbo.models import custom
from nelbo.models.config import CUSTOM, ModelConfig
from nelbo.runs import config as run_config
from nelbo.runs import held, own_data
from nelbo.runs.config import RunConfig
from nelbo.runs.folder import alone_in, check_new, new_folder
from nelbo.runs.loading import load as load_run
from nelbo.runs.pace import VALIDATIONS, pace
from nelbo.runs.run import Run
from nelbo.runs.training import OnEvent, Training, begin
from nelbo.training.config import TrainConfig
from nelbo.training.presets import by_config, configure


@checked
def train(
    data: Source,
    out: str | Path | None = None,
    *,
    preset: str = "auto",
    levels: int | None = None,
    size: int | None = None,
    schema: Declaration = None,
    condition: Sequence[str] = (),
    splits: Splits | None = None,
    tokenizer: str | None = None,
    minutes: float | None = None,
    device: str = "auto",
    progress: bool | None = None,
    on_event: OnEvent | None = None,
    network: custom.Network | str | None = None,
    **options: str | int | float,
) -> Run:
    """Train a model of data into the new run folder `out`.

    Args:
        data: "digits", or a path that `nelbo.data.load` understands; or the data themselves, of
            any kind in `nelbo.data.coerce`, of which the run keeps a copy.
        out: a folder that does not exist yet, or is empty; by default a new one in runs/, whose
            name is printed.
        preset: see `nelbo.training.presets.configure`.
        levels: number of levels of integer data; inferred by default.
        size: side to which images are resized.
        schema: a JSON file with the columns of a table, or a list of them; inferred from the cells
            by default.
        condition: names of one or more labels c; the model is then one of P(x|c).
        splits: which names belong to which split, as for `nelbo.data.load`.
        tokenizer: read text as tokens: "bpe:4096" learns 4096 byte-pair tokens from the training
            split and keeps them in the run; or a folder with a tokenizer.json.
        minutes: approximate duration, instead of `steps`: see `pace`.
        device: where to train, "cpu" or "cuda"; "auto" is cuda where there is one, else cpu.
        progress: show notes on the data and a progress bar on the error stream; by default if
            that is a terminal.
        on_event: called with each event as it is written to metrics.jsonl, a dictionary of plain
            values, on the first process only.
        network: the name of a network, see ModelConfig; or a network of your own: a module, of
            which a copy is trained, or a function without arguments that returns one. It is called
            as forward(z, log_snr), and `head` says what it predicts, by default "noise"; see
            `nelbo.models.custom`. A UNet2DModel of diffusers works as it is. `load` and `resume`
            need it again.
        options: any field of ModelConfig or TrainConfig, in place of the preset's; each is in the
            signature, and below.

    Raises:
        ValueError: bad data or options; `out` exists; the loss becomes non-finite.
        Interrupted: after Ctrl-C, with the run saved; `resume` continues it.
    """
    progress = interactive() if progress is None else progress
    out = main_process_first(lambda: new_folder(data)) if out is None else Path(out)
    levels = None if levels is None else integer("levels", levels, 2)
    size = None if size is None else integer("size", size, 1)
    minutes = None if minutes is None else real("minutes", minutes)
    main_process_first(lambda: check_new(out))
    run_config.check_no_run(data)
    if minutes is not None and "steps" in options:
        raise ValueError("steps and minutes both say how long to train; give one of them")
    by_config(options)
    frames = "pandas" if hasattr(data, "iloc") else "polars"
    in_memory = not isinstance(data, str | PathLike)
    copy = held.table_of(data) if in_memory else None
    dataset = load(
        data,
        levels=levels,
        size=size,
        schema=schema,
        condition=condition,
        splits=splits,
        tokenizer=tokenizer,
    )
    name = None
    if in_memory:
        name = run_config.ARRAYS if copy is None else run_config.TABLE
        dataset = held.whole(dataset)
        copy = held.to_bytes(dataset) if copy is None else copy
    for note in dataset.notes if progress else ():
        print(spelling.shown(note), file=sys.stderr)
    module = None if isinstance(network, str) else network
    if network is not None:
        options["network"] = network if isinstance(network, str) else CUSTOM
    model_config, train_config = configure(
        dataset.schema, len(dataset.splits["train"]), preset, **options
    )
    if train_config.shard and world()[1] == 1:
        raise ValueError(
            "shard divides a network among processes, and there is one; start more with: torchrun"
            " --nproc_per_node 2 -m nelbo train ..."
        )
    if minutes is not None:
        clock = partial(main_process_first, time.monotonic)  # the same steps on all processes
        steps = pace(model_config, train_config, dataset, 60 * minutes, device, clock, module)
        every = options.get("evaluate_every", max(1, steps // VALIDATIONS))
        train_config = replace(train_config, steps=steps, evaluate_every=int(every))
    run = RunConfig(
        source=dataset.source if name is None else str(out.absolute() / name),
        schema=dataset.schema,
        size=size,
        hashes=run_config.hashes(dataset),
        preset=preset,
        model=model_config,
        train=train_config,
        within=in_memory,
        splits=declare(splits),
        frames=frames,
    )
    if not in_memory:
        own_data.remember_place(run, progress)
    fitting = own_data.fitting(run, dataset)
    for note in fitting.notes[len(dataset.notes) :] if progress else ():
        print(spelling.shown(note), file=sys.stderr)
    training = Training(out, run, fitting, device, on_event, module)
    return begin(training, progress, copy=copy)


def _with_options() -> None:
    """Give `train` the signature and the docstring with all options by name."""
    signature = python.signature(train)
    known = dict(signature.parameters)
    del known["options"]
    for config in (ModelConfig, TrainConfig):
        for each in fields(config):
            if each.name not in known:
                kind = cast(Any, each.type) | None
                known[each.name] = python.Parameter(
                    each.name, python.Parameter.KEYWORD_ONLY, default=None, annotation=kind
                )
    train.__signature__ = signature.replace(parameters=[*known.values()])  # type: ignore[attr-defined]
    for config in (ModelConfig, TrainConfig) if train.__doc__ else ():
        train.__doc__ = f"{train.__doc__}\n{config.__name__}: {config.__doc__}"


_with_options()


@checked
def resume(
    out: str | Path,
    *,
    steps: int | None = None,
    patience: int | None = None,
    shard: bool | None = None,
    device: str = "auto",
    progress: bool | None = None,
    on_event: OnEvent | None = None,
    network: custom.Network | None = None,
) -> Run:
    """Continue a run exactly where it stopped; `steps` extends or shortens it.

    If `steps` differs from the original number, the remaining steps follow the learning rates of
    the new number, so the result differs from a single training with that number.

    A run that the validation bound has stopped goes on with another `patience`, or 0 for none.
    `shard` says whether several processes divide the network from now on. With another number of
    processes, training continues with the same examples, times and noise, but sums are taken in
    another order: the result is the same up to rounding, not to the bit. `on_event` is as for
    `train`, and `network` as for `load`.

    Raises:
        FileNotFoundError: `out` is not a run.
        ValueError: its state is damaged or of another model; the loss becomes non-finite.
        Interrupted: after Ctrl-C, with the run saved.
    """
    out, progress = Path(out), interactive() if progress is None else progress
    run = run_config.read_config(out)
    custom.check_given(run.model, network, out)
    t = run.train
    longer = replace(
        t,
        steps=t.steps if steps is None else steps,
        patience=t.patience if patience is None else patience,
        shard=t.shard if shard is None else shard,
    )
    changed = replace(run, train=longer)
    with alone_in(out):
        training = Training(out, changed, own_data.load(run), device, on_event, network)
        training.found()
        training.restore()
        if changed != run:
            training.configure()
        training.fit(progress)
    return load_run(out, network)
