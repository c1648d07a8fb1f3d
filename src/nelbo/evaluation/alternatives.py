"""A tighter bound in place of the ELBO: importance-weighted, or by the probability flow."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization
from nelbo.evaluation.dequantization import DEQUANTISERS
from nelbo.evaluation.importance_bound import evaluate_importance
from nelbo.evaluation.probability_flow import TOLERANCE, evaluate_flow
from nelbo.evaluation.result import BoundEstimate

Dequantise = Literal["encoder", "truncated-normal", "uniform"]


def check_alternative(
    *,
    importance_samples: int | None,
    ode: bool,
    dequantise: str | None,
    tolerance: float | None,
    steps: bool,
    priced: bool,
    sampler: bool,
    surrogate: bool,
    spell: Callable[[str], str] = str,
) -> None:
    """Refuse options that contradict each other.

    Args:
        importance_samples: K of the importance-weighted bound.
        ode: whether the probability flow is asked for.
        dequantise: how it begins, a name in `DEQUANTISERS`.
        tolerance: of its solver.
        steps: whether a number of steps is given.
        priced: whether calls or a target error are given.
        sampler: whether an order of unmasking is given.
        surrogate: whether a surrogate is given.
        spell: how the reader writes the name of an option.

    Raises:
        ValueError: one of them cannot go with another.
    """
    samples, flow, t = (spell(name) for name in ("importance_samples", "ode", "steps"))
    other = ode or importance_samples is not None
    if importance_samples is not None and not steps:
        raise ValueError(f"{samples} weights whole paths of a finite number of steps; give {t}")
    if ode and (steps or importance_samples is not None):
        raise ValueError(f"{flow} uses continuous time; leave {t} and {samples} out")
    if other and priced:
        raise ValueError(
            f"{spell('calls')} and {spell('target_error')} are for the bound; {flow} is priced by"
            f" {spell('tolerance')}, and {samples} by K times T"
        )
    if other and sampler:
        raise ValueError(f"{spell('sampler')} goes beside the bound; leave {flow}, {samples} out")
    if other and surrogate:
        raise ValueError(f"{spell('surrogate')} is for the bound; leave {flow} and {samples} out")
    if not ode and (dequantise is not None or tolerance is not None):
        raise ValueError(
            f"{spell('dequantise')} and {spell('tolerance')} need {flow}; add it, or leave them"
            " out"
        )
    if dequantise is not None and dequantise not in DEQUANTISERS:
        raise ValueError(
            f"{spell('dequantise')} must be one of {', '.join(DEQUANTISERS)}; got {dequantise!r}"
        )


def alternative(
    model: Model,
    times: TimeDiscretization | None,
    *,
    importance_samples: int | None,
    ode: bool,
    dequantise: str | None,
    tolerance: float | None,
) -> Callable[..., BoundEstimate] | None:
    """Return what measures the tighter bound of a batch; None where the ELBO is asked for.

    Args:
        model: the model.
        times: the steps of the importance-weighted bound.
        importance_samples: K of this bound.
        ode: measure by the probability flow.
        dequantise: how it begins, a name in `DEQUANTISERS`; the encoder where left out.
        tolerance: of its solver; 1e-4 where left out.
    """
    if ode:
        way = None if dequantise is None else DEQUANTISERS[dequantise]
        price = TOLERANCE if tolerance is None else tolerance
        return partial(evaluate_flow, model, dequantiser=way, tolerance=price)
    if importance_samples is not None and times is not None:
        return partial(evaluate_importance, model, times=times, samples=importance_samples)
    return None
