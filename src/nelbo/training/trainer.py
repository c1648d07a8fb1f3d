"""Training in memory, one step at a time; `nelbo.runs.train` adds the files of a run.

All randomness of step k follows from (seed, k), and the order of the examples from (seed, epoch).
So there is no generator to save, and a training that is stopped and continued ends with the same
weights.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nelbo._utils.batch_rng import BatchShard
from nelbo._utils.distributed import no_communication, world
from nelbo._utils.numerics import LOG_2, derive_seed, seeded
from nelbo._utils.sharding import clip_gradients, gathered, is_sharded
from nelbo.data.rows import WINDOW, Ahead, Rows
from nelbo.data.schema import Dataset, as_examples
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.model import Model, find_device
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.grid_search import measure_errors
from nelbo.evaluation.result import Evaluation
from nelbo.models import custom
from nelbo.models.build import build
from nelbo.models.conditioning import drop, encode, features, labelled
from nelbo.models.config import ModelConfig
from nelbo.nn.mixture import Corrected
from nelbo.training.augmentation import augment
from nelbo.training.batching import Blocks, batch_indices
from nelbo.training.config import Progress, TrainConfig
from nelbo.training.objective import OBJECTIVES, GridObjective, Loss, Objective
from nelbo.training.optim import learning_rate, optimizer, warmed_ema
from nelbo.training.parallel import add_up, deterministic, parts_of, prepare, shard
from nelbo.training.presets import MANY_LEVELS
from nelbo.training.timestep_samplers import TIMESTEP_SAMPLERS

CLEAR = -30.0  # gamma below which a float32 network sees no noise, as rounding exceeds it
SKIPPED = 10  # steps in a row without a finite loss after which training stops
STARTED_FROM = 2**15  # examples on disk to which a model fits its statistics, at most
VALIDATION = (1000, 2**18)  # examples and numbers of a validation, at most, to take little time


class Trainer:
    """A model in training: its optimiser, its moving average `ema` and the data.

    Args:
        model: configuration of the model.
        train: configuration of the training.
        dataset: with the splits "train" and "validation".
        device: where to train.
        affine: the transform of real data; `standardise` where left out.
        known: a network without weights; the trained network adds to its output.
        network: of the user's own, of which a copy is trained, see `nelbo.models.custom`.

    Raises:
        ValueError: if the parts do not fit together or the data, or there is no such device.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        dataset: Dataset,
        device: str = "cpu",
        affine: Affine | None = None,
        known: nn.Module | None = None,
        network: custom.Network | None = None,
    ) -> None:
        schema, t = dataset.schema, train
        if t.augment and len(schema.shape) != 3:
            raise ValueError(f"augment is for images, and these are not; got {t.augment}, try 0")
        self.config, self.dataset, self.at = train, dataset, Progress()
        with seeded(t.seed, 0):
            built = build(model, schema, affine or standardise(dataset), network)
        if known is not None:
            built.network = Corrected(known, built.network)
        train_split = dataset.splits["train"]
        stored = train_split if isinstance(train_split, Rows) else None
        built.fit_statistics(train_split if stored is None else stored.few(STARTED_FROM))
        self.blocks = Blocks(stored.block, stored.sequential) if stored and stored.block else None
        self.read = self._batch if stored is None else Ahead(self._batch, self._warm)
        if network is not None:
            conditional = bool(schema.condition or t.augment)
            custom.check_runs(built, features(schema) if conditional else 0)
        self.ema = AveragedModel(built, multi_avg_fn=warmed_ema(t.ema))
        on, self.sharded = find_device(device), t.shard and world()[1] > 1
        for each in (built, self.average):
            if self.sharded:
                shard(each, on)
            each.to(on)
        self.model: Model = built
        learned = [p for p in built.parameters() if p.requires_grad]
        self.undivided = [p for p in learned if not is_sharded(p)]
        self.model.dtype = torch.float32
        start = built.process.schedule.start
        self.objective: Objective | GridObjective = (
            GridObjective(t.grid, t.cross_entropy)
            if t.grid
            else Objective(OBJECTIVES[t.objective], t.cross_entropy, start=start)
        )
        self.parts = parts_of(t.batch, t.accumulate)
        self.law = TIMESTEP_SAMPLERS[t.times]()
        self.optimizer = optimizer(built, t)
        prepare(self.model, t)
        self.best: dict[str, Tensor] = {}  # averaged weights of the best measurement

    @property
    def average(self) -> Model:
        """The model with averaged weights, which is measured and kept."""
        return cast(Model, self.ema.module)

    def step(self) -> None:
        """Take one step of the optimiser on the next batch.

        Raises:
            ValueError: if the loss is not finite and is not to be skipped, or was too often.
        """
        t, step = self.config, self.at.step
        lr = learning_rate(t, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self.optimizer.zero_grad()
        with deterministic(t.deterministic):
            u, (loss, bound, each, _) = self._gradient(step)
            norm = clip_gradients(list(self.model.parameters()), t.clip)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                return self._skip(f"({loss.item()}, gradient {norm.item()})")
            self.law.learn(u, each)
            self.optimizer.step()
            self.ema.update_parameters(self.model)
        self.at.skipped_now = 0
        nats = bound.item()
        recent = nats if math.isnan(self.at.recent) else self.at.recent
        self.at.recent = recent + (nats - recent) * max(0.02, 1 / (step + 1))
        self.at.step = step + 1

    def _skip(self, values: str) -> None:
        """Skip a step, leaving all weights as they are; or raise."""
        if self.config.nonfinite == "stop":
            what = f"the loss became non-finite {values}"
            raise ValueError(self._failed(what, self.at.step + 1))
        self.at.skipped, self.at.skipped_now = self.at.skipped + 1, self.at.skipped_now + 1
        if self.at.skipped_now == SKIPPED:
            what = f"the loss was non-finite {SKIPPED} times in a row {values}"
            raise ValueError(self._failed(what, self.at.step + 1))
        self.at.step += 1

    def _gradient(self, step: int) -> tuple[Tensor, Loss]:
        """Compute gradients of the loss of a step; return the draws u and the loss."""
        t, on, found = self.config, self.model.device, []
        # bits per dimension, so that one learning rate and one clip suit data of any size
        scale = 1 / (self.model.dims * LOG_2)
        index, batch = self.read(step)
        for own, part in self.parts:
            with seeded(t.seed, 2, step), part:
                u, weight = (v.to(on) for v in self.law(t.batch))
                some = self._conditioned(index[own], batch[own].to(on), part)
                loss = self.objective(self.model, some, u, weight, part)
                (loss.loss * scale).backward()
            found.append((part, loss))
        whole = add_up(found, self.undivided)
        interior = self.objective.interior(self.model, u, weight, whole.rate)
        if interior.requires_grad:  # of the whole batch, the same on each process
            (interior * scale).backward()
        return u, whole

    def _conditioned(self, index: Tensor, x: Tensor, part: BatchShard) -> Batch:
        """Return examples x, some moved by augmentation, with their conditions."""
        t, schema, condition = self.config, self.dataset.schema, None
        if schema.condition:
            labels = encode(self.dataset.labels["train"][index], schema).to(x.device)
            condition = drop(labels, t.label_dropout, part)
        if t.augment:
            x, moved = augment(x, t.augment, schema, part)
            labels = torch.zeros(len(x), 1) if condition is None else condition
            condition = torch.cat([moved[:, None], labels.to(moved)[:, 1:]], 1)
        return Batch(x, condition)

    @property
    def ended(self) -> bool:
        """Whether the last step is done, or the validation bound has stopped improving."""
        return self.at.step >= self.config.steps or self.converged

    @property
    def converged(self) -> bool:
        """Whether `patience` measurements in a row have not improved the validation bound."""
        return 0 < self.config.patience <= self.at.unimproved

    def stopped(self) -> str:
        """Return the sentence that says why training stopped before its last step, or ""."""
        t, at = self.config, self.at
        if at.step >= t.steps or not self.converged:
            return ""
        return (
            f"training stopped at step {at.step} of {t.steps}: {at.unimproved} validations in a"
            f" row have not improved on the bound of step {at.best_step} (--patience)"
        )

    def fit(
        self,
        bound: Callable[[Model], float] | None = None,
        update: Callable[[int, str], object] = lambda done, note: None,
    ) -> Model:
        """Train until the training has `ended`.

        Args:
            bound: function from an averaged model to its bound in nats, in place of `measure`; it
                is then called before the first step too.
            update: called after each step with the number of steps and the best bound so far.

        Returns:
            The best of the averaged models, which are measured every `evaluate_every` steps.
        """
        t, at = self.config, self.at
        if bound is not None:
            self.keep(bound(self.average))
        while not self.ended:
            self.step()
            if at.step % t.evaluate_every == 0 or at.step == t.steps:
                self.measure() if bound is None else self.keep(bound(self.average))
            update(at.step, f"bound {at.best:.4g} nats" if at.best < math.inf else "")
        best = copy.deepcopy(self.average)
        best.load_state_dict(self.best)
        best.dtype = torch.float64
        return best.eval()

    def measure(self) -> tuple[Evaluation, bool]:
        """Return the bound of the averaged weights on the validation split; keep the best.

        Returns:
            The bound, and whether it is the best so far.

        Raises:
            ValueError: if the bound is not finite.
        """
        few = self.validation
        average = self.average
        grid, start = self.config.grid, average.process.schedule.start
        times: TimeDiscretization = TimeGrid(grid) if grid else ContinuousTime(start)
        seed = derive_seed(self.config.seed, 3)
        calls, variates = max(8, 2 * len(grid)), (self.dataset.schema.levels or 0) <= MANY_LEVELS
        with no_communication() if self.sharded else nullcontext():
            measure_errors(average, self.examples("train"), seed)
            result = evaluate(average, few, times=times, calls=calls, variates=variates, seed=seed)
        return result, self.keep(result.nats)

    def keep(self, nats: float) -> bool:
        """Keep the averaged weights if their bound is the best so far; return whether it is.

        Args:
            nats: their validation bound, per example.

        Raises:
            ValueError: if the bound is not finite.
        """
        if not math.isfinite(nats):
            raise ValueError(self._failed(f"the validation bound became {nats}"))
        better = nats < self.at.best
        self.at.unimproved = 0 if better else self.at.unimproved + 1
        if better:
            self.at.best, self.at.best_step = nats, self.at.step
            weights = gathered(self.average.state_dict()).items()
            self.best = {name: tensor.clone() for name, tensor in weights}
        return better

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the examples of this process in a step, and the examples."""
        x, t = self.dataset.splits["train"], self.config
        index = batch_indices(len(x), t.batch, step, t.seed, *world(), self.blocks)
        return index, as_examples(x[index])

    def _warm(self, step: int) -> None:
        """Start reading the examples that come half a window of blocks after a step."""
        x, t = self.dataset.splits["train"], self.config
        if self.blocks is not None and isinstance(x, Rows):
            later = step + self.blocks.size * WINDOW // (2 * t.batch)
            x.warm(batch_indices(len(x), t.batch, later, t.seed, *world(), self.blocks).numpy())

    @property
    def validation(self) -> Batch:
        """The validation examples that are measured while training."""
        examples = min(VALIDATION[0], max(100, VALIDATION[1] // self.model.dims))
        return self.examples("validation")[:examples]

    def examples(self, split: str) -> Batch:
        """Return the examples of a split, with their labels where the schema is conditional."""
        data = self.dataset
        return labelled(data.splits[split], data.labels.get(split), data.schema)

    def _failed(self, what: str, step: int | None = None) -> str:
        """Return the message of an error: what failed, which weights are kept, and the advice."""
        kept = f"the weights of step {self.at.best_step} are kept"
        if math.isnan(self.at.recent):  # no step was taken: the weights are the initial ones
            low, high = _range(self.dataset.splits["train"])
            ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
            least, most = self.average.process.schedule(ends.to(self.average.device)).tolist()
            why = "before the first step, so the learning rate is not the cause: " + (
                f"gamma begins at {least:g}, a signal e^{-least:g} times the noise; try a"
                " --gamma-min of -20 or more, or leave it out"
                if least < CLEAR
                else f"the data lie in {low:g}..{high:g}, gamma in {least:g}..{most:g}; rescale"
                " the data to about -1..1, or leave --gamma-min and --gamma-max out"
            )
        else:
            why = (
                "most often the learning rate is too high: try a lower --lr than"
                f" {self.config.lr:g}"
            )
        return (
            f"{what} at step {step or self.at.step};"
            f" {kept if self.at.best_step else 'there were no weights to keep yet'}; {why}"
        )


def _range(x: Tensor) -> tuple[float, float]:
    """Return the least and the greatest value of examples, with 0 for missing ones."""
    known = (x.few(STARTED_FROM) if isinstance(x, Rows) else x).double().nan_to_num(0)
    return known.min().item(), known.max().item()


def standardise(dataset: Dataset) -> Affine | None:
    """Return the transform that standardises real data; None for all other data.

    Mean and standard deviation are those of the training split, for each channel of images and
    for each dimension otherwise.

    Raises:
        ValueError: if a dimension is constant, or its squares overflow.
    """
    schema = dataset.schema
    if schema.kind != "real":
        return None
    x = dataset.splits["train"].double()
    dims = (0, 2, 3) if len(schema.shape) == 3 else (0,)
    shape = schema.shape
    mean = x.mean(dims, keepdim=True)[0].expand(shape).clone()
    spread = x.std(dims, keepdim=True)[0].expand(shape).clone()
    if not ((spread > 0) & spread.isfinite() & mean.isfinite()).all():
        raise ValueError(
            f"mean {mean.flatten()[0]:g} and standard deviation {spread.min():g} to"
            f" {spread.max():g} of the data, which lie in {x.min():g}..{x.max():g}, cannot be"
            " standardised; rescale the data"
        )
    return Affine(mean, spread)
