"""Examples, labels and conditions for a run: of the data that it was trained on, or of others.

A run may come from an untrusted source, so the data that it names outside its folder are read only
if this user's own cache knows data with the same hashes (`place_of`).
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from nelbo._utils import cache, limits
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.numerics import seeded
from nelbo._utils.text import shortened
from nelbo.data import sources
from nelbo.data.coerce import name_of
from nelbo.data.schema import Dataset
from nelbo.data.sources import BUILT_IN, Source, Splits, load_like
from nelbo.data.splits import NONE
from nelbo.diffusion.batch import Batch
from nelbo.models.conditioning import encode, labelled
from nelbo.models.config import SYMBOL_PROCESSES
from nelbo.runs import held
from nelbo.runs.config import ARRAYS, RunConfig, check_no_run, hashes

KIND = "data"  # folder of the cache


def read(
    config: RunConfig,
    source: Source | Batch | None,
    splits: Splits | None,
    tell: Callable[[str], object],
) -> Dataset | Batch:
    """Return data of a run's schema, by default its own; a batch as it is; see `Run.batch`."""
    if isinstance(source, Batch):
        return source
    if source is None:
        return load(config)
    check_no_run(source)
    dataset = fitting(config, load_like(source, config.schema, size=config.size, splits=splits))
    for note in dataset.notes:
        tell(note)
    return dataset


def select(
    config: RunConfig, dataset: Dataset | Batch, source: Source | None, split: str | None
) -> tuple[Batch, str]:
    """Return examples of what `read` returned, with their conditions, and a name for them."""
    if isinstance(dataset, Batch):
        return dataset, "a batch"
    split = split or ("test" if source is None else "all")
    x, labels = dataset.split(split), dataset.labels.get(split)
    name = split if source is None else f"{split} of {name_of(source)}"
    return labelled(x, labels, config.schema), name


def meet(config: RunConfig, source: Source) -> bool:
    """Tell a run where its data are; see `Run.meet`."""
    if not isinstance(source, str | PathLike):
        return False
    if main_process_first(partial(place_of, config)) is not None:
        return False
    place = recognises(config, str(source))
    if place is None:
        return False
    with contextlib.suppress(OSError):  # then the record lasts until the process ends
        remember(config, place)
    return True


def load(config: RunConfig) -> Dataset:
    """Return the run's own data, read at `place_of`.

    Raises:
        FileNotFoundError: the data are no longer there.
        ValueError: their place is unknown, or the data there are not those of the run. The
            message reveals nothing about the data that were found instead.
    """
    place = main_process_first(partial(place_of, config))
    if place is None:
        name = shortened(config.source, 64)
        raise ValueError(
            f"the data {name!r} of the run are not read, because you did not train on them"
            " here; give them once with: nelbo evaluate RUN --data DATA (in Python"
            f" run.meet(DATA)), or set {limits.TRUST}=1 if the run is yours"
        )
    try:
        dataset = _read(config, place)
    except ValueError:
        raise ValueError(
            f"the data at {place} cannot be read like the data of the run; see: nelbo"
            f" inspect {place}; or evaluate others with --data"
        ) from None
    if not _are(config, dataset):
        raise ValueError(
            f"the data at {place} have changed since the run was trained: restore them, or"
            " evaluate others with --data"
        )
    return fitting(config, dataset)


def fitting(config: RunConfig, dataset: Dataset) -> Dataset:
    """Return those of the data that the model can have: processes of values, whole texts."""
    return dataset if config.model.process in SYMBOL_PROCESSES else dataset.whole()


def place_of(config: RunConfig) -> str | None:
    """Return where the run's own data are; None if only the run itself says so.

    Built-in data and data in the run folder are always known. Other data are known if this
    user trained on data with these hashes, or named them (`remember`).
    """
    if config.source in BUILT_IN or config.within:
        return config.source
    identity = _identity(config)
    if cache.get(KIND, f"{identity} {config.source}") is True:
        return config.source
    newest = cache.get(KIND, identity)
    if isinstance(newest, str):
        return newest
    return config.source if limits.trusted() else None


def remember(config: RunConfig, place: str) -> None:
    """Record in this user's cache that data with the run's hashes are at `place`.

    Raises:
        OSError: the cache cannot be written; the record lasts until the process ends.
    """
    identity = _identity(config)
    try:
        cache.put(KIND, f"{identity} {place}", True)
    finally:
        cache.put(KIND, identity, place)


def remember_place(config: RunConfig, progress: bool) -> None:
    """Record where data are that lie outside of the run's folder; say where this fails."""
    if config.source in BUILT_IN or world()[0] != 0:
        return
    try:
        remember(config, config.source)
    except OSError as error:
        if progress:
            note = f"the place of the data is not remembered: {cache.reason(error)}"
            print(note, file=sys.stderr)


def recognises(config: RunConfig, source: str) -> str | None:
    """Return the full name of `source` if its data have the hashes of the run's, else None."""
    try:
        dataset = _read(config, source)
    except (ValueError, OSError):
        return None
    return dataset.source if _are(config, dataset) else None


def _identity(config: RunConfig) -> str:
    about = [config.size, config.hashes, config.schema.to_dict()]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read(config: RunConfig, source: str) -> Dataset:
    if config.within and Path(source).name == ARRAYS:
        return held.read(Path(source), config.schema)
    return sources.load(
        source,
        levels=config.schema.levels,
        size=config.size,
        schema=config.schema if config.schema.kind == "table" else None,
        condition=[label.name for label in config.schema.condition],
        splits=NONE if config.splits is not None and not config.splits else config.splits,
        tokenizer=config.schema.tokenizer,
    )


def _are(config: RunConfig, dataset: Dataset) -> bool:
    return dataset.schema == config.schema and hashes(dataset) == config.hashes


def conditions(
    config: RunConfig, count: int, labels: Tensor | None = None, seed: int = 0
) -> Tensor | None:
    """Return conditions for `count` examples; see `Run.conditions`."""
    schema = config.schema
    if not schema.condition:
        return None
    if labels is None:
        try:
            known = load(config).labels["train"]
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
