"""A foreign model beside what `evaluate` wants to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nelbo import data
from nelbo._utils import limits
from nelbo.data import Schema
from nelbo.data.sources import Splits
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization


@dataclass(frozen=True)
class Foreign:
    """What `nelbo.integrations.load` gives.

    Args:
        name: the source.
        model: whose bound it is.
        schema: what one example is.
        times: the times of the model's own sampler, or continuous time.
        weights: which weights these are, for the record.
        notes: one sentence for each thing that decides what the number means.
    """

    name: str
    model: Model
    schema: Schema
    times: TimeDiscretization
    weights: str
    notes: tuple[str, ...]

    def examples(
        self,
        source: str | None,
        split: str | None = None,
        splits: Splits | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> tuple[Tensor, str]:
        """Examples to measure the model on, and a name for them.

        Args:
            source: as for `nelbo evaluate --data`.
            split: "train", "validation", "test" or "all", the default.
            splits: which names are of which split, as `nelbo.data.load` takes them.
            tell: is given each note on the data.

        Raises:
            ValueError: no source, data of another schema, or no such split.
        """
        if source is None:
            raise ValueError(f"{self.name} brings no data; give some with --data")
        dataset = data.load_like(source, self.schema, splits=splits)
        if tell is not None:
            for note in dataset.notes:
                tell(f"note: {note}")
        split = split or "all"
        if split not in dataset.splits:
            raise ValueError(f"split must be one of {', '.join(dataset.splits)}; got {split!r}")
        return dataset.splits[split], f"{split} of {source}"


def read_json(
    path: Path, hint: str = "a model has one beside its weights", infinite: bool = False
) -> dict[str, object]:
    """The object in a file; ValueError for anything else, and where there is none the hint.

    `infinite` as for `_limits.read_json`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {hint}")
    found = limits.read_json(path, infinite)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object; got {type(found).__name__}")
    return found


def check_label(label: int | None, classes: int | None) -> None:
    """Raise ValueError unless a label goes with a model of so many classes, or of none."""
    if classes is None and label is not None:
        raise ValueError(f"label={label} was given to a model without classes; leave it out")
    if classes is not None and (label is None or not 0 <= label < classes):
        raise ValueError(
            f"the model is of P(x|class) with {classes} classes; give label=N in 0..{classes - 1}"
            f" (after the path: ,label=N); got {label}"
        )
