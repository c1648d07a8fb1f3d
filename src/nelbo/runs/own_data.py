"""Examples, labels and conditions for a run: of the data that it was trained on, or of others."""

import contextlib
from collections.abc import Callable
from os import PathLike

import torch
from torch import Tensor

from nelbo._utils.distributed import main_process_first
from nelbo._utils.numerics import seeded
from nelbo.data.schema import Dataset
from nelbo.data.sources import Source, Splits, load_like, name_of
from nelbo.diffusion.batch import Batch
from nelbo.models.conditioning import encode, labelled
from nelbo.runs.config import RunConfig


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
        return config.load_data()
    dataset = config.fitting(load_like(source, config.schema, size=config.size, splits=splits))
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
    if not isinstance(source, str | PathLike) or main_process_first(config.place) is not None:
        return False
    place = config.recognises(str(source))
    if place is None:
        return False
    with contextlib.suppress(OSError):  # then the record lasts until the process ends
        config.remember(place)
    return True


def conditions(
    config: RunConfig, count: int, labels: Tensor | None = None, seed: int = 0
) -> Tensor | None:
    """Return conditions for `count` examples; see `Run.conditions`."""
    schema = config.schema
    if not schema.condition:
        return None
    if labels is None:
        try:
            known = config.load_data().labels["train"]
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
