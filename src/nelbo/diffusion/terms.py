"""The terms of the bound, each with its times.

    ReconstructionTerm(t)   reconstruction_term at the first times
    DiffusionTerm(t, s)     diffusion_term
    DiffusionRate(t)        diffusion_rate, a term per unit of time

A term knows the weight of the prediction error in its cost: of ‖e - ê‖² in a Gaussian process
(equations 7 and 8), and of Σ_masked -log P(x_i|z_t) in masked diffusion (equation 9).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import slope
from nelbo.diffusion.elbo import diffusion_rate, diffusion_term, reconstruction_term

if TYPE_CHECKING:
    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.distributions import Noise
    from nelbo.diffusion.model import Model
    from nelbo.diffusion.prediction import Prediction
    from nelbo.diffusion.process import ForwardProcess


@dataclass(frozen=True)
class Term(ABC):
    """A term of the bound at times t, shape (B,)."""

    t: Tensor

    @abstractmethod
    def draw(self, model: "Model", batch: "Batch") -> "TermDraw":
        """Draw the term once, with one network call per example; nats."""

    @property
    @abstractmethod
    def before(self) -> Tensor | None:
        """The earlier times of the step of which it is the cost, (B,); None for a rate."""

    @abstractmethod
    def error_weight(self, process: "ForwardProcess") -> Tensor:
        """Return w in w ‖e - ê‖², the cost of a Gaussian kernel with variance β̃; shape (B,)."""

    @abstractmethod
    def mask_weight(self, process: "ForwardProcess") -> Tensor:
        """Return w in w Σ_masked -log P(x_i|z_t), the cost of masked diffusion; shape (B,)."""


@dataclass(frozen=True)
class ReconstructionTerm(Term):
    """E_q(z_1|x)[ -log P(x|z_1) ] at the first times t."""

    @override
    def draw(self, model: "Model", batch: "Batch") -> "TermDraw":
        drawn = reconstruction_term(model, batch.x, self.t, batch.condition)
        return TermDraw(batch.x, self, *drawn)

    @property
    @override
    def before(self) -> Tensor:
        return torch.zeros_like(self.t)

    @override
    def error_weight(self, process: "ForwardProcess") -> Tensor:
        return (-process.schedule(self.t)).exp() / 2

    @override
    def mask_weight(self, process: "ForwardProcess") -> Tensor:
        return torch.ones_like(self.t)


@dataclass(frozen=True)
class DiffusionTerm(Term):
    """E_q(z_t|x) KL( q(z_s|z_t,x) ‖ P(z_s|z_t) )."""

    s: Tensor

    @override
    def draw(self, model: "Model", batch: "Batch") -> "TermDraw":
        drawn = diffusion_term(model, batch.x, self.s, self.t, batch.condition)
        return TermDraw(batch.x, self, *drawn)

    @property
    @override
    def before(self) -> Tensor:
        return self.s

    @override
    def error_weight(self, process: "ForwardProcess") -> Tensor:
        snr_s, snr_t = ((-process.schedule(v)).exp() for v in (self.s, self.t))
        return (snr_s - snr_t) / 2

    @override
    def mask_weight(self, process: "ForwardProcess") -> Tensor:
        return (process.alpha(self.s) - process.alpha(self.t)) / (
            process.log_one_minus_alpha(self.t).exp()
        )


@dataclass(frozen=True)
class DiffusionRate(Term):
    """lim_{s→t} DiffusionTerm(t, s)/(t-s)."""

    @override
    def draw(self, model: "Model", batch: "Batch") -> "TermDraw":
        return TermDraw(batch.x, self, *diffusion_rate(model, batch.x, self.t, batch.condition))

    @property
    @override
    def before(self) -> None:
        return None

    @override
    def error_weight(self, process: "ForwardProcess") -> Tensor:
        return slope(process.schedule, self.t) * (-process.schedule(self.t)).exp() / 2

    @override
    def mask_weight(self, process: "ForwardProcess") -> Tensor:
        return slope(process.schedule, self.t) * process.alpha(self.t)


@dataclass(frozen=True)
class TermDraw:
    """A draw of a term for B examples, one network call each.

    Args:
        x: the examples, (B, ...).
        term: the term and its times.
        z: z_t.
        prediction: of the network at z.
        noise: of a Monte Carlo KL; None where the cost takes none.
        cost: of the examples, (B,), nats.
    """

    x: Tensor
    term: Term
    z: Tensor
    prediction: "Prediction"
    noise: "Noise"
    cost: Tensor
