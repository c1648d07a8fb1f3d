"""A trained run, as people hold it: its model, its data and its numbers (files: `config`)."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nelbo import data
from nelbo._utils import limits
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.files import keep, kept, put_weights, read_tensors
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track, shortened
from nelbo.data.sources import Splits
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


@dataclass(frozen=True)
class Run:
    """A trained run, as `nelbo.load` gives it."""

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
        """Examples of the run's own data or of other data, and a name for them; see `batch`."""
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

        They have their labels as conditions where the run is conditional.

        Args:
            source: other data of the run's schema; the run's own where left out.
            split: "train", "validation", "test"; of other data also "all". The default is "test"
                of the run's own data and "all" of other data.
            splits: of other data, as `nelbo.data.load` takes them.
            tell: called with what is to be known of other data, such as cells that training did
                not have; a warning by default.

        Raises:
            ValueError: data of another schema, or no such split; or the run's own, not known here.
        """
        if source is None:
            dataset = self.config.load_data()
        else:
            dataset = data.load_like(
                source, self.config.schema, size=self.config.size, splits=splits
            )
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
        tell: Callable[[str], object] = _warn,
        **options: Any,  # noqa: ANN401 - those of `measure`
    ) -> Evaluation:
        """Return the bound on -log P(x) of the run's own data or of other data.

        It is the number of `nelbo evaluate RUN`.

        Args:
            source: as for `batch`; the run's own data where left out.
            split: as for `batch`.
            splits: as for `batch`.
            steps: T, for the bound of T steps on the run's best grid; continuous time if left out.
            tell: as for `batch`, and called with what takes a while.
            options: calls, target_error, per_example, variates, seed and track of
                `nelbo.evaluate`.

        Raises:
            ValueError: as `batch`, `grid` and `nelbo.evaluate` do.
        """
        batch, name = self.batch(source, split, splits, tell)
        times = None if steps is None else self.grid(steps)
        own = source is None
        return self.measure(batch, split=name, own=own, times=times, tell=tell, **options)

    def measure(
        self,
        batch: Batch,
        *,
        split: str = "as given",
        own: bool = False,
        times: TimeDiscretization | None = None,
        variates: bool = True,
        tell: Callable[[str], object] = _warn,
        **options: Any,  # noqa: ANN401 - those of `nelbo.evaluate`
    ) -> Evaluation:
        """Return the bound of examples that were read from `batch`.

        Args:
            batch: the examples.
            split: their name, for the record.
            own: whether they are of the run's own data. Then the control variates are fitted to
                its training split, and a pilot on its validation split is kept for this user.
            times: of the bound; continuous time where left out.
            variates: see `nelbo.evaluate`.
            tell: called with what takes a while.
            options: see `nelbo.evaluate`.
        """
        from nelbo.runs.pilot_cache import Pilots

        if own and variates:
            options["known"] = self.examples(split="train")[0]
            options["pilots"] = Pilots(self, tell)
        options = {"weights": self.weights, "split": split, "times": times, **options}
        return evaluate(self.model, batch, variates=variates, **options)

    def meet(self, source: "str | PathLike[str] | Frame") -> bool:
        """Whether the run's own data were unknown, and these are they: then they are known.

        A run that this user did not train reads nothing that it names, until it is given here.
        """
        if (
            not isinstance(source, str | PathLike)
            or main_process_first(self.config.place) is not None
        ):
            return False
        place = self.config.recognises(str(source))
        if place is None:
            return False
        with contextlib.suppress(OSError):  # it lasts as long as the process
            self.config.remember(place)
        return True

    def conditions(self, count: int, labels: Tensor | None = None, seed: int = 0) -> Tensor | None:
        """Return the conditions of `count` new examples, (count, F); None if not conditional.

        Args:
            count: of examples.
            labels: of each, (count, len(schema.condition)); drawn with replacement from the
                complete ones of the training data by the seed where left out.
            seed: of the draw.

        Raises:
            ValueError: labels are drawn and the training data are not there.
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
        """The best grid of `steps` times for this model, the same whoever asks.

        It is the one the run was trained on, where it has as many times; else it is found on the
        training data, once: the folder of the run keeps it for these weights.

        Raises:
            ValueError: no such number of steps, or the training data are not there.
        """
        even_times(self.model.process.schedule, steps, steps)  # refuses what cannot be
        if len(self.config.train.grid) == steps:
            return TimeGrid(self.config.train.grid)
        path, key = self.path / GRIDS, f"{model_hash(self.model)}, {steps} steps"
        start = self.model.process.schedule.start
        times = main_process_first(
            lambda: _times(kept(path).get(key), steps, start)
        )  # all, or none
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
                with contextlib.suppress(OSError):  # a folder that is read only
                    keep(path, key, times)
        return TimeGrid(times)


def _times(found: object, steps: int, start: float) -> list[float] | None:
    """The times that a file says; None where that is no grid of so many from `start` on."""
    try:
        times = TimeGrid(cast(Any, found)).times
    except (TypeError, ValueError, OverflowError):
        return None
    return times.tolist() if len(times) == steps and times[0] >= start else None


def load(path: str | Path) -> Run:
    """The run at `path` with its best weights, ready to measure.

    Raises:
        FileNotFoundError: no such run, or no weights in it.
        ValueError: weights that are truncated or of another architecture, unknown config keys.
    """
    path = Path(path)
    run = read_config(path)
    tensors, about = read_tensors(limits.contained(path / WEIGHTS, path))
    # the first weights are drawn to be replaced
    with seeded(0), limits.within_file(tensors, path / WEIGHTS):
        model = build(run.model, run.schema)
    put_weights(model, tensors, str(path / WEIGHTS))
    model.eval()
    weights = shortened(f"{about.get('weights', 'raw')}, step {about.get('step', '?')}", 64)
    return Run(path, model, run, weights, read_metrics(path))
