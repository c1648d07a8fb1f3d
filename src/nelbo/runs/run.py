"""A run on disk: weights as safetensors, everything else as JSON. Nothing here executes a file.

    config.json          data, schema, model and training configuration
    model.safetensors    the best weights so far (moving average), with step and bound
    state.safetensors    everything to continue training exactly, the best weights too; see `state`
    before.safetensors   the state before that, in case the newest is damaged
    metrics.jsonl        one line per event
    data.parquet         the training table, where it was given as a frame and not by its path
    grids.json           the best grids that were found for these weights; found again where lost
    .lock                empty; held by the process that trains

Each is whole or not there, but for a last line of metrics.jsonl; tensors are what was written
(`_files`). A run may come from anyone: what it names outside of its folder, its data, is read only
where this user's own cache knows data of these hashes (`RunConfig.place`).
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nelbo import data
from nelbo._utils import cache, limits
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.files import keep, kept, put_weights, read_tensors
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track, shortened
from nelbo._version import __version__
from nelbo.data import Dataset, Schema
from nelbo.data.sources import BUILT_IN, Splits
from nelbo.data.splits import NONE, Declared, declare
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, model_hash
from nelbo.diffusion.times import TimeDiscretization, TimeGrid, even_times
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.grid_search import best_grid
from nelbo.evaluation.result import Evaluation
from nelbo.models.build import build
from nelbo.models.conditioning import encode, labelled
from nelbo.models.config import ModelConfig
from nelbo.training.config import TrainConfig

if TYPE_CHECKING:
    from nelbo.data.tabular.tables import Frame

CONFIG, WEIGHTS, STATE, BEFORE, METRICS, GRIDS, TABLE, LOCK = (
    "config.json",
    "model.safetensors",
    "state.safetensors",
    "before.safetensors",
    "metrics.jsonl",
    "grids.json",
    "data.parquet",
    ".lock",
)
#: what a training writes, beside its events
WRITTEN = (CONFIG, WEIGHTS, STATE, BEFORE, METRICS, GRIDS, TABLE, LOCK)
KIND = "data"  # folder of the cache
LARGEST = 10**100  # number of an event: larger ones have no mean and no axis
EVENT_KEYS = {"step", "seconds", "lr", "train", "validation", "unit"}


@dataclass(frozen=True)
class RunConfig:
    """What `config.json` says."""

    source: str
    schema: Schema
    size: int | None
    hashes: dict[str, str]
    preset: str
    model: ModelConfig
    train: TrainConfig
    splits: Declared | None = None
    #: whether the data are in the folder of the run
    within: bool = field(default=False, compare=False)

    def to_json(self) -> str:
        document = {
            "nelbo": __version__,
            "data": {
                "source": self.source,
                "size": self.size,
                "schema": self.schema.to_dict(),
                "hashes": self.hashes,
                "splits": None if self.splits is None else dict(self.splits),
            },
            "preset": self.preset,
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
        }
        return json.dumps(document, indent=2) + "\n"

    def load_data(self) -> Dataset:
        """The run's own data, read at `place`.

        Raises:
            FileNotFoundError: they are no longer there.
            ValueError: no place is known, or they are no longer those of the run; of what is there
                instead nothing is told.
        """
        place = main_process_first(self.place)
        if place is None:
            name = shortened(self.source, 64)
            raise ValueError(
                f"the data of the run, which it calls {name!r}, are not read: this user has not"
                " trained on them here. Give them once, with: nelbo evaluate RUN --data DATA, in"
                f" Python run.meet(DATA); or set {limits.TRUST}=1 if the run is yours"
            )
        try:
            dataset = self._read(place)
        except ValueError:
            raise ValueError(
                f"the data at {place} cannot be read as those of the run; see: nelbo inspect"
                f" {place}; or evaluate others with --data"
            ) from None
        if not self._are(dataset):
            raise ValueError(
                f"the data at {place} are no longer those of the run: bring them back,"
                " or evaluate others with --data"
            )
        return dataset

    def place(self) -> str | None:
        """Where the run's own data are; None where only the run says where.

        Built-in data and those in the folder of the run are always known; others where this user
        trained on data of these hashes, or named them (`remember`).
        """
        if self.source in BUILT_IN or self.within:
            return self.source
        identity = self._identity()
        if cache.get(KIND, f"{identity} {self.source}") is True:
            return self.source
        newest = cache.get(KIND, identity)
        if isinstance(newest, str):
            return newest
        return self.source if limits.trusted() else None

    def remember(self, place: str) -> None:
        """Keep for this user that data of the run's hashes are at a place.

        Raises:
            OSError: it cannot be written, and lasts as long as the process.
        """
        identity = self._identity()
        try:
            cache.put(KIND, f"{identity} {place}", True)
        finally:
            cache.put(KIND, identity, place)

    def recognises(self, source: str) -> str | None:
        """The full name of the source where its data are those of the run, by their hashes."""
        try:
            dataset = self._read(source)
        except (ValueError, OSError):
            return None
        return dataset.source if self._are(dataset) else None

    def _identity(self) -> str:
        about = [self.size, self.hashes, self.schema.to_dict()]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _read(self, source: str) -> Dataset:
        return data.load(
            source,
            levels=self.schema.levels,
            size=self.size,
            schema=self.schema if self.schema.kind == "table" else None,
            condition=[label.name for label in self.schema.condition],
            splits=NONE if self.splits is not None and not self.splits else self.splits,
        )

    def _are(self, dataset: Dataset) -> bool:
        return dataset.schema == self.schema and hashes(dataset) == self.hashes

    @staticmethod
    def from_document(document: object, where: str) -> "RunConfig":
        """Raises ValueError for anything that is missing, unknown or of another kind."""
        top = _section(document, {"nelbo", "data", "preset", "model", "train"}, where)
        given = {"splits": None} | top["data"] if isinstance(top["data"], dict) else top["data"]
        keys = {"source", "size", "schema", "hashes", "splits"}
        about = _section(given, keys, f"{where}, data")
        for name, kinds in (("source", str), ("size", int | None), ("hashes", dict)):
            if not isinstance(about[name], kinds):
                raise ValueError(f"{name} in {where}, data, cannot be {about[name]!r}")
        try:
            schema = Schema.from_dict(about["schema"])
            splits = _declared(about["splits"])
        except ValueError as error:
            raise ValueError(f"{error} in {where}") from None
        return RunConfig(
            source=about["source"],
            schema=schema,
            size=about["size"],
            hashes=about["hashes"],
            splits=splits,
            preset=str(top["preset"]),
            model=ModelConfig.from_dict(top["model"], f"{where}, model"),
            train=TrainConfig.from_dict(top["train"], f"{where}, train"),
        )


def _declared(splits: object) -> Declared | None:
    """What `to_json` wrote of declared splits."""
    if splits is None or splits == {}:
        return splits
    if not isinstance(splits, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in splits.values()
    ):
        raise ValueError(f"splits must be lists of names; got {splits!r}")
    return declare(splits)


def hashes(dataset: Dataset) -> dict[str, str]:
    """The fingerprint of each split, and of its labels where they count."""
    labels = {f"labels of {name}": data.fingerprint(y) for name, y in dataset.labels.items()}
    return {name: data.fingerprint(x) for name, x in dataset.splits.items()} | labels


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def _section(document: object, keys: set[str], where: str) -> dict:
    if not isinstance(document, dict):
        raise ValueError(f"{where} must be a JSON object; got {type(document).__name__}")
    for key in sorted(document.keys() ^ keys):
        kind = "unknown" if key in document else "missing"
        raise ValueError(f"{kind} key {key!r} in {where}; known are {', '.join(sorted(keys))}")
    return document


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


def is_run(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_config(path: Path) -> RunConfig:
    """Raises FileNotFoundError where the folder is not a run."""
    if not path.exists():
        raise FileNotFoundError(f"the run {path} does not exist; train with: nelbo train")
    if not is_run(path):
        raise FileNotFoundError(f"{path} is not a run: it has no {CONFIG}")
    document = limits.read_json(limits.contained(path / CONFIG, path))
    run = RunConfig.from_document(document, str(path / CONFIG))
    if Path(run.source).name == TABLE and (path / TABLE).is_file():
        limits.contained(path / TABLE, path)
        # also where the run was moved
        run = replace(run, source=str(path.absolute() / TABLE), within=True)
    return run


def read_metrics(path: Path) -> list[dict]:
    """The events of a run; a line that is none, such as a last one cut by a crash, is left out."""
    if not (path / METRICS).exists():
        return []
    file = limits.contained(path / METRICS, path)
    limits.check_json(file, limits.EVENTS)
    with file.open(encoding="utf-8", errors="replace") as lines:
        short = (line for line in lines if len(line) <= limits.EVENT)
        return [event for line in short if (event := _event(line)) is not None]


def _event(line: str) -> dict | None:
    """What a line of the metrics says; None where it is no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not event.keys() >= EVENT_KEYS:
        return None
    numbers = [event[key] for key in EVENT_KEYS - {"unit"}]
    error = event.get("validation_standard_error")
    numbers += [] if error is None else [error]
    # NaN is one that a training may write, and a figure leaves out
    whole = all(type(n) in (int, float) and not abs(n) > LARGEST for n in numbers)
    return event if whole and type(event["step"]) is int else None


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
