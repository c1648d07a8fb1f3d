"""The files of a run: weights as safetensors, everything else as JSON. No file is executed.

    config.json          data, schema, model and training configuration
    model.safetensors    the best weights so far (moving average), with their step
    state.safetensors    everything needed to continue training exactly; see `training_state`
    before.safetensors   the previous state, in case the newest is damaged; until training ends
    metrics.jsonl        one line per event
    data.parquet         the training table, if it was given as a frame and not as a path
    data.npz             other data that were not given as a path; see `held`
    grids.json           the best time grids found for these weights; found again if lost
    .lock                empty; held by the process that trains

Each file is either complete or absent, except for the last line of metrics.jsonl.
"""

import json
import os
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from nelbo._utils import limits
from nelbo._utils.validation import Record, validated
from nelbo._version import __version__
from nelbo.data.schema import Dataset, Schema, fingerprint
from nelbo.data.splits import Declared, declare
from nelbo.models.config import ModelConfig
from nelbo.training.config import TrainConfig

CONFIG, WEIGHTS, STATE, BEFORE, METRICS, GRIDS, TABLE, ARRAYS, LOCK = (
    "config.json",
    "model.safetensors",
    "state.safetensors",
    "before.safetensors",
    "metrics.jsonl",
    "grids.json",
    "data.parquet",
    "data.npz",
    ".lock",
)
#: files that a training writes, apart from the events for tensorboard
WRITTEN = (CONFIG, WEIGHTS, STATE, BEFORE, METRICS, GRIDS, TABLE, ARRAYS, LOCK)
FORMAT = 2  # of a run; raised whenever the meaning of its contents changes
LARGEST = 10**100  # number in an event: larger ones cannot be averaged or plotted
EVENT_KEYS = {"step", "seconds", "lr", "train", "validation", "unit"}


@dataclass(frozen=True)
class _Data(Record):
    """The data of a run, as in `config.json`."""

    source: str
    size: int | None
    schema: Schema
    hashes: dict[str, str]
    splits: dict[str, list[str]] | None = None
    frames: str = "polars"


@dataclass(frozen=True)
class _Document(Record):
    """The contents of `config.json`."""

    nelbo: str
    format: int
    data: _Data
    preset: str
    model: ModelConfig
    train: TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Contents of `config.json`: source, schema and hashes of the data, and the options."""

    source: str
    schema: Schema
    size: int | None
    hashes: dict[str, str]
    preset: str
    model: ModelConfig
    train: TrainConfig
    splits: Declared | None = None
    #: the library of the frame of a table, "polars" or "pandas", for tables that are returned
    frames: str = field(default="polars", compare=False)
    #: whether the data are stored in the run folder
    within: bool = field(default=False, compare=False)

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        document = {
            "nelbo": __version__,
            "format": FORMAT,
            "data": {
                "source": self.source,
                "size": self.size,
                "schema": self.schema.to_dict(),
                "hashes": self.hashes,
                "splits": None if self.splits is None else dict(self.splits),
                "frames": self.frames,
            },
            "preset": self.preset,
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
        }
        return json.dumps(document, indent=2) + "\n"

    @staticmethod
    def from_document(document: object, where: str) -> "RunConfig":
        """Return the configuration in a parsed `config.json`; `where` names the file in errors.

        Raises:
            ValueError: a key is missing or unknown, or a value has the wrong type.
        """
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise ValueError(
                f"{where} has format {document.get('format', 1)!r} and this nelbo reads {FORMAT}:"
                " train the run again with it, or use the nelbo that wrote it"
            )
        found = validated(_Document, document, where)
        about = found.data
        return RunConfig(
            source=about.source,
            schema=about.schema,
            size=about.size,
            hashes=about.hashes,
            splits=about.splits and declare(about.splits),
            frames=about.frames,
            preset=found.preset,
            model=found.model,
            train=found.train,
        )


def hashes(dataset: Dataset) -> dict[str, str]:
    """Return the fingerprint of each split, and of its labels if the model is conditional."""
    labels = {f"labels of {name}": fingerprint(y) for name, y in dataset.labels.items()}
    return {name: fingerprint(x) for name, x in dataset.splits.items()} | labels


def is_run(path: Path) -> bool:
    """Return whether a folder contains a run."""
    return os.path.isfile(path / CONFIG)  # false also of a text that is no path


def check_no_run(source: object) -> None:
    """Raise ValueError if data are asked for and a run folder is given."""
    if isinstance(source, str | PathLike) and is_run(Path(source)):
        raise ValueError(f"{source} is a run and not data; evaluate and report take it")


def _of_others(path: Path) -> str:
    """Return the advice to name a folder of another library as such, "" for other folders."""
    from nelbo.integrations import source_of  # heavy

    source = source_of(path)
    return f"; if it is a model of another library, give it as {source}" if source else ""


def read_config(path: Path) -> RunConfig:
    """Read the configuration of the run in the folder `path`.

    Raises:
        FileNotFoundError: the folder does not exist or is not a run.
        ValueError: the file is damaged, too large, or a link out of the run.
    """
    if not path.exists():
        raise FileNotFoundError(f"the run {path} does not exist; give one that train made")
    if not is_run(path):
        raise FileNotFoundError(f"{path} is not a run: it has no {CONFIG}{_of_others(path)}")
    document = limits.read_json(limits.contained(path / CONFIG, path))
    if isinstance(document, dict) and "schema" not in document and (hint := _of_others(path)):
        raise ValueError(f"{path} is not a run{hint}")
    run = RunConfig.from_document(document, str(path / CONFIG))
    copy = Path(run.source).name
    if copy in (TABLE, ARRAYS) and (path / copy).is_file():
        limits.contained(path / copy, path)
        # the run folder may have been moved since
        run = replace(run, source=str(path.absolute() / copy), within=True)
    return run


def read_metrics(path: Path) -> list[dict]:
    """Return the events of a run, skipping invalid lines such as a last one cut off by a crash."""
    if not (path / METRICS).exists():
        return []
    file = limits.contained(path / METRICS, path)
    limits.check_json(file, limits.EVENTS)
    with file.open(encoding="utf-8", errors="replace") as lines:
        short = (line for line in lines if len(line) <= limits.EVENT)
        return [event for line in short if (event := _event(line)) is not None]


def _event(line: str) -> dict | None:
    """Parse one line of the metrics; return None if it is not a valid event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not event.keys() >= EVENT_KEYS:
        return None
    numbers = [event[key] for key in EVENT_KEYS - {"unit"}]
    error = event.get("validation_standard_error")
    numbers += [] if error is None else [error]
    # training may write NaN, which figures leave out
    whole = all(type(n) in (int, float) and not abs(n) > LARGEST for n in numbers)
    return event if whole and type(event["step"]) is int else None
