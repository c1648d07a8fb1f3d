"""The readings with which a network is compared, each with inputs of its own.

They are all that is usual and follows from what was given: the inputs as given, and those of the
conventions in `adapters`, whose time inputs are functions of γ: σ, τ, 1 - τ, 1000 τ, log(σ)/4, or
the places in the β's of Ho et al. 2020. Not tried are other β's than these and those given, other
values of σ_data and other scalings than the usual ones, and two mistakes at once, in the output
and in the data.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nelbo.diffusion.gaussian import Levels
from nelbo.diffusion.parametrization import (
    EpsPrediction,
    Parametrization,
    VPrediction,
    XPrediction,
)
from nelbo.integrations.adapters import (
    EDM,
    Factor,
    Flow,
    Score,
    exploding,
    interpolating,
    preserving,
)
from nelbo.integrations.noise_levels import gamma_of
from nelbo.integrations.readings import (
    Clock,
    Ends,
    Outputs,
    Reading,
    counted_clock,
    free_clock,
    renamed_clock,
    said_clock,
    table_clock,
)

if TYPE_CHECKING:
    from nelbo.integrations.denoisers import WrappedModel

SAME = 0.01  # relative difference of inputs that count as the same
USUAL = (0.5, 1.0)  # σ_data of published networks, tried beside that of the data;
FURTHER = (0.25, 0.35, 0.7, 1.4)  # and where one was given, these,
RATIOS = (0.85, 1.2)  # and these times it
TRAINED, BETAS = 1000, (1e-4, 0.02)  # times, and β's, of the training of most networks (Ho et al.)
RANGES = ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5))  # to which published networks scale levels
CLOSE = 0.05  # relative difference of σ_data that count as the same
VP, VE, FLOW = "y = √α x + √(1-α) ε", "y = x + σ ε", "y = (1-τ) x + τ ε"
LATENTS: dict[str, Factor] = {
    VP: preserving,
    VE: exploding,
    FLOW: interpolating,
}
AT = ", with the time input "
MINUS = " of minus the output; wrap a module that returns that"
ZERO = "zero in place of the output"
TWICE = "twice the output"


def readings(model: "WrappedModel", gammas: Sequence[float], deviation: float) -> list[Reading]:
    """Return the reading that was given, whose output has the name "", and then all others.

    The first has the names `ZERO` and `TWICE` too, for zero and twice as much in its place.

    Args:
        model: the network as it was given.
        gammas: levels at which they are tried; inputs that are equal there are one.
        deviation: standard deviation of the data, their own σ_data.
    """
    clock, factor, embed = said_clock(model), model.network.factor, model.process.embed
    given = f'predicts="{model.predicts}"' if model.predicts else "what was given"
    outputs = {
        "": (model.head, 1),
        ZERO: (model.head, 0),
        TWICE: (model.head, 2),
        given + MINUS: (model.head, -1),
    }
    found = [Reading(clock, factor, outputs, embed)]
    for c, levels, outputs in _conventions(model, clock, deviation):
        new = Reading(levels, c, outputs, embed)
        known = next((each for each in found if _alike(each, new, gammas)), None)
        if known is None:
            found.append(new)
        else:
            known.outputs.update(outputs | known.outputs)
    return [*found, *_of_data(model, clock)]


def _alike(one: Reading, other: Reading, gammas: Sequence[float]) -> bool:
    """Return whether two readings have the same inputs."""
    pairs = (zip(one.inputs(gamma), other.inputs(gamma), strict=True) for gamma in gammas)
    return all(
        math.isclose(*pair, rel_tol=SAME, abs_tol=SAME) for level in pairs for pair in level
    )


def _conventions(
    model: "WrappedModel", clock: Clock, deviation: float
) -> Iterator[tuple[Factor, Clock, Outputs]]:
    """Yield c(γ), levels and outputs, from those that differ least from what was given."""
    own, known = model.network.factor, _known_times(model)
    yield own, clock, _outputs(own, "")
    head = getattr(model.head, "head", model.head)  # in one that clips
    given = head.sigma_data if isinstance(head, EDM) else None
    values = [deviation, *USUAL]
    if given is not None:
        values = [given, *(ratio * given for ratio in RATIOS), *values, *FURTHER]
        yield from _of_edm(_apart(values), clock, known)
        outputs = _of_sigma_data(given, f"{AT}σ")
        yield EDM(given).factor, free_clock(_sigma, known), outputs
    yield from _of_latents(own, clock, known, model.process.schedule.steps)
    if given is None:
        yield from _of_edm(_apart(values), clock, known)


def _apart(values: list[float]) -> list[float]:
    """Return the values without those that are close to one before."""
    found: list[float] = []
    for value in values:
        if value > 0 and not any(math.isclose(value, v, rel_tol=CLOSE) for v in found):
            found.append(value)
    return found


def _of_edm(
    values: list[float], clock: Clock, known: Ends | None
) -> Iterator[tuple[Factor, Clock, Outputs]]:
    """Yield EDM's inputs and output for values of σ_data, at its own time inputs and as given."""
    for sigma_data in values:
        factor = EDM(sigma_data).factor
        yield factor, clock, _of_sigma_data(sigma_data)
        outputs = _of_sigma_data(sigma_data, f"{AT}log(σ)/4")
        yield factor, free_clock(lambda gamma: gamma / 8, known), outputs


def _of_sigma_data(sigma_data: float, where: str = "") -> Outputs:
    """Return EDM's output, and minus it."""
    return _signed({f'predicts="edm" with sigma_data={sigma_data:.2g}{where}': EDM(sigma_data)})


def _of_latents(
    own: Factor, clock: Clock, known: Ends | None, steps: int | None
) -> Iterator[tuple[Factor, Clock, Outputs]]:
    """Yield other latents, at the time inputs as they were given and at their own.

    Args:
        own: c(γ) as it was given.
        clock: the levels as they were given.
        known: the ends of time inputs that are whole numbers.
        steps: T, if the levels were given as a table.
    """
    for latents, factor in LATENTS.items():
        yield factor, clock, _outputs(factor, f" of {latents}")
    # some of the times of a training are those of all
    scale = known[1] + 1 if known and not TRAINED / 2 <= known[1] < TRAINED else TRAINED
    for latents, word, time in (
        (VE, "σ", _sigma),
        (FLOW, "τ", _tau),
        (FLOW, "1 - τ", lambda gamma: 1 - _tau(gamma)),
        (FLOW, f"{scale:g} τ", lambda gamma: scale * _tau(gamma)),
    ):
        factor = LATENTS[latents]
        outputs = _outputs(factor, f" of {latents}{AT}{word}")
        yield factor, free_clock(time, known), outputs
    if not known:
        betas = torch.linspace(*BETAS, TRAINED, dtype=torch.float64)
        ends = " to ".join(f"{beta:g}" for beta in BETAS)
        where = f" of {VP}, with the time inputs 0..{TRAINED - 1} of β from {ends}"
        yield preserving, table_clock(gamma_of(betas=betas)), _outputs(preserving, where)
    if steps is None:
        return
    if own is interpolating:
        where = f" of {VE}, where the τ's given are σ's"
        yield exploding, renamed_clock(clock, _as_sigma, _as_tau), _outputs(exploding, where)
    elif own is not preserving:
        where = f" of {FLOW}, where the σ's given are τ's"
        yield (
            interpolating,
            renamed_clock(clock, _as_tau, _as_sigma),
            _outputs(interpolating, where),
        )
    if own is not preserving or not known:
        where = f" of {VP}, with the time inputs 0..T-1"
        yield preserving, counted_clock(clock, steps), _outputs(preserving, where)


def _outputs(factor: Factor, where: str) -> Outputs:
    """Return all outputs for latents c z, and minus each."""
    heads: dict[str, Parametrization] = {
        "noise": EpsPrediction(),
        "data": XPrediction(),
        "velocity": VPrediction(),
        "score": Score(factor),
        "flow": Flow(),
    }
    return _signed({f'predicts="{word}"{where}': head for word, head in heads.items()})


def _signed(heads: dict[str, Parametrization]) -> Outputs:
    plain: Outputs = {name: (head, 1) for name, head in heads.items()}
    return plain | {name + MINUS: (head, -1) for name, head in heads.items()}


def _sigma(gamma: float) -> float:
    return math.exp(min(gamma / 2, 300.0))


def _tau(gamma: float) -> float:
    return 1 / (1 + _sigma(-gamma))


def _as_tau(gamma: float) -> float:
    """Return γ of τ = σ(γ), for a number σ that is taken for a τ."""
    sigma = _sigma(gamma)
    return gamma - 2 * math.log1p(-sigma) if sigma < 1 else math.inf


def _as_sigma(gamma: float) -> float:
    """Return γ of σ = τ(γ), for a number τ that is taken for a σ."""
    return 2 * math.log(_tau(gamma)) if math.isfinite(gamma) else min(gamma, 0.0)


def _known_times(model: "WrappedModel") -> Ends | None:
    """Return the ends of time inputs that are whole numbers, as they may be places in a table."""
    if model.network.name is not None:
        return None
    times = model.network.times.double()
    whole = len(times) > 1 and bool((times == times.round()).all())
    return (times.min().item(), times.max().item()) if whole else None


def _of_data(model: "WrappedModel", clock: Clock) -> Iterator[Reading]:
    """Yield readings of the data, with the output and the inputs as they were given."""
    process, factor, shape = model.process, model.network.factor, model.shape
    own = process.embedding

    def read(name: str, embed: Callable[[Tensor], Tensor], size: float = 1.0) -> Reading:
        return Reading(clock, factor, {name: (model.head, 1)}, embed, size)

    if len(shape) == 3 and shape[1] == shape[2]:
        name = "images with rows and columns exchanged; give x.transpose(-1, -2)"
        yield read(name, lambda x: process.embed(x).transpose(-1, -2))
    if not own.count:
        return
    name = f"images of inverted levels; give {own.count - 1} - x"
    yield read(name, lambda x: process.embed(own.count - 1 - x))
    for low, high in RANGES:
        if (low, high) != (own.low, own.high):
            name = (
                f"levels scaled to [{low:g}, {high:g}]; give"
                f" scaling=Levels({own.count}, {low:g}, {high:g}), or ,scaling={low:g}:{high:g}"
                " after a folder"
            )
            scaled = Levels(own.count, low, high).to(own.values.device)
            yield read(name, scaled, (high - low) / (own.high - own.low))
