"""Which model: names and sizes, as a run keeps them."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args, get_origin, get_type_hints

from nelbo._utils.scalars import LARGEST, plain

if TYPE_CHECKING:
    pass


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


def _at_least(section: Section, least: int, *names: str) -> None:
    for name in names:
        if not getattr(section, name) >= least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(section, name)}")
