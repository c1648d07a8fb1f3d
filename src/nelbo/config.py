"""What a run is made of, in plain values: names, sizes and presets. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from nelbo.data import Schema

Section = TypeVar("Section", bound="ModelConfig | TrainConfig")


@dataclass(frozen=True)
class ModelConfig:
    """A model by names; `nelbo.build.build` makes it. The names are keys of the tables there."""

    process: str = "gaussian"
    schedule: str = "linear"
    gamma_min: float = -7.0
    gamma_max: float = 6.0
    head: str = "levels"
    step: str = "mixture"
    decoder: str = "levels"
    network: str = "conv"
    width: int = 32
    depth: int = 2
    dropout: float = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    batch: int = 256
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 5.0
    ema: float = 0.999
    objective: str = "bound"
    cross_entropy: float = 0.1
    evaluate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")


def presets(schema: "Schema") -> dict[str, tuple[ModelConfig, TrainConfig]]:
    """The presets that fit data of a schema, by name; "auto" is the default."""
    model, train = ModelConfig(), TrainConfig()
    if schema.levels is None:
        model = replace(
            model, head="velocity", step="posterior", decoder="gaussian", gamma_min=-10.0
        )
        train = replace(train, cross_entropy=0.0)
    if len(schema.shape) != 3 or min(schema.shape[1:]) < 4:
        model = replace(model, network="mlp", width=128, depth=3)
        train = replace(train, steps=3000)
    best = (
        replace(model, width=2 * model.width, dropout=0.2),
        replace(train, steps=4 * train.steps, ema=0.9995),
    )
    return {"auto": (model, train), "best": best}


def to_dict(section: ModelConfig | TrainConfig) -> dict[str, object]:
    """Plain values."""
    return asdict(section)


def from_dict(kind: type[Section], values: Mapping[str, object], where: str) -> Section:
    """A section from plain values.

    Raises:
        ValueError: an unknown or missing key; it names the key and `where`.
    """
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in {where}; known are {', '.join(sorted(known))}"
            )
    if missing := known - set(values):
        raise ValueError(f"missing key {min(missing)!r} in {where}")
    return kind(**values)
