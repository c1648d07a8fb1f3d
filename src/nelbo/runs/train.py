"""Train a model into a run folder, and resume it exactly (see `nelbo.training.trainer`)."""

import inspect as python
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch

from nelbo._utils import cache, files, limits
from nelbo._utils.distributed import anywhere, main_process_first, world
from nelbo._utils.numerics import LOG_2
from nelbo._utils.progress import interactive, progress_bar
from nelbo._utils.scalars import integer, real
from nelbo._utils.signals import Interrupted, interruptible
from nelbo.data.schema import Dataset
from nelbo.data.sources import BUILT_IN, Declaration, Source, Splits, load
from nelbo.data.splits import declare
from nelbo.diffusion.model import Model
from nelbo.evaluation.result import Evaluation
from nelbo.models import custom
from nelbo.models.config import CUSTOM, ModelConfig
from nelbo.runs import config as run_config
from nelbo.runs import events, held, training_state
from nelbo.runs import run as run_folder
from nelbo.runs.config import RunConfig
from nelbo.runs.run import Run
from nelbo.training.config import TrainConfig
from nelbo.training.optim import learning_rate
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

#: takes an event: step, seconds, lr, train, validation, validation_standard_error, unit
OnEvent = Callable[[dict[str, object]], object]
VALIDATIONS = 5  # number of validations of a training that is given minutes


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
        out: a folder that does not exist yet, or is empty; by default a new one in runs/, which
            is said.
        preset: see `nelbo.training.presets.configure`.
        levels: number of levels of integer data; inferred by default.
        size: side to which images are resized.
        schema: a JSON file with the columns of a table, or a list of them; inferred from the cells
            by default.
        condition: names of one or more labels c; the model is then one of P(x|c).
        splits: which names belong to which split, as for `nelbo.data.load`.
        tokenizer: read a text as tokens: "bpe:4096" for 4096 of them, learned from the training
            split and kept in the run; or a folder with a tokenizer.json.
        minutes: approximate duration, instead of `steps`: see `pace`.
        device: where to train, "cpu" or "cuda"; "auto" is cuda where there is one, else cpu.
        progress: show notes on the data and a progress bar on the error stream; by default if
            that is a terminal.
        on_event: called with each event as it is written to metrics.jsonl, a dictionary of plain
            values, on the first process only.
        network: the name of a network, see ModelConfig; or a network of your own: a module, of
            which a copy is trained, or a function without arguments that returns one. It is called
            as forward(z, log_snr) and its output read as `head` says, by default "noise"; see
            `nelbo.models.custom`. A UNet2DModel of diffusers is taken as it is. `load` and
            `resume` need it again.
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
        print(note, file=sys.stderr)
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
        if "steps" in options:
            raise ValueError("steps and minutes both say how long to train; give one of them")
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
    if not in_memory and run.source not in BUILT_IN and world()[0] == 0:
        try:
            run.remember(run.source)
        except OSError as error:
            if progress:
                print(f"where the data are is not kept: {cache.reason(error)}", file=sys.stderr)
    training = Training(out, run, dataset, device, on_event, module)
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


def new_folder(data: Source) -> Path:
    """Return a folder runs/NAME that does not exist yet, named after the data, and say so."""
    name = Path(data).name.partition(".")[0] if isinstance(data, str | PathLike) else "data"
    every = chain([Path("runs") / name], (Path("runs") / f"{name}-{i}" for i in count(2)))
    out = next(path for path in every if not path.exists())
    print(f"the run is in {out}", file=sys.stderr)
    return out


def pace(
    model: ModelConfig,
    train: TrainConfig,
    dataset: Dataset,
    seconds: float,
    device: str = "auto",
    clock: Callable[[], float] = time.monotonic,
    network: custom.Network | None = None,
) -> int:
    """Return how many steps fit into `seconds` with `VALIDATIONS` validations, from timing a few.

    The learning rate falls to zero at the last step, so the number of steps must be known before
    the first. It is stored in the run, which is then as reproducible as any other.

    Raises:
        ValueError: the time is too short for any training.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"minutes must be positive; got {seconds / 60:g}")
    learner = Trainer(model, train, dataset, device, network=network)
    learner.step()  # the first step includes one-time setup
    begun = clock()
    learner.measure()
    measured, steps = clock(), 0
    while steps < 3 or clock() - measured < 0.01 * seconds:
        learner.step()
        steps += 1
    left = seconds - VALIDATIONS * (measured - begun) - (clock() - begun)
    within = int(left * steps / (clock() - measured))
    if within < VALIDATIONS:
        raise ValueError(
            f"{seconds / 60:g} minutes are too few: a step takes"
            f" {(clock() - measured) / steps:.2g} seconds, and {VALIDATIONS} validations"
            f" {VALIDATIONS * (measured - begun):.2g}; give more, or --steps"
        )
    return within


def check_new(out: Path) -> None:
    """Raise ValueError if a new run cannot be written to `out`."""
    if out.is_dir():
        others = [p for p in out.iterdir() if p.name != run_config.LOCK and not files.is_part(p)]
    if out.exists() and (not out.is_dir() or others):
        run = f"a run; continue it with --resume {out}, or"
        kind = run if run_config.is_run(out) else "not a run;"
        raise ValueError(f"{out} exists and is {kind} choose another --out")


def begin(
    training: "Training",
    progress: bool,
    weights: Model | None = None,
    copy: bytes | None = None,
) -> Run:
    """Train a new run until it has ended; remove it if training fails before there are weights.

    Args:
        training: its folder must have been new when the data were read.
        progress: show a bar.
        weights: initial weights.
        copy: the data, if the run keeps a copy.
    """
    out = training.out
    with alone_in(out) as made:
        main_process_first(lambda: check_new(out))  # another process may have trained there
        try:
            training.found()
            if copy is not None and training.first:
                files.write(Path(training.run.source), copy)
            if weights is not None:
                training.fit_statistics(weights)
            training.configure()
            training.fit(progress)
        except (Exception, SystemExit):
            if training.first:
                training.remove(made)
            raise
    return run_folder.load(out, training.network)


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

    With other `steps` than it was begun with, the rest follows their schedule of learning rates:
    the result is not that of one training of so many steps.

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
        training = Training(out, changed, run.load_data(), device, on_event, network)
        training.found()
        training.restore()
        if changed != run:
            training.configure()
        training.fit(progress)
    return run_folder.load(out, network)


@contextmanager
def alone_in(out: Path) -> Iterator[bool]:
    """Lock the run folder against other trainings; the lock ends with the process.

    Yield whether the folder was created here. Partial files of killed trainings are removed.

    Raises:
        ValueError: another process trains the run, or the lock file is a link out of the run.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(limits.contained(out / run_config.LOCK, out), blocking=False)

    def acquire() -> bool:
        new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{out} is being trained by another process; wait for it, or stop it first"
            ) from None
        except (NotImplementedError, OSError):
            pass  # no locks or a read-only file system; writing will raise later
        files.tidy(out)
        return new

    made = main_process_first(acquire)
    try:
        yield made
    finally:
        lock.release()


class Training:
    """One training and its files, which only the first process writes."""

    def __init__(
        self,
        out: Path,
        run: RunConfig,
        dataset: Dataset,
        device: str = "auto",
        on_event: OnEvent | None = None,
        network: custom.Network | None = None,
    ) -> None:
        self.out, self.run, self.on_event, self.network = out, run, on_event, network
        rank, size = world()
        self.first, self.alone = rank == 0, size == 1
        self.learner = Trainer(run.model, run.train, dataset, device, network=network)
        self.add_event: events.Add = lambda event, step: None
        self.told = 0  # the step of the last event
        self.folder: tuple[int, int] | None = None  # device and inode, once the folder exists

    def found(self) -> None:
        """Remember the identity of the folder, to notice if it vanishes or is replaced."""
        self.folder = _place(self.out)

    def check_there(self) -> None:
        """Raise FileNotFoundError if the folder is no longer the one in which training began."""
        if self.first and self.folder is not None and _place(self.out) != self.folder:
            raise FileNotFoundError(
                f"the run folder {self.out} was removed or moved while it was trained, so nothing"
                " more of it is saved; bring it back and continue with nelbo train --resume"
                f" {self.out}, or train again"
            )

    def configure(self) -> None:
        """Write the configuration of the run."""
        if self.first:
            files.write(self.out / run_config.CONFIG, self.run.to_json().encode())

    def restore(self) -> None:
        """Continue from the saved state, if there is one."""

        def load() -> None:
            if training_state.is_in(self.out):
                training_state.load(self.out, self.learner, custom.mismatch(self.network))
                self.keep_best()
            self.forget_later_metrics()

        main_process_first(load)  # it may rename files
        if not self.first:
            load()

    def fit(self, progress: bool) -> None:
        """Train until it has ended. Ctrl-C finishes the current step, saves the run and raises."""
        total, learner = self.run.train.steps, self.learner
        started = time.monotonic() - learner.at.seconds
        with (
            events.written(self.out, learner.at.step, self.first) as self.add_event,
            _bar(progress and self.first, learner.model.device, total, learner.at.step) as update,
            interruptible(twice=self.alone) as interrupted,
        ):
            while not learner.ended:
                learner.step()
                self.check_there()
                learner.at.seconds = time.monotonic() - started
                done = learner.at.step
                update(done, self._note())
                if done % self.run.train.evaluate_every == 0 or done == total:
                    self._validate()
                    self.save()
                if anywhere(interrupted()):
                    self.save()
                    raise Interrupted
            if self.told < learner.at.step:  # resumed with fewer steps than it already has
                self._validate()
                self.save()
        # a finished run is not to be continued where it stood, so its last state suffices
        before = self.out / run_config.BEFORE
        main_process_first(lambda: before.unlink(missing_ok=True))  # the others wait
        if progress and self.first and (why := learner.stopped()):
            print(why, file=sys.stderr)

    def save(self) -> None:
        """Save everything needed to continue."""
        self.check_there()
        training_state.save(self.out, self.learner)

    def fit_statistics(self, weights: Model) -> None:
        """Start from the weights of another run; they are kept until there are better ones."""
        for own in (self.learner.model, self.learner.average):
            files.put_weights(own, weights.state_dict(), "the run")
        self._measure()
        self.save()

    def _measure(self) -> Evaluation:
        """Measure the averaged weights on the validation split; keep the best."""
        result, better = self.learner.measure()
        if better:
            self.keep_best()
        return result

    def keep_best(self) -> None:
        """Write the best weights so far, if there are any, as the weights of the run."""
        self.check_there()
        if self.learner.best and self.first:
            about = {"weights": "ema", "step": self.learner.at.best_step}
            files.write_tensors(self.out / run_config.WEIGHTS, self.learner.best, about)

    def _validate(self) -> None:
        """Measure, keep the best weights, and log an event."""
        result, at = self._measure(), self.learner.at
        self.check_there()
        error = result.standard_error.total
        event = {
            "step": at.step,
            "seconds": round(at.seconds, 3),
            "lr": learning_rate(self.run.train, at.step - 1),
            "train": self._shown(at.recent),
            "validation": self._shown(result.nats),
            "validation_standard_error": None if math.isnan(error) else error,
            "unit": result.unit,
        }
        if self.run.train.nonfinite == "skip":
            event["skipped"] = at.skipped
        self.told = at.step
        if not self.first:
            return
        with (self.out / run_config.METRICS).open("a") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())  # events are on disk before the state that follows them
        self.add_event(event, at.step)
        if self.on_event is not None:
            self.on_event(dict(event))

    def forget_later_metrics(self) -> None:
        """Drop events that were logged after the state from which training continues."""
        kept = [e for e in run_config.read_metrics(self.out) if e["step"] <= self.learner.at.step]
        lines = "".join(json.dumps(event) + "\n" for event in kept)
        if self.first:
            files.write(self.out / run_config.METRICS, lines.encode())
        self.told = kept[-1]["step"] if kept else 0

    def remove(self, made: bool) -> None:
        """Remove the files of a failed training, unless it can be continued.

        Files are removed by name; the folder only if it was `made` by this training and is empty.
        """
        out = self.out
        whole = run_config.is_run(out) and (out / run_config.WEIGHTS).exists()
        if whole or training_state.is_in(out) or _place(out) != self.folder:
            return
        with suppress(OSError):
            events.remove(out)
            for name in run_config.WRITTEN:
                (out / name).unlink(missing_ok=True)
            if made:
                out.rmdir()

    def _shown(self, nats: float) -> float:
        dims = self.learner.model.dims
        return nats if self.run.schema.density else nats / (dims * LOG_2)

    def _note(self) -> str:
        at = self.learner.at
        unit = "nats" if self.run.schema.density else "bits/dim"
        best = f", validation {self._shown(at.best):.3f}" if at.best_step else ""
        return f"bound {self._shown(at.recent):.3f}{best} {unit}"


def _place(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder; None if it does not exist."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _bar(
    show: bool, device: torch.device, total: int, done: int
) -> Iterator[Callable[[int, str], None]]:
    if not show:
        yield lambda done, note: None
        return
    with progress_bar(f"train on {device}", total, done) as update:
        yield update
