"""Training: read in five minutes, resumed exactly.

All randomness of step k follows from (seed, k) and the order of the examples from (seed, epoch),
so there is no generator to save: a run that was stopped and continued ends with the same weights.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from nelbo import checkpoint, data
from nelbo._interrupt import Interrupted, interruptible
from nelbo._numerics import LOG_2, derive_seed, seeded
from nelbo._progress import progress_bar
from nelbo.augment import augment
from nelbo.build import LAWS, OBJECTIVES, build
from nelbo.checkpoint import Run, RunConfig
from nelbo.config import configure
from nelbo.data import Dataset
from nelbo.estimate import Continuum, Grid, Times
from nelbo.evaluate import Evaluation, evaluate
from nelbo.few_steps import FewSteps
from nelbo.grids import measure_errors
from nelbo.heads import Logits
from nelbo.model import Model, find_device
from nelbo.objective import Objective
from nelbo.optimise import batch_indices, learning_rate, parameter_groups, warmed_ema
from nelbo.process import Affine

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

VALIDATION_EXAMPLES = 1000  # at most, so that validation stays a small part of the time


def train(
    source: str,
    out: str | Path,
    *,
    preset: str = "auto",
    levels: int | None = None,
    size: int | None = None,
    device: str = "cpu",
    progress: bool = False,
    **options: str | int | float,
) -> Run:
    """Train a model of the data at `source` into the new run folder `out`.

    Args:
        source: "digits", or a path that `nelbo.data.load` understands.
        out: a folder that does not exist yet, or is empty.
        preset: see `nelbo.config.configure`.
        levels: number of levels of integer data, found where left out.
        size: side to which images are resized.
        device: where to train, such as "cpu" or "cuda".
        progress: show a progress bar on the error stream.
        options: any field of ModelConfig or TrainConfig, in place of the preset's.

    Raises:
        ValueError: bad data or options; `out` exists; the loss becomes non-finite.
        Interrupted: after Ctrl-C, with the run saved; `resume` continues it.
    """
    out = Path(out)
    check_new(out)
    dataset = data.load(source, levels=levels, size=size)
    model_config, train_config = configure(
        dataset.schema, len(dataset.splits["train"]), preset, **options
    )
    run = RunConfig(
        source=dataset.source,
        schema=dataset.schema,
        size=size,
        hashes=checkpoint.hashes(dataset),
        preset=preset,
        model=model_config,
        train=train_config,
    )
    return begin(Training(out, run, dataset, device), progress)


def check_new(out: Path) -> None:
    """ValueError where a new run cannot be."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = f"; continue it with --resume {out}" if checkpoint.is_run(out) else ""
        kind = "a run" if checkpoint.is_run(out) else "not a run"
        raise ValueError(f"{out} exists and is {kind}{hint}; choose another --out")


def begin(training: "Training", progress: bool, weights: Model | None = None) -> Run:
    """A new run to its last step, from these weights where given; no folder without weights."""
    out = training.out
    try:
        if weights is not None:
            training.start_from(weights)
        checkpoint.write(out / checkpoint.CONFIG, training.run.to_json().encode())
        training.fit(progress)
    except Exception:
        if not (out / checkpoint.WEIGHTS).exists():
            shutil.rmtree(out, ignore_errors=True)  # all in it is ours, and of no use
        raise
    return checkpoint.load(out)


def resume(
    out: str | Path, *, steps: int | None = None, device: str = "cpu", progress: bool = False
) -> Run:
    """Continue a run where it stopped, exactly; `steps` extends or shortens it.

    Raises:
        FileNotFoundError: `out` is not a run.
        ValueError: its state is damaged or of another model; the loss becomes non-finite.
        Interrupted: after Ctrl-C, with the run saved.
    """
    out = Path(out)
    run = checkpoint.read_config(out)
    if steps is not None:
        run = replace(run, train=replace(run.train, steps=steps))
    training = Training(out, run, run.load_data(), device)
    if (out / checkpoint.STATE).exists():
        training.load_state()
    training.forget_later_metrics()
    if steps is not None:
        checkpoint.write(out / checkpoint.CONFIG, run.to_json().encode())
    training.fit(progress)
    return checkpoint.load(out)


@dataclass
class Progress:
    """Where a training stands; saved with its state."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    recent: float = math.nan  # running mean of the bound, nats


@dataclass
class Training:
    """One training run and its files."""

    out: Path
    run: RunConfig
    dataset: Dataset
    device: str = "cpu"
    at: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        t = self.run.train
        if t.augment and len(self.run.schema.shape) != 3:
            raise ValueError(f"augment is for images, and these are not; got {t.augment}, try 0")
        with seeded(t.seed, 0):
            model = build(self.run.model, self.run.schema, self._affine())
        if isinstance(model.head, Logits):
            model.head.start_from(self.dataset.splits["train"])
        self.model: Model = model.to(find_device(self.device))
        self.model.dtype = torch.float32
        start = model.process.schedule.start
        self.objective: Objective | FewSteps = (
            FewSteps(t.grid, t.cross_entropy)
            if t.grid
            else Objective(OBJECTIVES[t.objective], t.cross_entropy, start=start)
        )
        self.law = LAWS[t.times]()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, t.weight_decay), lr=t.lr, betas=(0.9, 0.99)
        )
        self.ema = AveragedModel(model, multi_avg_fn=warmed_ema(t.ema))
        self.writer: SummaryWriter | None = None

    def fit(self, progress: bool) -> None:
        """Train to the last step; Ctrl-C finishes the step, saves and raises."""
        total = self.run.train.steps
        x = self.dataset.splits["train"]
        started = time.monotonic() - self.at.seconds
        with (
            _tensorboard(self.out, self.at.step) as self.writer,
            _bar(progress, total, self.at.step) as update,
            interruptible() as interrupted,
        ):
            while self.at.step < total:
                self._step(x)
                self.at.seconds = time.monotonic() - started
                done = self.at.step
                update(done, self._note())
                if done % self.run.train.evaluate_every == 0 or done == total:
                    self._validate()
                    self.save_state()
                if interrupted():
                    self.save_state()
                    raise Interrupted

    def _step(self, x: Tensor) -> None:
        t, step = self.run.train, self.at.step
        index = batch_indices(len(x), t.batch, step, t.seed)
        batch = data.as_examples(x[index]).to(self.model.device)
        lr = learning_rate(t, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        with seeded(t.seed, 2, step):
            u, weight = self.law(len(batch))
            condition = None
            if t.augment:
                batch, condition = augment(batch, t.augment, self.run.schema)
            on = batch.device
            loss, bound, each = self.objective(
                self.model, batch, u.to(on), condition, weight.to(on)
            )
            self.optimizer.zero_grad()
            # per dimension, in bits: one learning rate and one clip for data of any size
            (loss / (self.model.dims * LOG_2)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.clip)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            values = f"{loss.item()}, gradient {norm.item()}"
            raise ValueError(self._failed(f"the loss became non-finite ({values})", step + 1))
        self.law.learn(u, each)
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        nats = bound.item()
        recent = nats if math.isnan(self.at.recent) else self.at.recent
        self.at.recent = recent + (nats - recent) * max(0.02, 1 / (step + 1))
        self.at.step = step + 1

    def start_from(self, weights: Model) -> None:
        """Begin with the weights of another run; they are kept until there are better ones."""
        for own in (self.model, cast(Model, self.ema.module)):
            checkpoint.put_weights(own, weights.state_dict(), "the run")
        self._measure()
        self.save_state()

    def _measure(self) -> Evaluation:
        """Measure the averaged weights on the validation split; keep the best."""
        x = self.dataset.splits["validation"][:VALIDATION_EXAMPLES]
        average = cast(Model, self.ema.module)
        grid, start = self.run.train.grid, average.process.schedule.start
        times: Times = Grid(grid) if grid else Continuum(start)
        seed = derive_seed(self.run.train.seed, 3)
        measure_errors(average, self.dataset.splits["train"], seed)
        result = evaluate(average, x, times=times, calls=max(8, 2 * len(grid)), seed=seed)
        if not math.isfinite(result.nats):
            raise ValueError(self._failed(f"the validation bound became {result.nats}"))
        if result.nats < self.at.best:
            self.at.best, self.at.best_step = result.nats, self.at.step
            about = {"weights": "ema", "step": self.at.step}
            checkpoint.write_tensors(self.out / checkpoint.WEIGHTS, average.state_dict(), about)
        return result

    def _validate(self) -> None:
        """Measure, keep the best, and tell."""
        result = self._measure()
        error = result.standard_error.total
        event = {
            "step": self.at.step,
            "seconds": round(self.at.seconds, 3),
            "lr": learning_rate(self.run.train, self.at.step - 1),
            "train": self._shown(self.at.recent),
            "validation": self._shown(result.nats),
            "validation_standard_error": None if math.isnan(error) else error,
            "unit": result.unit,
        }
        with (self.out / checkpoint.METRICS).open("a") as file:
            file.write(json.dumps(event) + "\n")
        if self.writer is not None:
            for name in ("train", "validation", "lr"):
                self.writer.add_scalar(name, event[name], self.at.step)

    def _failed(self, what: str, step: int | None = None) -> str:
        kept = f"the checkpoint of step {self.at.best_step} is kept in {self.out}"
        return (
            f"{what} at step {step or self.at.step};"
            f" {kept if self.at.best_step else 'there was no checkpoint yet'}; most often the"
            f" learning rate is too high: try a lower --lr than {self.run.train.lr:g}"
        )

    def save_state(self) -> None:
        """Everything to continue exactly, in one file."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors |= {f"law.{k}": v for k, v in self.law.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        about = {"weights": "raw and ema", "progress": self.at.__dict__}
        checkpoint.write_tensors(self.out / checkpoint.STATE, tensors, about)

    def load_state(self) -> None:
        """Continue from `state.safetensors`."""
        path = self.out / checkpoint.STATE
        tensors, about = checkpoint.read_tensors(path)
        for prefix, module in (("model.", self.model), ("ema.", self.ema), ("law.", self.law)):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            checkpoint.put_weights(module, part, str(path))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, moment = name.split(".")
                state.setdefault(int(i), {})[moment] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        trained = sum(len(group["params"]) for group in groups)
        progress = about.get("progress", {})
        if (
            len(state) != (trained if progress.get("step") else 0)
            or progress.keys() != self.at.__dict__.keys()
        ):
            raise ValueError(f"{path} lacks a part of the state; train again")
        self.at = Progress(**progress)

    def forget_later_metrics(self) -> None:
        """Drop what was logged after the state that training continues from."""
        kept = [e for e in checkpoint.read_metrics(self.out) if e["step"] <= self.at.step]
        lines = "".join(json.dumps(event) + "\n" for event in kept)
        checkpoint.write(self.out / checkpoint.METRICS, lines.encode())

    def _affine(self) -> Affine | None:
        """Standardisation by the training split: per dimension, for images per channel."""
        schema = self.run.schema
        if schema.levels is not None:
            return None
        x = self.dataset.splits["train"].double()
        dims = (0, 2, 3) if len(schema.shape) == 3 else (0,)
        shape = schema.shape
        mean = x.mean(dims, keepdim=True)[0].expand(shape).clone()
        spread = x.std(dims, keepdim=True)[0].expand(shape).clone()
        if not ((spread > 0) & spread.isfinite() & mean.isfinite()).all():
            raise ValueError(
                f"mean {mean.flatten()[0]:g} and standard deviation {spread.min():g} to"
                f" {spread.max():g} of the data cannot be standardised; rescale the data"
            )
        return Affine(mean, spread)

    def _shown(self, nats: float) -> float:
        return nats if self.run.schema.levels is None else nats / (self.model.dims * LOG_2)

    def _note(self) -> str:
        unit = "nats" if self.run.schema.levels is None else "bits/dim"
        best = f", validation {self._shown(self.at.best):.3f}" if self.at.best_step else ""
        return f"bound {self._shown(self.at.recent):.3f}{best} {unit}"


@contextmanager
def _bar(show: bool, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    if not show:
        yield lambda done, note: None
        return
    with progress_bar("train", total, done) as update:
        yield update


@contextmanager
def _tensorboard(out: Path, step: int) -> Iterator["SummaryWriter | None"]:
    """A writer of event files where tensorboard is installed; it drops what came after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
    try:
        yield writer
    finally:
        writer.close()
