"""Find a wrong reading of a network, which would otherwise be a plausible wrong number.

A reading says what the output is, how the data are scaled and how they lie. Each gives an x̂ from
the same output, or from that at other inputs of the same SNR, and the right one has the least
error of the data:

    ρ = E‖x - x̂‖² / E‖x - ax̂'‖²,    x̂' = a z + b, the best straight line

A reading is refused if another has a much smaller ρ, by many standard errors, and fits the data
much better than a line. Without data, the output at pure noise tells some readings apart: where
nothing of x is left, y is ε, and the slope of the output over y is 1 for ε and ε - x, and nearly 0
for x and √α ε - √(1-α) x.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nelbo._utils.numerics import over
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.checks import check_examples
from nelbo.diffusion.gaussian import GaussianDiffusion, Levels
from nelbo.diffusion.model import measuring

if TYPE_CHECKING:
    from nelbo.integrations.denoisers import WrappedModel

SIGNAL = 0.02  # α at the last time above which pure noise is not shown: too much of x is left
NUMBERS = 2**12  # numbers of pure noise shown to a network, in 2 to ROWS rows
ROWS = 8  # rows shown at each noise level
SNRS = (10.0, 1.0)  # of the two noise levels at which data are shown
NEAR = math.log(1.5)  # distance of log-SNRs that count as the same
LESS = 1.5  # a reading is refused if another has an error smaller by this factor,
ERRORS = 6.0  # by as many standard errors,
FITS = 0.7  # and a ρ below this
SLIGHTLY, DOUBT = 1.2, 4.0  # the same factor and number for a note
NOTHING = 0.9  # ρ above which nothing is learned
MINUS = " of minus the output; wrap a module that returns that"


def probe(model: "WrappedModel", batch: Batch | None = None) -> list[str]:
    """Return notes on how a network is read.

    Args:
        model: the network as a model.
        batch: some of the examples to be measured, if there are any.

    Raises:
        ValueError: another reading fits better by far; the message names it.
    """
    if model.conditioned_on and (batch is None or batch.condition is None):
        return []
    if batch is None:
        return _at_noise(model)
    if not len(batch):
        return []  # refused later, with every other model
    check_examples(model, batch.x)
    with measuring(model):
        return _at_examples(model, model.process, batch)


def _point(output: Tensor, z: Tensor) -> Tensor:
    """Return the output without a variance."""
    return output[..., 0] if output.ndim > z.ndim else output


def _at_noise(model: "WrappedModel") -> list[str]:
    """Return a note, or raise ValueError, by the slope of the output over pure noise."""
    said = model.said
    last = torch.ones((), dtype=torch.float64)
    if not said or model.process.alpha(last) > SIGNAL:
        return []
    rows = min(ROWS, max(2, NUMBERS // model.dims))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, *model.shape, dtype=torch.float64, generator=generator)
    like = next(model.network.parameters())
    with measuring(model):
        level = model.process.log_snr_input(last.expand(rows).to(like.device))
        output = _point(model.network(z.to(like), level.to(like)).to(z), z)
    z, output = z - z.mean(0), output - output.mean(0)
    slope = ((z * output).sum() / z.square().sum()).item()
    left = ((output - slope * z).square().sum() / output.square().sum().clamp(min=1e-300)).item()
    follows = abs(abs(slope) - 1) < 0.2 and left < 0.1
    seen = f"the output has the slope {slope:.2f} over the noise at the last time"
    if follows and slope < 0:
        raise ValueError(
            f"{seen}: its sign is that of x - ε or -ε; wrap a module that returns minus the"
            ' output, as predicts="flow" or "noise"'
        )
    if follows and said == "velocity":
        raise ValueError(
            f'{seen}, where that of predicts="velocity", √α ε - √(1-α) x, has nearly 0: it may be'
            ' that of predicts="flow", ε - x, or of predicts="noise"'
        )
    if follows and said in ("data", "edm"):
        raise ValueError(
            f'{seen}, where that of predicts="{said}", which follows x, has nearly 0: it may be'
            ' that of predicts="noise", or of predicts="flow"'
        )
    if said == "flow" and not follows:
        return [
            f'{seen}, where that of a trained flow, ε - x, has 1: is it predicts="velocity", or'
            " not trained?"
        ]
    return []


@dataclass(frozen=True)
class _Reading:
    """Data as a network may have seen them in training.

    Args:
        name: of what is different; "" as said.
        embed: the data in the units of the network, from x.
        size: of a level in these units, in that of the reading that was said.
    """

    name: str
    embed: Callable[[Tensor], Tensor]
    size: float


def _readings(process: GaussianDiffusion, shape: tuple[int, ...]) -> Iterator[_Reading]:
    """Yield the reading of the data that was said, and others."""
    own = process.embedding
    yield _Reading("", process.embed, 1.0)
    if len(shape) == 3 and shape[1] == shape[2]:
        yield _Reading(
            "images with rows and columns exchanged; give x.transpose(-1, -2)",
            lambda x: process.embed(x).transpose(-1, -2),
            1.0,
        )
    if not own.count:
        return
    yield _Reading(
        f"images of inverted levels; give {own.count - 1} - x",
        lambda x: process.embed(own.count - 1 - x),
        1.0,
    )
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5)):
        if (low, high) != (own.low, own.high):
            scaled = Levels(own.count, low, high).to(own.values.device)
            yield _Reading(
                f"levels scaled to [{low:g}, {high:g}]; give"
                f" scaling=Levels({own.count}, {low:g}, {high:g}), or ,scaling={low:g}:{high:g}"
                " after a folder",
                scaled,
                (high - low) / (own.high - own.low),
            )


def _at_examples(model: "WrappedModel", process: GaussianDiffusion, batch: Batch) -> list[str]:
    """Return a note, or raise ValueError, by the errors of all readings of the data."""
    rows = torch.linspace(0, len(batch) - 1, ROWS).round().long()
    batch = batch[rows].to(model.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.x.shape, dtype=torch.float64, generator=generator)
    noise = noise.to(batch.x.device)
    errors: dict[tuple[str, str], list[Tensor]] = {}
    for wanted in SNRS:
        unit: Tensor | None = None
        snr = wanted
        for reading in _readings(process, model.shape):
            t, there = _time_of(process, snr / reading.size**2)
            if unit is not None and abs(math.log(there * reading.size**2 / snr)) > NEAR:
                continue
            e = reading.embed(batch.x).double()
            found = dict(_predicted(model, process, e, noise, t, batch.condition, reading))
            if unit is None:  # of the reading that was said, the first
                unit, snr = _of_a_line(process, e, noise, t), there
            for key, e_hat in found.items():
                error = (e - e_hat).square().flatten(1).mean(1) / reading.size**2
                errors.setdefault(key, []).append(error / unit)
    said = errors.pop(("", ""), [])
    if not said:
        return []
    own = torch.stack(said).mean(0)
    others = {k: torch.stack(v).mean(0) for k, v in errors.items() if len(v) == len(said)}
    if not own.isfinite().all():
        return []  # constant images, which a line fits exactly; or no number, which is said later
    best = min(others, key=lambda k: others[k].mean().item(), default=None)
    if best is not None and _is_better(own, others[best]):
        output, data = best
        raise ValueError(
            f"the network was read wrongly: read as {output or data}, it has"
            f" {others[best].mean().item():.2g} times the error of a straight line on these"
            f" examples, and as given {own.mean().item():.2g} times"
        )
    if best is not None and _is_better(own, others[best], SLIGHTLY, DOUBT):
        output, data = best
        return [
            f"the network may be read wrongly: as {output or data}, it has"
            f" {others[best].mean().item():.2g} times the error of a straight line on some"
            f" examples, and as given {own.mean().item():.2g} times, too little to be certain: was"
            " it trained as it is read?"
        ]
    if own.mean() < NOTHING:
        return []
    return [
        "the network denoises these examples no better than a straight line"
        f" ({own.mean().item():.2g} times its error), and no other reading fits: it is measured"
        " as given; was it trained, and on such data?"
    ]


def _is_better(own: Tensor, other: Tensor, less: float = LESS, errors: float = ERRORS) -> bool:
    """Return whether another reading has less error, (ROWS,), by a factor and standard errors."""
    gap = own - other
    error = gap.std().item() / math.sqrt(len(gap))
    return bool(
        other.mean() < FITS
        and other.mean() * less < own.mean()
        and gap.mean().item() > errors * error
    )


def _time_of(process: GaussianDiffusion, snr: float) -> tuple[float, float]:
    """Return the time whose SNR is nearest, and its SNR."""
    schedule = process.schedule
    count = schedule.steps or 1000
    times = torch.arange(1, count + 1, dtype=torch.float64) / count
    if schedule.steps is None:
        times = schedule.start + (1 - schedule.start) * times
    device = next((b.device for b in schedule.buffers()), torch.device("cpu"))
    log_snr = -schedule(times.to(device)).cpu()
    i = int((log_snr - math.log(snr)).abs().argmin())
    return times[i].item(), math.exp(max(log_snr[i].item(), -700.0))


def _mixed(process: GaussianDiffusion, e: Tensor, noise: Tensor, t: float) -> Tensor:
    """Return z_t of e with the noise."""
    alpha = process.alpha(torch.tensor(t, dtype=torch.float64, device=e.device))
    return alpha.sqrt() * e + (1 - alpha).sqrt() * noise


def _of_a_line(process: GaussianDiffusion, e: Tensor, noise: Tensor, t: float) -> Tensor:
    """Return the mean square error of the best line a z + b, a scalar; NaN if it is exact."""
    z = _mixed(process, e, noise, t)
    e, z = e - e.mean(), z - z.mean()
    error = e.square().mean() - (e * z).mean().square() / z.square().mean()
    return torch.where(error > 1e-12, error, torch.nan)


def _predicted(
    model: "WrappedModel",
    process: GaussianDiffusion,
    e: Tensor,
    noise: Tensor,
    t: float,
    condition: Tensor | None,
    reading: _Reading,
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield ê by the readings of one output, each with its name."""
    z, time = (
        _mixed(process, e, noise, t),
        torch.full((len(e),), t, dtype=e.dtype, device=e.device),
    )
    like = next(model.network.parameters())
    inputs = [z, process.log_snr_input(time)] + ([] if condition is None else [condition])
    output = model.network(*(v.to(like) for v in inputs))
    yield ("", reading.name), model.head.read(output, z, time, process, torch.float64).e_hat
    said = model.said
    if reading.name or not said:
        return
    if said == "edm":
        e_hat = model.head.read(-output, z, time, process, torch.float64).e_hat
        yield (f'predicts="edm"{MINUS}', ""), e_hat
    f = _point(output, z).double()
    alpha = process.alpha(time)
    a, b = over(alpha.sqrt(), z), over((1 - alpha).sqrt(), z)
    for sign, hint in ((1, ""), (-1, MINUS)):
        for name, e_hat in (
            ("noise", (z - b * sign * f) / a),
            ("data", sign * f),
            ("velocity", a * z - b * sign * f),
            ("flow", (z - b * sign * f) / (a + b)),
        ):
            if sign < 0 or name != said:
                yield (f'predicts="{name}"{hint}', ""), e_hat
