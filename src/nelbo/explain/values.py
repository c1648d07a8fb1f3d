"""Values of a page: the choices that its reader has, and tables of numbers that depend on them.

The page looks numbers up and draws them; all are computed here, by the library.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from nelbo.diffusion.distributions import Discrete, Joint

DIGITS = 4  # significant ones of each number in a page
POINTS = 49  # of a curve that is not a normal density


@dataclass(frozen=True)
class Choice:
    """Something that the reader chooses.

    Args:
        name: of the tables' keys.
        label: what it is, HTML.
        options: what may be chosen, HTML.
        first: index of the option chosen at first.
        priced: whether the bound of each option is shown beside it.
    """

    name: str
    label: str
    options: Sequence[str]
    first: int = 0
    priced: bool = True


@dataclass
class Values:
    """Choices, and tables with one value per combination of the choices that they depend on."""

    choices: Sequence[Choice]
    constants: dict[str, object] = field(default_factory=dict)
    tables: dict[str, dict[str, object]] = field(default_factory=dict)

    def put(self, name: str, value: object, **chosen: int) -> None:
        """Add the value of a table for chosen options, by the name of their choice."""
        table = self.tables.setdefault(name, {"of": list(chosen), "at": {}})
        assert table["of"] == list(chosen)
        at = table["at"]
        assert isinstance(at, dict)
        at[",".join(map(str, chosen.values()))] = plain(value)

    def to_json(self) -> str:
        """Return all as JSON that may stand within HTML."""
        choices = [
            {"name": c.name, "options": list(c.options), "priced": c.priced} for c in self.choices
        ]
        first = {c.name: c.first for c in self.choices}
        everything = {
            "choices": choices,
            "first": first,
            "tables": self.tables,
            **{name: plain(value) for name, value in self.constants.items()},
        }
        text = json.dumps(everything, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


def plain(value: object) -> object:
    """Return tensors as lists, and numbers with few digits."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() else short
    return value


def curve(distribution: Distribution, dim: int, low: float, high: float) -> list[object]:
    """Return the distribution of one dimension, for the page to draw.

    Args:
        distribution: of one example, batch shape (1,), its dimensions independent.
        dim: the dimension, as an index into the flattened example.
        low: start of a curve that is not a normal density.
        high: its end.

    Returns:
        ["normal", mean, standard deviation]; ["bars", probabilities of the codes 0, 1, ..]; or
        ["curve", low, distance of the points, densities].
    """
    assert isinstance(distribution, Independent)
    part = distribution.base_dist
    if isinstance(part, Joint):
        for each, size in zip(part.parts, part.sizes, strict=True):
            if dim < size:
                part = each
                break
            dim -= size
    if isinstance(part, Normal):
        mean, sd = (v.expand(part.batch_shape).flatten()[dim] for v in (part.loc, part.scale))
        return ["normal", mean.item(), sd.item()]
    if isinstance(part, Discrete):
        probabilities = part.log_probs.reshape(-1, part.log_probs.shape[-1])[dim].exp()
        return ["bars", _visible(probabilities)]
    at = torch.linspace(low, high, POINTS, dtype=torch.float64)
    value = at.reshape(-1, *[1] * len(part.batch_shape)).expand(-1, *part.batch_shape)
    density = part.log_prob(value).reshape(POINTS, -1)[:, dim].exp()
    return ["curve", low, (high - low) / (POINTS - 1), _visible(density)]


def _visible(heights: Tensor) -> list[float]:
    """Return heights, with zero for those too small to be seen beside the largest."""
    return heights.where(heights > heights.max() / 2000, 0.0).tolist()


def bell() -> list[list[float]]:
    """Return points u and the standard normal density there, to draw any normal density with."""
    u = torch.linspace(-4, 4, 65, dtype=torch.float64)
    return [u.tolist(), Normal(0.0, 1.0).log_prob(u).exp().tolist()]
