"""Records of evaluations: the bound, its terms, its errors and its cost in network calls."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from html import escape
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from nelbo.diffusion.elbo import Bound

if TYPE_CHECKING:
    from nelbo.diffusion.latent import LatentBound


@dataclass(frozen=True)
class StandardError:
    """Standard error of the mean bound, with `total`² = `data`² + `monte_carlo`².

    The value ± 1.96 standard errors is a 95 % interval, also for few draws (`intervals`); NaN
    where there are too few.
    """

    total: float
    data: float
    monte_carlo: float

    @property
    def shown(self) -> str:
        """The total with two digits; where one example leaves it open, what is known of it."""
        if not math.isnan(self.total):
            return f"{self.total:.2g}"
        if math.isnan(self.monte_carlo):
            return "not known"
        return f"{self.monte_carlo:.2g} (Monte Carlo alone)"


@dataclass(frozen=True)
class Terms:
    """The three terms, which add up to the bound."""

    prior: float
    reconstruction: float
    diffusion: float


@dataclass(frozen=True)
class LatentTerms(Terms):
    """The terms of a latent diffusion model: the three of its prior, the decoder and the encoder.

    The encoder's term is minus its entropy. Reconstruction and encoder are densities of latents.
    """

    decoder: float
    encoder: float


@dataclass(frozen=True)
class CurvePoint:
    """Contribution of the times t_from..t_to to the diffusion term, and its Monte Carlo error."""

    t_from: float
    t_to: float
    value: float
    standard_error: float


COLOURS = ("#7f7f7f", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77")  # of the terms in a picture


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Mean bound on −log P(x) over examples, and everything needed to obtain it again.

    With conditions it is the bound on −log P(x|c), and `given` names c.

    `nats` is in nats per example. `value`, the terms and `standard_error` are in `unit`: bits/dim
    for probabilities, nats for densities, which have no bits/dim. So the interval is value ± 1.96
    standard errors, not nats ± 1.96; an unknown error is NaN. Calls are rows that went forward
    through the network, per example, with those that check how another library's is read. For a
    text, `rates` holds the bound per token, character and byte, and the perplexity, by name.
    """

    bits_per_dim: float | None
    nats: float
    unit: str
    standard_error: StandardError
    examples: int
    dims: int
    calls_per_example: float
    seed: int
    weights: str
    split: str
    given: str
    precision: str
    model_hash: str
    data_hash: str
    processes: int
    rates: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def value(self) -> float:
        """The bound in `unit`."""
        return self.nats if self.bits_per_dim is None else self.bits_per_dim

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, without those per example; None for non-finite values."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.repr}
        return own | dict(self.rates)


def _plain(value: object) -> object:
    if isinstance(value, Measurement):
        return value.to_dict()
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True, repr=False)
class OrderLikelihood(Measurement):
    """Mean −log P(x) of a sampler that shows symbols in an order of its own, exact.

    It has no Monte Carlo error, and no Jensen gap as a bound has.
    """

    sampler: str
    tokens_per_step: int
    #: log P(x), shape (N,), nats
    per_example: Tensor = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The sampler and the number of symbols that it shows at a time."""
        return f"{self.sampler}, {self.tokens_per_step} at a time"

    @property
    def of(self) -> str:
        """The sampler as a sentence names it."""
        return "the any-order sampler" if self.sampler == "random" else "another sampler"

    def __repr__(self) -> str:
        return (
            f"{self.value:.4f} ± {self.standard_error.shown} {self.unit}, exact -log P(x"
            f"{f'|{self.given}' if self.given else ''}) of {self.of} ({self.name}),"
            f" {self.calls_per_example:.4g} network calls each"
        )


@dataclass(frozen=True)
class ColumnCosts:
    """The cost of each column of a table for some examples, on a grid of a number of steps."""

    names: tuple[str, ...]
    #: -ELBO, shape (N, C), nats; its sum over columns is that of the row
    nats: Tensor
    steps: int


class TokenCosts(NamedTuple):
    """The contribution of each token of a text to its bound, with Monte Carlo errors."""

    #: mean cost without control variates, shape of the examples; its sum over a text is an
    #: unbiased estimate of the bound too; NaN where a token is not scored
    nats: Tensor
    #: Monte Carlo error of each; NaN where a token is not scored
    standard_error: Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Measurement):
    """Mean bound on −log P(x) over examples, with its terms.

    Terms and curve are in `unit`; `per_example` and `per_example_error` are in nats. The standard
    error belongs to the sum of the terms; a single term may be less certain. `visited` is the
    number of examples that were measured: all, or a random sample, and then `per_example` is NaN
    for the others.
    """

    terms: Terms
    visited: int
    steps: int | None
    curve: list[CurvePoint]
    per_example: "Bound | LatentBound" = field(repr=False, compare=False)
    per_example_error: Tensor = field(repr=False, compare=False)
    #: of texts of tokens, if they were asked for one by one
    by_token: TokenCosts | None = field(default=None, repr=False, compare=False)
    #: a sentence for each choice that the meaning of the bound depends on
    notes: tuple[str, ...] = ()
    #: −log P(x) of a sampler of the same network that shows symbols in an order of its own
    in_order: OrderLikelihood | None = None
    #: the cost of each column of a table, where it was asked for
    columns: ColumnCosts | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        time = "continuous time" if self.steps is None else f"{self.steps} steps"
        terms = " + ".join(f"{name} {term:.4f}" for name, term in vars(self.terms).items())
        return (
            f"{self.value:.4f} ± {self.standard_error.shown} {self.unit}, the bound on"
            f" -log P(x{f'|{self.given}' if self.given else ''}): {terms}\n    {self.split},"
            f" {time};"
            f" {self.examples} examples, {self.calls_per_example:.4g} network calls each"
            + ("" if self.in_order is None else f"\n    {self.in_order!r}")
        )

    def _repr_html_(self) -> str:
        """Return a small table and a picture of the terms, for a notebook."""
        first, *others = (escape(line) for line in repr(self).split("\n"))
        rows, bars, at = "", "", 0.0
        whole = sum(map(abs, vars(self.terms).values())) or 1.0
        for (name, term), colour in zip(vars(self.terms).items(), COLOURS, strict=False):
            width = 100 * abs(term) / whole
            rows += f'<tr><td style="color:{colour}">{name}</td><td>{term:.4f}</td></tr>'
            bars += f'<rect x="{at:.2f}%" width="{width:.2f}%" height="12" fill="{colour}"/>'
            at += width
        picture = f'<svg width="320" height="12" role="img" aria-label="{first}">{bars}</svg>'
        head = f"<tr><th>term</th><th>{self.unit}</th></tr>"
        return f"<p>{'<br>'.join([first, *others])}</p>{picture}<table>{head}{rows}</table>"

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return arrays per example, in the order of the data, shape (N,), in nats.

        They are the bound `nats` on -log P(x), its Monte Carlo `standard_error` and its terms; and
        `sampler_nats`, -log P(x) in an order of its own, where that was measured. Of texts of
        tokens also `nats_per_token` and its error, and (N, L) the costs `token_nats` of each
        token, from the first of its text to the end of the longest, see `TokenCosts`, with their
        errors. Variates of masks reduce the variance of `nats`, so these add up to it but for
        their noise.
        """
        arrays = {name: term.numpy() for name, term in self.per_example._asdict().items()}
        error = self.per_example_error.numpy()
        if self.in_order is not None:
            arrays["sampler_nats"] = -self.in_order.per_example.numpy()
        if (tokens := self.by_token) is not None:
            scored = (~tokens.nats.isnan()).flatten(1).sum(1).numpy()
            arrays["nats_per_token"] = -self.per_example.elbo.numpy() / scored
            arrays["standard_error_per_token"] = error / scored
            arrays["token_nats"] = tokens.nats.numpy()
            arrays["token_standard_error"] = tokens.standard_error.numpy()
        return {"nats": -self.per_example.elbo.numpy(), "standard_error": error, **arrays}


@dataclass(frozen=True, kw_only=True, repr=False)
class LatentEvaluation(Evaluation):
    """Mean bound on −log P(x) over images by a model of their latents.

    The calls per example are those of the prior's network; the others are those of the
    autoencoder.
    """

    encoder_calls_per_example: float
    decoder_calls_per_example: float


@dataclass(frozen=True)
class ImportanceDetails:
    """Importance samples: K paths on a grid of T times.

    `weight_share` is the mean of (Σw)²/(K Σw²): 1 if all paths have equal weights, 1/K if one has
    all the weight.
    """

    samples: int
    steps: int
    weight_share: float


@dataclass(frozen=True)
class FlowDetails:
    """The probability flow, at the tighter of two tolerances.

    `loose` is the bound at the looser tolerance with the same draws; `largest_change` is the
    largest difference between the two over the examples. `probe_error` is the standard error of
    the bound from the random probes of the trace, a part of the total; None for an exact trace.
    All are in the unit of the result.
    """

    samples: int
    dequantiser: str
    trace: str
    first: float
    tolerance: float
    loose_tolerance: float
    loose: float
    largest_change: float
    probe_error: float | None


@dataclass(frozen=True, kw_only=True)
class BoundEstimate(Measurement):
    """Mean of another bound on −log P(x) over examples, by independent replicates."""

    how: ImportanceDetails | FlowDetails
    replicates: int
    backward_calls_per_example: float
    #: the lower bound on log P(x), shape (N,), nats, mean of the replicates
    per_example: Tensor = field(repr=False, compare=False)
    #: a sentence for each choice that the meaning of the bound depends on
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class BothSides(Measurement):
    """−log P(x) from both sides, for examples that the model drew itself.

    The mean is at most `nats`, the importance-weighted bound, and at least `at_least`, in nats per
    example, both in expectation. `gap`, their distance, is at least what the bound is loose by.
    """

    at_least: float
    gap: float
    #: standard error of the gap, nats
    gap_error: float
    samples: int
    steps: int
    #: the examples, (N, *shape)
    x: Tensor = field(repr=False, compare=False)
    #: draws whose mean is at most, and at least, log P(x), shape (N,), nats
    lower: Tensor = field(repr=False, compare=False)
    upper: Tensor = field(repr=False, compare=False)

    def __repr__(self) -> str:
        scale = self.bits_per_dim / self.nats if self.bits_per_dim else 1.0
        return (
            f"-log P(x{f'|{self.given}' if self.given else ''}) of {self.examples} samples of"
            f" the model itself is between {scale * self.at_least:.4f} and"
            f" {scale * self.nats:.4f} {self.unit}. The bound of {self.samples}"
            f" importance-weighted samples of {self.steps} steps is loose by at most"
            f" {scale * self.gap:.4f} ± {scale * self.gap_error:.2g}, on average;"
            f" {self.calls_per_example:.4g} network calls each"
        )


R = TypeVar("R", bound=Measurement)


def rated(found: R, rates: Callable[[Measurement], Mapping[str, float]]) -> R:
    """Return a measurement with its `rates`, and with those of the sampler beside it, if any.

    Args:
        found: of a text, or of other data, which have no rates.
        rates: returns them for a measurement.
    """
    if isinstance(found, Evaluation) and found.in_order is not None:
        found = replace(found, in_order=rated(found.in_order, rates))
    return replace(found, rates=rates(found))


def with_calls(found: R, rows: int, encoder_rows: int = 0) -> R:
    """Return a measurement with more rows that went through its network, and an encoder.

    Args:
        found: a measurement.
        rows: of the network.
        encoder_rows: of the encoder, where the network models its latents.
    """
    if isinstance(found, LatentEvaluation):
        encoder = found.encoder_calls_per_example + encoder_rows / found.examples
        found = replace(found, encoder_calls_per_example=encoder)
    return replace(found, calls_per_example=found.calls_per_example + rows / found.examples)
