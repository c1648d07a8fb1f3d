"""What an evaluation states: the bound, its terms, its errors and its price."""

import math
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nelbo.diffusion.elbo import Bound


@dataclass(frozen=True)
class StandardError:
    """Of the mean bound; `total`² = `data`² + `monte_carlo`². Value ± 1.96 of it is a 95 %
    interval, however few draws tell of it (`intervals`); NaN where they tell too little."""

    total: float
    data: float
    monte_carlo: float


@dataclass(frozen=True)
class Terms:
    """The three terms; they add up to the bound."""

    prior: float
    reconstruction: float
    diffusion: float


@dataclass(frozen=True)
class CurvePoint:
    """What the times between t_from and t_to add to the diffusion term; error by Monte Carlo."""

    t_from: float
    t_to: float
    value: float
    standard_error: float


@dataclass(frozen=True)
class Evaluation:
    """The bound on −log P(x), mean over examples, and everything needed to obtain it again.

    Where the model was given conditions it is on −log P(x|c), and `given` names c.

    `nats` is per example. Standard errors, terms and curve are in `unit`: bits/dim for
    probabilities, nats for densities, which have no bits/dim. So many of the `examples` were
    `visited`: all, or a random sample, and then `per_example` is NaN of the others. A value ± 1.96
    of its standard error is a 95 % interval; NaN is an error of which too little is known.
    """

    bits_per_dim: float | None
    nats: float
    unit: str
    standard_error: StandardError
    terms: Terms
    examples: int
    visited: int
    dims: int
    calls_per_example: float
    steps: int | None
    seed: int
    weights: str
    split: str
    given: str
    precision: str
    model_hash: str
    data_hash: str
    processes: int
    curve: list[CurvePoint]
    per_example: Bound = field(repr=False, compare=False)
    per_example_error: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, without the terms per example; what is not finite is None."""
        empty = torch.empty(0)
        plain = asdict(
            replace(self, per_example=Bound(empty, empty, empty), per_example_error=empty)
        )
        del plain["per_example"], plain["per_example_error"]
        return {key: _finite(value) for key, value in plain.items()}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Per example, in the order of the data, shape (N,), nats: the bound `nats` on
        -log P(x), its Monte Carlo `standard_error` and its three terms."""
        arrays = {name: term.numpy() for name, term in self.per_example._asdict().items()}
        error = self.per_example_error.numpy()
        return {"nats": -self.per_example.elbo.numpy(), "standard_error": error, **arrays}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ImportanceDetails:
    """K paths on a grid of T times. `weight_share` is the mean of (Σw)²/(K Σw²): 1 where all paths
    weigh the same, 1/K where one carries all."""

    samples: int
    steps: int
    weight_share: float


@dataclass(frozen=True)
class FlowDetails:
    """The probability flow at the tighter of two tolerances.

    The bound at the looser one, on the same draws, is `loose`; `largest_change` is the most that
    any example's changed between them; both in the unit of the result.
    """

    samples: int
    dequantiser: str
    trace: str
    first: float
    tolerance: float
    loose_tolerance: float
    loose: float
    largest_change: float


@dataclass(frozen=True)
class BoundEstimate:
    """A bound on −log P(x), mean over examples, and everything needed to obtain it again.

    `nats` is per example; standard errors are in `unit`: bits/dim for probabilities, nats for
    densities, which have no bits/dim. Calls are rows through the network, forward and backward,
    per example, all that were spent.
    """

    bits_per_dim: float | None
    nats: float
    unit: str
    standard_error: StandardError
    how: ImportanceDetails | FlowDetails
    examples: int
    dims: int
    replicates: int
    calls_per_example: float
    backward_calls_per_example: float
    seed: int
    weights: str
    split: str
    given: str
    precision: str
    model_hash: str
    data_hash: str
    processes: int
    #: the lower bound on log P(x), shape (N,), nats, mean of the replicates
    per_example: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, without the bounds per example; what is not known is None."""
        plain = asdict(replace(self, per_example=torch.empty(0)))
        del plain["per_example"]
        error = plain["standard_error"]
        plain["standard_error"] = {k: v if math.isfinite(v) else None for k, v in error.items()}
        return plain
