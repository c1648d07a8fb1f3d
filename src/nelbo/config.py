"""What a run is made of, in plain values: names, sizes and presets. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args, get_origin, get_type_hints

from nelbo._scalars import LARGEST, plain

if TYPE_CHECKING:
    from nelbo.data import Schema

Process = Literal["gaussian", "absorbing", "product"]
Schedule = Literal[
    "linear", "cosine", "betas", "learned", "learned-ends", "linear-alpha", "quadratic-alpha"
]
Head = Literal["levels", "level-curves", "noise", "data", "velocity", "symbols", "columns"]
Step = Literal["mixture", "posterior", "beta", "learned", "optimal", "columns"]
Decoder = Literal[
    "levels", "evidence", "discretised-gaussian", "bernoulli", "gaussian", "categorical", "columns"
]
Network = Literal["conv", "unet", "mlp", "transformer", "table"]
Objective = Literal["bound", "simple", "min-snr", "p2"]
Times = Literal["stratified", "importance", "iid"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["float32", "bf16"]
Nonfinite = Literal["stop", "skip"]
Preset = Literal["auto", "best"]


MANY_LEVELS = 64  # more are a scale, of which a few curves tell as much in less time
MANY_EXAMPLES = 10_000  # more are not learned by heart in so few steps: no augmentation or dropout
FINE = 4096  # more are told one by one by no head: the decoder is a Gaussian over them
SMALL = 16  # pixels of the shorter side of a small image
LEVEL_HEADS = ("levels", "level-curves")  # of which the decoder levels and the step mixture go


class Section:
    """A part of a configuration whose values are checked against their types.

    Integers and floats of NumPy, which grid searches give, are taken as those of Python.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = plain(getattr(self, name))
            if get_origin(kind) is Literal:
                if not isinstance(value, str) or value not in get_args(kind):
                    names = ", ".join(get_args(kind))
                    raise ValueError(f"{name} must be one of {names}; got {value!r}")
            elif get_origin(kind) is tuple:
                if not isinstance(value, tuple) or not all(type(v) in (int, float) for v in value):
                    raise ValueError(f"{name} must be numbers; got {value!r}")
            elif isinstance(value, bool) != (kind is bool) or not isinstance(value, int | kind):
                raise ValueError(f"{name} must be {kind.__name__}; got {value!r}")
            elif not abs(value) <= LARGEST:
                raise ValueError(f"{name} must be finite; got {value}")
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, object]:
        return asdict(cast(Any, self))

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str) -> Self:
        """The section that `to_dict` gave; a key that older versions do not write is its default.

        Raises:
            ValueError: an unknown or missing key, or an impossible value; it names `where`.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a JSON object; got {values!r}")
        known = {f.name: f.default is not MISSING for f in fields(cast(Any, cls))}
        for name in sorted(values.keys() ^ known.keys()):
            if name in values or not known[name]:
                kind = "unknown" if name in values else "missing"
                raise ValueError(f"{kind} key {name!r} in {where}; known are {', '.join(known)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except ValueError as error:
            raise ValueError(f"{error} in {where}") from None


@dataclass(frozen=True)
class ModelConfig(Section):
    """A model by names and sizes; `nelbo.build.build` makes it."""

    process: Process = "gaussian"
    schedule: Schedule = "linear"
    gamma_min: float = -7.0
    gamma_max: float = 6.0
    head: Head = "levels"
    step: Step = "mixture"
    decoder: Decoder = "levels"
    network: Network = "conv"
    width: int = 32
    depth: int = 3
    dropout: float = 0.1
    members: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "width", "depth", "members")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")


@dataclass(frozen=True)
class TrainConfig(Section):
    """How a model is trained; `grid`, where there is one, holds the times whose bound is."""

    steps: int = 1800
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 5.0
    ema: float = 0.999
    optimizer: Optimizer = "adamw"
    objective: Objective = "bound"
    times: Times = "importance"
    cross_entropy: float = 0.1
    augment: float = 0.7
    label_dropout: float = 0.1
    evaluate_every: int = 100
    seed: int = 0
    grid: tuple[float, ...] = ()
    accumulate: int = 1
    precision: Precision = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    shard: bool = False
    deterministic: bool = False
    nonfinite: Nonfinite = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "steps", "batch", "evaluate_every", "accumulate")
        _at_least(self, 0, "warmup", "weight_decay", "cross_entropy", "seed")
        if self.shard and self.compile:
            raise ValueError("shard does not go with compile; leave one of them out")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("ema", "augment", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        ends = (0.0, *self.grid)
        if self.grid and not (ends[-1] == 1 and all(a < b for a, b in pairwise(ends))):
            raise ValueError(f"grid must increase within (0, 1] and end at 1.0; got {self.grid}")


def _for_table(examples: int) -> tuple[ModelConfig, TrainConfig]:
    model = ModelConfig(
        process="product",
        gamma_min=-9.0,
        head="columns",
        step="columns",
        decoder="columns",
        network="table",
        width=128,
        depth=2,
        dropout=0.1 if examples < MANY_EXAMPLES else 0.0,
    )
    return model, TrainConfig(steps=3000, batch=256, augment=0.0)


def _at_least(section: Section, least: int, *names: str) -> None:
    for name in names:
        if not getattr(section, name) >= least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(section, name)}")


def configure(
    schema: "Schema", examples: int, preset: str = "auto", **options: str | int | float
) -> tuple[ModelConfig, TrainConfig]:
    """The preset that fits the data, with options in place of its values.

    What follows from an option follows it: another head brings its step and decoder.

    Args:
        schema: what one example is.
        examples: how many there are to train on; few of them are augmented, or get dropout.
        preset: a name.
        options: fields of either section.

    Raises:
        ValueError: an unknown preset or option, or an impossible value.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}; got {preset!r}")
    model, train, levels = ModelConfig(), TrainConfig(), schema.levels or 0
    if levels > MANY_LEVELS:
        # until its noise is a level: neighbours tell what is alike in all of an image
        model = replace(model, head="level-curves", gamma_min=-10.0)
    fine = levels > FINE
    if fine:  # noise of half a level at the data's end
        model = replace(model, head="velocity", gamma_min=-2 * math.log(levels - 1))
    text = schema.alphabet is not None
    if schema.kind == "table":
        model, train = _for_table(examples)
    elif schema.levels is None:
        model = replace(
            model, head="velocity", step="posterior", decoder="gaussian", gamma_min=-10.0
        )
        train = replace(train, cross_entropy=0.0)
    elif options.get("process", "absorbing" if text else "gaussian") == "absorbing":
        model = replace(
            model,
            process="absorbing",
            schedule="quadratic-alpha",
            head="symbols",
            step="posterior",
            decoder="categorical",
        )
    elif options.get("head", model.head) not in LEVEL_HEADS:
        decoder: Decoder = "discretised-gaussian" if fine else "evidence"
        model = replace(model, step="posterior", decoder=decoder)
        train = replace(train, cross_entropy=0.0)
    image = len(schema.shape) == 3 and min(schema.shape[1:]) >= 4
    if not image or examples > MANY_EXAMPLES:
        train = replace(train, augment=0.0)
    large = image and min(schema.shape[1:]) > SMALL
    of_image = "unet" if large else "conv"
    network = options.get("network", of_image if image else "transformer" if text else "mlp")
    if network == "transformer" or large:
        # an example is dear: many small steps, few validations
        train = replace(train, steps=10_000, batch=16, lr=3e-3, evaluate_every=1000)
        train = replace(train, optimizer="muon")
    if network == "unet":
        dropout = model.dropout if examples <= MANY_EXAMPLES else 0.0
        model = replace(model, network="unet", depth=1, dropout=dropout)
    if network == "transformer":
        model = replace(model, network="transformer", width=128, depth=4, dropout=0.0)
        train = replace(train, lr=2e-3, augment=0.0)
    if network == "mlp" and schema.kind != "table":
        model = replace(model, network="mlp", width=128)
        train = replace(train, steps=3000, batch=128, lr=1e-3, augment=0.0, evaluate_every=100)
    if preset == "best":
        model = replace(model, width=3 * model.width // 2, dropout=0.2, members=3)
        train = replace(train, steps=4 * train.steps // 3, batch=3 * train.batch)
        if train.augment:
            train = replace(train, augment=0.75)

    known = {f.name: kind for kind in (ModelConfig, TrainConfig) for f in fields(kind)}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; known are {', '.join(known)}")
    of_model, of_train = (
        cast(dict[str, Any], {k: v for k, v in options.items() if known[k] is kind})
        for kind in (ModelConfig, TrainConfig)
    )
    return replace(model, **of_model), replace(train, **of_train)
