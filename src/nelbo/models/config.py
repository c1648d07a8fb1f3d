"""The configuration of a model: names and sizes, as a run stores them."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pkgutil import resolve_name
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Self,
    TypeAlias,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from nelbo._utils.scalars import LARGEST, plain

#: Names of parts, and the class or function of each; a line in a table registers a part. They are
#: imported when a model is built (`resolve`), so that `--help` loads no torch. The comment of a
#: table gives the arguments of the call; those of schedules are (gamma_min, gamma_max).
SCHEDULES = {
    "linear": "nelbo.diffusion.schedules:Linear",
    "cosine": "nelbo.diffusion.schedules:Cosine",
    "betas": "nelbo.diffusion.schedules:ddpm_betas",
    "learned": "nelbo.diffusion.schedules:LearnedMonotone",
    "learned-ends": "nelbo.diffusion.schedules:learned_endpoints",
    "linear-alpha": "nelbo.diffusion.schedules:linear_alpha",
    "quadratic-alpha": "nelbo.diffusion.schedules:quadratic_alpha",
}
#: processes of real numbers, and of integers as values: of (schedule, Affine or Levels)
VALUE_PROCESSES = {
    "gaussian": "nelbo.diffusion.process:GaussianDiffusion",
}
#: processes of symbols: of (schedule, number of symbols)
SYMBOL_PROCESSES = {
    "absorbing": "nelbo.diffusion.process:MaskedDiffusion",
}
#: parametrizations that predict one number for each dimension: of ()
POINT_HEADS = {
    "noise": "nelbo.diffusion.parametrization:EpsPrediction",
    "data": "nelbo.diffusion.parametrization:XPrediction",
    "velocity": "nelbo.diffusion.parametrization:VPrediction",
}
#: parametrizations that predict the probability of each level: of (values of the levels, shape)
LEVEL_HEADS = {
    "levels": "nelbo.diffusion.parametrization:LevelLogits",
    "level-curves": "nelbo.diffusion.parametrization:LevelCurves",
}
#: reverse kernels for any parametrization: of ()
STEPS = {
    "posterior": "nelbo.diffusion.reverse:Posterior",
    "beta": "nelbo.diffusion.reverse:Beta",
    "learned": "nelbo.diffusion.reverse:Learned",
    "optimal": "nelbo.diffusion.reverse:Optimal",
}
#: decoders into integers: `Decoder.of_levels` of the class
LEVEL_DECODERS = {
    "levels": "nelbo.diffusion.decoder:LevelDecoder",
    "evidence": "nelbo.diffusion.decoder:Evidence",
    "discretised-gaussian": "nelbo.diffusion.decoder:DiscretisedGaussian",
    "bernoulli": "nelbo.diffusion.decoder:Bernoulli",
}
#: networks: of (shape, channels, outputs, width, depth, dropout, conditions)
NETWORKS = {
    "conv": "nelbo.nn.conv:ConvNet",
    "unet": "nelbo.nn.unet:UNet",
    "mlp": "nelbo.nn.mlp:MLP",
    "transformer": "nelbo.nn.transformer:Transformer",
}

if TYPE_CHECKING:  # a type checker reads no table
    Process: TypeAlias = str
    Schedule: TypeAlias = str
    Head: TypeAlias = str
    Step: TypeAlias = str
    Decoder: TypeAlias = str
    Network: TypeAlias = str
else:
    Process = Literal[(*VALUE_PROCESSES, *SYMBOL_PROCESSES, "product")]
    Schedule = Literal[tuple(SCHEDULES)]
    Head = Literal[(*LEVEL_HEADS, *POINT_HEADS, "symbols", "columns")]
    Step = Literal[("mixture", *STEPS, "columns")]
    Decoder = Literal[(*LEVEL_DECODERS, "gaussian", "categorical", "columns")]
    Network = Literal[(*NETWORKS, "table")]


def resolve(name: str, table: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Return the class or function that a name of a table stands for."""
    return resolve_name(table[name])


class Section:
    """A section of a configuration whose values are checked against their types.

    Integers and floats of NumPy, which grid searches pass, become those of Python.
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
        """Return the values by name, ready for JSON."""
        return asdict(cast(Any, self))

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: str) -> Self:
        """Return the section of a result of `to_dict`; a missing key takes its default, if any.

        Raises:
            ValueError: if a key is unknown or missing, or a value is impossible; names `where`.
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
    """Names and sizes of a model, which `nelbo.models.build.build` makes."""

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


def _at_least(section: Section, least: int, *names: str) -> None:
    """Raise a ValueError unless each named value of the section is at least `least`."""
    for name in names:
        if not getattr(section, name) >= least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(section, name)}")
