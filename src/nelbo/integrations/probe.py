"""Find a wrong reading of a network, which would otherwise be a plausible wrong number.

Each of the `conventions` gives an x̂ from the network at inputs of its own, and the right one has
the least error of the data:

    ρ = E‖x - x̂‖² / E‖x - x̂'‖²,    x̂' = a z + b, the best straight line

A reading is refused if another is better by many standard errors and fits the data much better
than a line. A half-trained network fits no reading so well, and several ones badly: there the
other must be better by a factor too. Neither may be only because the outputs are too small, as
those of a lagging average of weights are. The other must therefore be better also than the reading
given with the best of all outputs from once to twice as large.

Readings with the same x̂ for a network are not told apart, nor need they be: F of EDM with
σ_data = 1 is minus the velocity. Nor are readings whose x̂ differ too little: σ_data off by a
tenth, or a noise of y = x + σ ε for a flow, (y - x)/σ and (y - x)/τ, where the data show so little
contrast that y scaled by 1 - τ is as likely as y.

Without data, the output at pure noise tells some readings apart: where nothing of x is left, y is
ε, and the slope of the output over y is 1 for ε and ε - x, and nearly 0 for x and
√α ε - √(1-α) x.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nelbo.diffusion.batch import Batch
from nelbo.diffusion.checks import check_examples
from nelbo.diffusion.model import measuring
from nelbo.integrations.conventions import TWICE, ZERO, readings
from nelbo.integrations.readings import Reading, point, said_clock

if TYPE_CHECKING:
    from nelbo.integrations.denoisers import WrappedModel

SIGNAL = 0.02  # α at the last time above which pure noise is not shown: too much of x is left
NUMBERS = 2**12  # numbers that are enough to be shown to a network at a noise level,
ROWS, LEAST = 8, 4  # in so many rows, at most, and of examples, at least
MORE = 4  # times as many rows where several readings are possible,
LARGE = 2**22  # of at most this many numbers
SNRS = (10.0, 1.0)  # of the two noise levels at which data are shown
ERRORS = 6.0  # a reading is refused if another is better by these standard errors (of the log)
FITS = 0.5  # at a level, at none worse, and has a mean ρ below this;
PARTLY, FAR, WORSE = 0.7, 2.5, 2.0  # or below this, by a factor, and at none worse by so many
SLIGHTLY, DOUBT = 1.1, 4.0  # a factor, and standard errors, with PARTLY, for a note
ALIKE = 1.1  # factor within which errors of two readings count as the same
TINY = 1e-12  # ρ below which it counts as 0
NOTHING = 0.9  # ρ above which nothing is learned


class ReadingError(ValueError):
    """Another reading of a network fits better by far."""


def probe(model: "WrappedModel", batch: Batch | None = None) -> list[str]:
    """Return notes on how a network is read.

    Args:
        model: the network as a model.
        batch: some of the examples to be measured, if there are any.

    Raises:
        ReadingError: another reading fits better by far; the message names it.
    """
    if model.conditioned_on and (batch is None or batch.condition is None):
        return []
    if batch is None:
        return _at_noise(model)
    if not len(batch):
        return []  # refused later, with every other model
    check_examples(model, batch.x)
    with measuring(model):
        return _at_examples(model, batch)


def _at_noise(model: "WrappedModel") -> list[str]:
    """Return a note, or raise ReadingError, by the slope of the output over pure noise."""
    predicts = model.predicts
    last = torch.ones((), dtype=torch.float64)
    if predicts in ("", "score") or model.process.alpha(last) > SIGNAL:
        return []
    rows = min(ROWS, max(2, NUMBERS // model.dims))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, *model.shape, dtype=torch.float64, generator=generator)
    like = next(model.network.parameters())
    with measuring(model):
        level = model.process.log_snr_input(last.expand(rows).to(like.device))
        output = point(model.network(z.to(like), level.to(like)).to(z), z)
    z, output = z - z.mean(0), output - output.mean(0)
    slope = ((z * output).sum() / z.square().sum()).item()
    left = ((output - slope * z).square().sum() / output.square().sum().clamp(min=1e-300)).item()
    follows = abs(abs(slope) - 1) < 0.2 and left < 0.1
    seen = f"the output has the slope {slope:.2f} over the noise at the last time"
    if follows and slope < 0:
        raise ReadingError(
            f'{seen}: its sign is that of x - ε, -ε or a score; give predicts="score", or wrap a'
            ' module that returns minus the output, as predicts="flow" or "noise"'
        )
    if follows and predicts in ("velocity", "data", "edm"):
        raise ReadingError(
            f'{seen}, where that of predicts="{predicts}" has nearly 0: it may be that of'
            ' predicts="flow", ε - x, or of predicts="noise"'
        )
    if predicts == "flow" and not follows:
        return [
            f'{seen}, where that of a trained flow, ε - x, has 1: is it predicts="velocity", or'
            " not trained?"
        ]
    return []


def _at_examples(model: "WrappedModel", batch: Batch) -> list[str]:
    """Return a note, or raise ReadingError, by the errors of all readings.

    Readings that may be better by what few rows show are compared with more.
    """
    rows = max(LEAST, min(ROWS, NUMBERS // model.dims))
    count = rows * max(1, min(MORE, LARGE // (rows * model.dims)))
    batch = batch[torch.linspace(0, len(batch) - 1, count).round().long()].to(model.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.x.shape, dtype=torch.float64, generator=generator)
    noise, order = noise.to(batch.x.device), torch.arange(count).view(rows, -1).T.flatten()
    few, rest = ((batch[part], noise[part]) for part in (order[:rows], order[rows:]))
    deviation = model.process.embed(batch.x).double().std().item()
    gammas = [said_clock(model)(-math.log(snr)).gamma for snr in SNRS]
    if math.inf in gammas:
        raise ValueError(
            "the model has a single step, from pure noise, and P(x|z_1) is uniform there, whatever"
            " the network: give more steps"
        )
    given, *others = readings(model, gammas, deviation)
    first = _errors(given, model, *few, gammas)
    own, zero, twice = first.pop(""), first.pop(ZERO), first.pop(TWICE)
    found = {name: error for name, error in first.items() if _may_be_better(own, error)}
    possible = []
    for reading in others:
        if errors := _errors(reading, model, *few, gammas, own):
            possible.append(reading)
            found |= errors
    if found and len(rest[1]):
        more = _errors(given, model, *rest, gammas)
        own, zero, twice = (
            torch.cat([error, more[name]], 1)
            for name, error in (("", own), (ZERO, zero), (TWICE, twice))
        )
        for reading in possible:
            more |= _errors(reading, model, *rest, gammas)
        found = {k: torch.cat([v, more[k]], 1) for k, v in found.items() if k in more}
    return _verdict(own, zero, twice, found)


def _errors(
    reading: Reading,
    model: "WrappedModel",
    batch: Batch,
    noise: Tensor,
    gammas: Sequence[float],
    own: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return errors of a reading, (levels, rows), by name.

    With those of the reading that was given, `own`, only errors that may be better are returned,
    and none if the network does not take its inputs.
    """
    found: dict[str, Tensor] = {}
    for i, gamma in enumerate(gammas):
        try:
            errors = reading.errors(model, batch, noise, gamma)
        except Exception:  # as a network may refuse in any way what is not its own
            if own is None:
                raise
            return {}
        found = {
            name: torch.cat([found[name], error[None]]) if i else error[None]
            for name, error in errors.items()
            if not i or name in found
        }
        if own is not None:
            found = {k: v for k, v in found.items() if _may_be_better(own[: i + 1], v)}
        if not found:
            break
    return found


def _verdict(own: Tensor, zero: Tensor, twice: Tensor, errors: Mapping[str, Tensor]) -> list[str]:
    """Return a note, or raise ReadingError, by the ρ of the reading given and of others.

    Each has shape (levels, rows), as `zero` and `twice`, those of the reading given with an output
    of zero and of twice the size.
    """
    if not own.isfinite().all():
        return []  # constant images, which a line fits exactly; or no number, which is said later
    means = {name: error.mean().item() for name, error in {"": own, **errors}.items()}
    # of readings that are nearly as good as the best, the one that differs least from that given
    best = next(name for name, mean in means.items() if mean <= ALIKE * min(means.values()))
    if best:
        seen = (
            f"{means[best]:.2g} times the error of a straight line on some of the examples, and as"
            f" given {means['']:.2g} times"
        )
        other, at_best = errors[best], _at_best_size(own, zero, twice)
        # outputs that are only too small fit better than another reading at their best size
        fits = _is_better(own, other) and _is_better(at_best, other, worse=math.inf)
        if fits or _is_better(at_best, other, PARTLY, less=FAR, worse=WORSE):
            raise ReadingError(
                f"the network seems to be read wrongly: read as {best}, it has {seen}"
            )
        if _is_better(own, other, PARTLY, DOUBT, SLIGHTLY, WORSE):
            return [
                f"the network may be read wrongly: as {best}, it has {seen}, too little to be"
                " certain: was it trained as it is read?"
            ]
    if own.mean() < NOTHING:
        return []
    nearest = ""
    if best and _is_better(own, errors[best], math.inf, DOUBT, SLIGHTLY):
        nearest = f" (the best, as {best}, has {means[best]:.2g} times)"
    return [
        "the network denoises these examples no better than a straight line"
        f" ({means['']:.2g} times its error), and no other reading that was tried fits{nearest}:"
        " it is measured as given; was it trained, on such data, and with such noise levels and"
        " time inputs?"
    ]


def _at_best_size(own: Tensor, zero: Tensor, twice: Tensor) -> Tensor:
    """Return errors, (levels, rows), with the output times the best factor from 1 to 2.

    They are parabolas in the factor; through three points of it where x̂ is clipped.
    """
    bend = (twice - 2 * own + zero) / 2
    slope = own - zero - bend
    factor = (-slope.mean(1, True) / (2 * bend.mean(1, True)).clamp(min=TINY)).clamp(1, 2)
    return zero + factor * slope + factor.square() * bend


def _is_better(
    own: Tensor,
    other: Tensor,
    fits: float = FITS,
    errors: float = ERRORS,
    less: float = 1.0,
    worse: float = 0.0,
) -> bool:
    """Return whether another reading fits, and has less error, (levels, rows), at a level by
    standard errors and a factor, and at no other more, by standard errors.
    """
    gain, error = _gain(own, other)
    clear = (gain > math.log(less)) & (gain > errors * error)
    return bool(other.mean() < fits and (gain > -worse * error).all() and clear.any())


def _may_be_better(own: Tensor, other: Tensor) -> bool:
    """Return whether more rows, or further levels, may show that another reading is better."""
    gain, error = _gain(own, other)
    most = gain + DOUBT * error
    clear = len(most) < len(SNRS) or most.max() > math.log(SLIGHTLY)
    return bool(other.mean() < 1 and (most > 0).all() and clear)


def _gain(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean logarithm of the ratio of two errors at each level, and its error."""
    ratios = own.clamp(min=TINY).log() - other.clamp(min=TINY).log()
    return ratios.mean(1), ratios.std(1) / math.sqrt(ratios.shape[1])
