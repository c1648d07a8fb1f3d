"""One training in a run folder: its steps, its validations and the files that it writes."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nelbo._utils import files, tensor_files
from nelbo._utils.distributed import anywhere, main_process_first, world
from nelbo._utils.numerics import LOG_2
from nelbo._utils.progress import progress_bar
from nelbo._utils.signals import Interrupted, interruptible
from nelbo.data.schema import Dataset
from nelbo.diffusion.model import Model
from nelbo.evaluation.blocks import unit_of
from nelbo.evaluation.result import Evaluation
from nelbo.models import custom
from nelbo.runs import config as run_config
from nelbo.runs import events, training_state
from nelbo.runs.config import RunConfig
from nelbo.runs.folder import alone_in, check_new, identity
from nelbo.runs.loading import load
from nelbo.runs.run import Run
from nelbo.training.optim import learning_rate
from nelbo.training.trainer import Trainer

#: takes an event: step, seconds, lr, train, validation, validation_standard_error, unit
OnEvent = Callable[[dict[str, object]], object]


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
        model = self.learner.model
        any_length = model.process.absent is not None
        self.measured = model.scored(self.learner.validation) if any_length else model.dims
        self.add_event: events.Add = lambda event, step: None
        self.reported = 0  # the step of the last event
        self.folder: tuple[int, int] | None = None  # device and inode, once the folder exists

    def found(self) -> None:
        """Remember the identity of the folder, to notice if it vanishes or is replaced."""
        self.folder = identity(self.out)

    def check_there(self) -> None:
        """Raise FileNotFoundError if the folder is no longer the one in which training began."""
        if self.first and self.folder is not None and identity(self.out) != self.folder:
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
            if self.reported < learner.at.step:  # resumed with fewer steps than it already has
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
            tensor_files.put_weights(own, weights.state_dict(), "the run")
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
            tensor_files.write_tensors(self.out / run_config.WEIGHTS, self.learner.best, about)

    def _validate(self) -> None:
        """Measure, keep the best weights, and log an event."""
        result, at = self._measure(), self.learner.at
        self.check_there()
        error = result.standard_error.total
        event = {
            "step": at.step,
            "seconds": round(at.seconds, 3),
            "lr": learning_rate(self.run.train, at.step - 1),
            "train": self._shown(at.recent, self.learner.model.dims),
            "validation": self._shown(result.nats, self.measured),
            "validation_standard_error": None if math.isnan(error) else error,
            "unit": result.unit,
        }
        if self.run.train.nonfinite == "skip":
            event["skipped"] = at.skipped
        self.reported = at.step
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
        self.reported = kept[-1]["step"] if kept else 0

    def remove(self, made: bool) -> None:
        """Remove the files of a failed training, unless it can be continued.

        Files are removed by name; the folder only if it was `made` by this training and is empty.
        """
        out = self.out
        whole = run_config.is_run(out) and (out / run_config.WEIGHTS).exists()
        if whole or training_state.is_in(out) or identity(out) != self.folder:
            return
        with suppress(OSError):
            events.remove(out)
            for name in run_config.WRITTEN:
                (out / name).unlink(missing_ok=True)
            if made:
                out.rmdir()

    def _shown(self, nats: float, dims: float) -> float:
        return nats if self.run.schema.density else nats / (dims * LOG_2)

    def _note(self) -> str:
        at = self.learner.at
        unit = unit_of(self.learner.model)
        best = f", validation {self._shown(at.best, self.measured):.3f}" if at.best_step else ""
        return f"bound {self._shown(at.recent, self.learner.model.dims):.3f}{best} {unit}"


@contextmanager
def _bar(
    show: bool, device: torch.device, total: int, done: int
) -> Iterator[Callable[[int, str], None]]:
    if not show:
        yield lambda done, note: None
        return
    with progress_bar(f"train on {device}", total, done) as update:
        yield update


def begin(
    training: Training,
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
    return load(out, training.network)
