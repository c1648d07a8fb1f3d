"""A tighter bound in place of the ELBO: importance-weighted, or by the probability flow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from nelbo._utils.scalars import integer
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization
from nelbo.evaluation.dequantization import DEQUANTISERS, check_continuous
from nelbo.evaluation.importance_bound import evaluate_importance
from nelbo.evaluation.probability_flow import TOLERANCE, evaluate_flow
from nelbo.evaluation.result import BoundEstimate

Dequantise = Literal["encoder", "truncated-normal", "uniform"]


@dataclass(frozen=True)
class Alternative:
    """A bound that is asked for in place of the ELBO, or none.

    Args:
        importance_samples: K of the importance-weighted bound.
        ode: measure by the probability flow.
        dequantise: how it begins, a name in `DEQUANTISERS`; the encoder where left out.
        tolerance: of its solver; 1e-4 where left out.
        own_samples: number of samples of the model itself to measure in place of the data, by the
            importance-weighted bound.
    """

    importance_samples: int | None = None
    ode: bool = False
    dequantise: str | None = None
    tolerance: float | None = None
    own_samples: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether another bound than the ELBO is asked for."""
        return self.ode or self.importance_samples is not None

    def check(
        self,
        *,
        steps: object,
        calls: float | None,
        target_error: float | None,
        sampler: str | None,
        surrogate: object,
        masks: object = None,
        resume: object = None,
        columns: bool = False,
        spell: Callable[[str], str] = str,
    ) -> None:
        """Refuse options that contradict each other; each is None where it was not given.

        Args:
            steps: number of steps, or times.
            calls: network calls of the ELBO.
            target_error: its error.
            sampler: an order of unmasking beside it.
            surrogate: of a masked model.
            masks: the estimator of a masked model.
            resume: a file for what was measured so far.
            columns: the costs of columns beside it.
            spell: how the reader writes the name of an option.

        Raises:
            ValueError: one of them cannot go with another.
        """
        samples, flow, t = (spell(name) for name in ("importance_samples", "ode", "steps"))
        if self.importance_samples is not None and steps is None:
            raise ValueError(
                f"{samples} weights whole paths of a finite number of steps; give {t}"
            )
        if self.ode and (steps is not None or self.importance_samples is not None):
            raise ValueError(f"{flow} uses continuous time; leave {t} and {samples} out")
        if self.wanted and not calls is target_error is None:
            raise ValueError(
                f"{spell('calls')} and {spell('target_error')} are for the bound; {flow} takes"
                f" {spell('tolerance')} instead, and {samples} always takes K times T calls"
            )
        if self.wanted and sampler is not None:
            raise ValueError(
                f"{spell('sampler')} is stated beside the plain bound; leave {flow}, {samples} out"
            )
        if self.wanted and columns:
            raise ValueError(
                f"{spell('columns')} is stated beside the plain bound; leave {flow}, {samples} out"
            )
        if self.own_samples is not None:
            integer(spell("own_samples"), self.own_samples, 1)
            if self.importance_samples is None:
                raise ValueError(f"{spell('own_samples')} needs {samples} K and {t} T; give both")
            if resume is not None:
                raise ValueError(f"{spell('resume')} is for the bound of data; leave it out")
        for name, value in (("surrogate", surrogate), ("masks", masks)):
            if self.wanted and value is not None:
                raise ValueError(f"{spell(name)} is for the bound; leave {flow} and {samples} out")
        if not self.ode and not self.dequantise is self.tolerance is None:
            raise ValueError(
                f"{spell('dequantise')} and {spell('tolerance')} need {flow}; add it, or leave"
                " them out"
            )
        if self.dequantise is not None and self.dequantise not in DEQUANTISERS:
            raise ValueError(
                f"{spell('dequantise')} must be one of {', '.join(DEQUANTISERS)}; got"
                f" {self.dequantise!r}"
            )

    def check_model(self, model: Model) -> None:
        """Refuse a model without this bound, before it is asked for examples.

        Raises:
            ValueError: the model has no probability flow.
        """
        if self.ode:
            check_continuous(model)

    def measure(
        self, model: Model, times: TimeDiscretization | None
    ) -> Callable[..., BoundEstimate] | None:
        """Return what measures this bound of a batch; None where the ELBO is asked for.

        Args:
            model: the model.
            times: the steps of the importance-weighted bound.
        """
        if self.ode:
            way = None if self.dequantise is None else DEQUANTISERS[self.dequantise]
            price = TOLERANCE if self.tolerance is None else self.tolerance
            return partial(evaluate_flow, model, dequantiser=way, tolerance=price)
        if self.importance_samples is not None and times is not None:
            samples = self.importance_samples
            return partial(evaluate_importance, model, times=times, samples=samples)
        return None
