"""The terms of the bound, each with the times it is taken at.

    Decode(t)   reconstruction_term at the first times
    Step(s, t)  diffusion_term
    Rate(t)     diffusion_rate, a term per unit of time

A term knows the weight with which an error of the prediction enters it: ‖e - ê‖² of a Gaussian
process (equations 7 and 8), Σ_masked -log P(x_i|z_t) of an absorbing one (equation 9).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo._utils.numerics import slope
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import diffusion_rate, diffusion_term, reconstruction_term
from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess


@dataclass(frozen=True)
class Term(ABC):
    """One term of the bound at times t, shape (B,)."""

    t: Tensor

    @abstractmethod
    def cost(self, model: Model, batch: Batch) -> Tensor:
        """One draw, one network call each, shape (B,), nats."""

    @abstractmethod
    def error_weight(self, process: ForwardProcess) -> Tensor:
        """w in w ‖e - ê‖², the cost of a Gaussian step with variance β̃; shape (B,)."""

    @abstractmethod
    def mask_weight(self, process: ForwardProcess) -> Tensor:
        """w in w Σ_masked -log P(x_i|z_t), shape (B,)."""


@dataclass(frozen=True)
class ReconstructionTerm(Term):
    """E_q(z_1|x)[ -log P(x|z_1) ] at the first times t."""

    def cost(self, model: Model, batch: Batch) -> Tensor:
        return reconstruction_term(model, batch.x, self.t, batch.condition)

    def error_weight(self, process: ForwardProcess) -> Tensor:
        return (-process.schedule(self.t)).exp() / 2

    def mask_weight(self, process: ForwardProcess) -> Tensor:
        return torch.ones_like(self.t)


@dataclass(frozen=True)
class DiffusionTerm(Term):
    """E_q(z_t|x) KL( q(z_s|z_t,x) ‖ P(z_s|z_t) )."""

    s: Tensor

    def cost(self, model: Model, batch: Batch) -> Tensor:
        return diffusion_term(model, batch.x, self.s, self.t, batch.condition)

    def error_weight(self, process: ForwardProcess) -> Tensor:
        snr_s, snr_t = ((-process.schedule(v)).exp() for v in (self.s, self.t))
        return (snr_s - snr_t) / 2

    def mask_weight(self, process: ForwardProcess) -> Tensor:
        return (process.alpha(self.s) - process.alpha(self.t)) / (
            process.log_one_minus_alpha(self.t).exp()
        )


@dataclass(frozen=True)
class DiffusionRate(Term):
    """lim_{s→t} Step(s, t)/(t-s)."""

    def cost(self, model: Model, batch: Batch) -> Tensor:
        return diffusion_rate(model, batch.x, self.t, batch.condition)

    def error_weight(self, process: ForwardProcess) -> Tensor:
        return slope(process.schedule, self.t) * (-process.schedule(self.t)).exp() / 2

    def mask_weight(self, process: ForwardProcess) -> Tensor:
        return slope(process.schedule, self.t) * process.alpha(self.t)
