"""A trained run in memory: its model, configuration and metrics, with methods to measure it."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nelbo._utils import limits
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.files import keep, kept, put_weights, read_tensors
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track, shortened
from nelbo.data.sources import Splits, load_like
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, model_hash
from nelbo.diffusion.times import TimeDiscretization, TimeGrid, even_times
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.grid_search import best_grid
from nelbo.evaluation.result import Evaluation
from nelbo.models.build import build
from nelbo.models.conditioning import encode, labelled
from nelbo.runs.config import GRIDS, WEIGHTS, RunConfig, read_config, read_metrics

if TYPE_CHECKING:
    from nelbo.data.tabular.tables import Frame


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def _quiet(line: str) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """A trained run, as returned by `nelbo.load`."""

    path: Path
    model: Model
    config: RunConfig
    weights: str
    metrics: list[dict]

    def examples(
        self,
        source: "str | PathLike[str] | Frame | None" = None,
        split: str | None = None,
        splits: Splits | None = None,
    ) -> tuple[Tensor, str]:
        """Return examples of the run's own or other data, and a name for them; see `batch`."""
        batch, name = self.batch(source, split, splits)
        return batch.x, name

    def batch(
        self,
        source: "str | PathLike[str] | Frame | None" = None,
        split: str | None = None,
        splits: Splits | None = None,
        tell: Callable[[str], object] = _warn,
    ) -> tuple[Batch, str]:
        """Return examples of the run's own data or of other data, and a name for them.

        If the run is conditional, the batch contains their labels as conditions.

        Args:
            source: other data of the run's schema; the run's own by default.
            split: "train", "validation", "test"; for other data also "all". The default is "test"
                for the run's own data and "all" for other data.
            splits: splits of other data, as for `nelbo.data.load`.
            tell: called with notes on other data, such as values that did not occur in training;
                by default it issues a warning.

        Raises:
            ValueError: the data have another schema; there is no such split; or it is not known
                where the run's own data are.
        """
        if source is None:
            dataset = self.config.load_data()
        else:
            dataset = load_like(source, self.config.schema, size=self.config.size, splits=splits)
            for note in dataset.notes:
                tell(f"note: {note}")
        split = split or ("test" if source is None else "all")
        if split not in dataset.splits:
            raise ValueError(f"split must be one of {', '.join(dataset.splits)}; got {split!r}")
        place = source if isinstance(source, str | PathLike) else "a table"
        name = split if source is None else f"{split} of {place}"
        labels = dataset.labels.get(split)
        return labelled(dataset.splits[split], labels, self.config.schema), name

    def evaluate(
        self,
        source: "str | PathLike[str] | Frame | None" = None,
        split: str | None = None,
        *,
        splits: Splits | None = None,
        steps: int | None = None,
        tell: Callable[[str], object] | None = None,
        **options: Any,  # noqa: ANN401 - those of `measure`
    ) -> Evaluation:
        """Return the bound on -log P(x) of the run's own data or of other data.

        The result equals that of `nelbo evaluate RUN`.

        Args:
            source: as for `batch`.
            split: as for `batch`.
            splits: as for `batch`.
            steps: T, for the T-step bound on the run's best grid; continuous time by default.
            tell: as for `batch`; also called with messages about slow work.
            options: calls, target_error, per_example, variates, seed and track of
                `nelbo.evaluate`.

        Raises:
            ValueError: as for `batch`, `grid` and `nelbo.evaluate`.
        """
        batch, name = self.batch(source, split, splits, tell or _warn)
        times = None if steps is None else self.grid(steps)
        own = source is None
        return self.measure(
            batch, split=name, own=own, times=times, tell=tell or _quiet, **options
        )

    def measure(
        self,
        batch: Batch,
        *,
        split: str = "as given",
        own: bool = False,
        times: TimeDiscretization | None = None,
        variates: bool = True,
        tell: Callable[[str], object] = _quiet,
        **options: Any,  # noqa: ANN401 - those of `nelbo.evaluate`
    ) -> Evaluation:
        """Return the bound of examples that `batch` returned.

        Args:
            batch: the examples.
            split: their name, for the record.
            own: whether they belong to the run's own data. If so, the control variates are fitted
                to the training split, and a pilot on the validation split is cached for this user.
            times: times of the bound; continuous time by default.
            variates: see `nelbo.evaluate`.
            tell: called with messages about slow work.
            options: see `nelbo.evaluate`.
        """
        from nelbo.runs.pilot_cache import Pilots

        if own and variates:
            options["known"] = self.examples(split="train")[0]
            options["pilots"] = Pilots(self, tell)
        options = {"weights": self.weights, "split": split, "times": times, **options}
        return evaluate(self.model, batch, variates=variates, **options)

    def meet(self, source: "str | PathLike[str] | Frame") -> bool:
        """Tell the run where its data are; return whether they were unknown and `source` has them.

        A run that this user did not train reads no data that it names, until they are given here.
        """
        if (
            not isinstance(source, str | PathLike)
            or main_process_first(self.config.place) is not None
        ):
            return False
        place = self.config.recognises(str(source))
        if place is None:
            return False
        with contextlib.suppress(OSError):  # then the record lasts until the process ends
            self.config.remember(place)
        return True

    def conditions(self, count: int, labels: Tensor | None = None, seed: int = 0) -> Tensor | None:
        """Return conditions for `count` examples, (count, F); None if the run is unconditional.

        Args:
            count: number of examples.
            labels: one row per example, (count, len(schema.condition)); by default drawn with
                replacement from the training examples that have all labels.
            seed: seed of that draw.

        Raises:
            ValueError: labels are to be drawn and the training data are not available.
        """
        schema = self.config.schema
        if not schema.condition:
            return None
        if labels is None:
            try:
                known = self.config.load_data().labels["train"]
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"labels are drawn from the training data: {error}; or give --condition"
                ) from None
            known = known[~known.isnan().any(1)]
            if not len(known):
                raise ValueError("no training example has all labels; give --condition")
            with seeded(seed, 4):
                labels = known[torch.randint(len(known), (count,))]
        return encode(labels, schema)

    def grid(self, steps: int, track: Track = iter) -> TimeGrid:
        """Return the best grid of `steps` times for this model; it does not depend on any seed.

        It is the grid that the run was trained on, if that has `steps` times. Otherwise it is
        found once on the training data and stored in the run folder for these weights.

        Raises:
            ValueError: invalid number of steps, or the training data are not available.
        """
        even_times(self.model.process.schedule, steps, steps)  # raises for an invalid number
        if len(self.config.train.grid) == steps:
            return TimeGrid(self.config.train.grid)
        path, key = self.path / GRIDS, f"{model_hash(self.model)}, {steps} steps"
        start = self.model.process.schedule.start
        times = main_process_first(
            lambda: _times(kept(path).get(key), steps, start)
        )  # the same answer on all processes
        if times is None:
            try:
                batch, _ = self.batch(split="train")
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"the best grid is found on the training data: {error}; or use the uniform"
                    " grid with --grid uniform"
                ) from None
            times = best_grid(self.model, batch, steps, track=track).times.tolist()
            if world()[0] == 0:
                with contextlib.suppress(OSError):  # a read-only folder
                    keep(path, key, times)
        return TimeGrid(times)


def _times(found: object, steps: int, start: float) -> list[float] | None:
    """Return the times stored in a file; None if they are no grid of `steps` from `start` on."""
    try:
        times = TimeGrid(cast(Any, found)).times
    except (TypeError, ValueError, OverflowError):
        return None
    return times.tolist() if len(times) == steps and times[0] >= start else None


def load(path: str | Path) -> Run:
    """Load the run at `path` with its best weights, ready to be measured.

    Raises:
        FileNotFoundError: there is no such run, or it has no weights yet.
        ValueError: the weights are truncated or belong to another architecture, or the
            configuration has unknown keys.
    """
    path = Path(path)
    run = read_config(path)
    tensors, about = read_tensors(limits.contained(path / WEIGHTS, path))
    # initial weights are random, but replaced below
    with seeded(0), limits.within_file(tensors, path / WEIGHTS):
        model = build(run.model, run.schema)
    put_weights(model, tensors, str(path / WEIGHTS))
    model.eval()
    weights = shortened(f"{about.get('weights', 'raw')}, step {about.get('step', '?')}", 64)
    return Run(path, model, run, weights, read_metrics(path))
