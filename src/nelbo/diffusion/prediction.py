r"""Predictions of e = embed(x) from z_t: a mean ê, or the probabilities of levels or symbols.

A prediction takes the place of e in the formulas of the encoder (`process`). One with
probabilities computes the whole table of them only where it is asked for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.diffusion.level_law import mean_and_norm
from nelbo.diffusion.symbols import Predicted

if TYPE_CHECKING:
    from nelbo.diffusion.process import ForwardProcess


@dataclass(frozen=True)
class Prediction:
    """Prediction ê of e, shape of embed(x).

    Args:
        e_hat: ê.
        fraction: position of log σ² of a reverse kernel between log β̃ (0) and log β (1), shape
            of ê; None where the network does not predict it.
    """

    e_hat: Tensor
    fraction: Tensor | None = field(default=None, kw_only=True)

    #: whether what comes after the current block of `BlockDiffusion` is not predicted
    ends_with_block = False

    @property
    def factors(self) -> "Sequence[Prediction]":
        """The predictions of the groups of columns; for other data, this one alone."""
        return (self,)

    @property
    def levels(self) -> "LevelPrediction | None":
        """The prediction itself if it has probabilities of levels, else None."""
        return None

    def symbols(self, z: Tensor, mask: int | None) -> Predicted:
        """Return P(x_i|z) of each place, where ê are log-probabilities (B, ..., K).

        Args:
            z: at which the prediction is, (B, ...).
            mask: the value of z that hides a symbol; None if none does.
        """
        return Predicted(self.e_hat, z, mask, dtype=self.e_hat.dtype)

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """Return the prediction with f applied to each tensor, such as a selection of examples."""
        each = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: f(v) for name, v in each.items() if v is not None})


@dataclass(frozen=True)
class LevelPrediction(Prediction, ABC):
    """Probabilities of levels, with their mean as ê."""

    @property
    @override
    def levels(self) -> Self:
        return self

    @property
    @abstractmethod
    def log_probs(self) -> Tensor:
        """The table log P(x_i = v_k|z_t) of all levels, shape (B, ..., K)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log P(x_i|z_t) of the level of each dimension; x has the shape of ê."""
        return self.log_probs.gather(-1, x[..., None].long())[..., 0]


@dataclass(frozen=True)
class LevelTable(LevelPrediction):
    """Probabilities of levels as a table, shape (B, ..., K)."""

    table: Tensor

    @property
    @override
    def log_probs(self) -> Tensor:
        return self.table


class LevelFamily(LevelPrediction):
    """log P(x_i = v_k|z_t) = Σ_j c_ij f_j(k) + h_i(k) + log N(z_t; √α_t v_k, 1-α_t) - A_i.

    The table, ê and A are computed only when needed.

    Args:
        coefficients: c, shape (B, D, J).
        curves: f, shape (J, K).
        prior: h, shape (D, K) or (1, K).
        evidence: v (K,), z_t (B, D), √α_t (B,) and 1/(1-α_t) (B,).
        shape: of z_t.
    """

    def __init__(
        self,
        coefficients: Tensor,
        curves: Tensor,
        prior: Tensor,
        evidence: tuple[Tensor, Tensor, Tensor, Tensor],
        shape: torch.Size,
    ) -> None:
        self.coefficients, self.curves, self.prior = coefficients, curves, prior
        self.evidence, self.shape = evidence, shape

    @property
    def e_hat(self) -> Tensor:
        """The mean of the levels, shape of z_t."""
        return self._mean_and_norm[0].view(self.shape)

    @property
    def norm(self) -> Tensor:
        """The normaliser A, shape of z_t."""
        return self._mean_and_norm[1].view(self.shape)

    @cached_property
    def _mean_and_norm(self) -> tuple[Tensor, Tensor]:
        return mean_and_norm(self.coefficients, self.curves, self.prior, *self.evidence)

    @property
    @override
    def log_probs(self) -> Tensor:
        values, z, signal, precision = self.evidence
        logits = self.coefficients @ self.curves + self.prior
        logits = logits + _evidence(z[..., None], values, signal, precision)
        return logits.log_softmax(-1).reshape(*self.shape, -1)

    @override
    def log_prob(self, x: Tensor) -> Tensor:
        x = x.flatten(1).long()
        values, z, signal, precision = self.evidence
        context = (embedding(x, self.curves.T) * self.coefficients).sum(-1)
        prior = self.prior[torch.arange(len(self.prior), device=x.device), x]
        logit = context + prior + _evidence(z, values[x], signal, precision)
        return logit.view_as(self.norm) - self.norm

    @override
    def map(self, f: Callable[[Tensor], Tensor]) -> LevelTable:  # type: ignore[override]
        return LevelTable(f(self.e_hat), f(self.log_probs))


class SymbolPrediction(Prediction):
    """P(x_i = k|z_t) = softmax_k( output + log-prior ), normalised only where it is asked for.

    Args:
        output: of the network, in its own dtype, (B, ..., K).
        log_prior: broadcastable to the output, or None.
        dtype: in which log-probabilities are computed.
    """

    def __init__(self, output: Tensor, log_prior: Tensor | None, dtype: torch.dtype) -> None:
        self.output, self.log_prior, self.dtype = output, log_prior, dtype

    @property
    def e_hat(self) -> Tensor:
        """The table log P(x_i = k|z_t) of all places, also those that z_t shows, (B, ..., K)."""
        return self.symbols(self.output.new_zeros(self.output.shape[:-1]), None).table()

    @override
    def symbols(self, z: Tensor, mask: int | None) -> Predicted:
        return Predicted(self.output, z, mask, self.log_prior, dtype=self.dtype)

    @override
    def map(self, f: Callable[[Tensor], Tensor]) -> "SymbolPrediction":
        prior = None if self.log_prior is None else f(self.log_prior.expand_as(self.output))
        return SymbolPrediction(f(self.output), prior, self.dtype)


def level_evidence(z: Tensor, values: Tensor, t: Tensor, process: "ForwardProcess") -> Tensor:
    """Return log N(z_t; √α_t v_k, 1-α_t) + const for each level k, shape (B, ..., K)."""
    return _evidence(z[..., None], values.to(z.dtype), *signal_and_precision(t, process))


def signal_and_precision(t: Tensor, process: "ForwardProcess") -> tuple[Tensor, Tensor]:
    """Return √α_t and 1/(1-α_t), shape of t."""
    return process.alpha(t).sqrt(), (-process.log_one_minus_alpha(t)).exp()


def _evidence(z: Tensor, values: Tensor, signal: Tensor, precision: Tensor) -> Tensor:
    error = z - over(signal, z) * values
    return error.square() * over(-0.5 * precision, z)
