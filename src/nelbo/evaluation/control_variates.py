r"""Control variates: numbers of known mean that correlate with the costs of the network.

A draw of a term of the bound costs c(x, z), one network call. Two kinds of numbers reduce its
variance and leave its expectation unchanged:

    within    r(x, z) - E[ r(x, z) | x, t ], for a reference r that needs no network
    between   φ(x), any numbers of the example alone, for each cell of the times

The references, for e = embed(x) and z_t = √α_t e + √(1-α_t) ε:

    linear    the denoiser of N(μ, Σ), mean and covariance of the data: a quadratic in ε
    levels    the Bayes denoiser of independent dimensions whose levels have log-probabilities o.
              The cost of a dimension depends on its own ε alone, so E is one integral over ε
    symbols   the same for masks: whether a symbol is masked is one Bernoulli variable

o may be anything that is independent of the dimension's own ε: the log-frequencies of the data;
these plus the evidence of all other dimensions of z under mixtures of Gaussians (`clusters`); or,
if an example has several draws, the network's prediction for the dimension at *another* draw,
possibly at a very different time, corrected by the difference between the mixtures' evidence at
this z and at that one. At low noise this removes nine tenths of the variance.

For the exact denoiser of any distribution p, the diffusion term between times s < t is
D(s) - D(t), D(t) = KL( q(z_t|x) ‖ p(z_t) ), for each single x, by the chain rule for the KL of the
two chains. These differences are φ of a cell; features of e from the mixtures of Gaussians, and of
the gradients of an image, are φ of all cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.data.schema import as_examples
from nelbo.diffusion.gaussian_mixture import FEWEST, GaussianMixtureEnsemble
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import level_evidence, log_frequencies
from nelbo.diffusion.process import ForwardProcess, GaussianDiffusion, MaskedDiffusion
from nelbo.diffusion.terms import TermDraw
from nelbo.evaluation.intervals import apart
from nelbo.evaluation.reference_denoisers import (
    TABLE,
    WIDEST,
    LevelReference,
    Linear,
    gaussian,
    of_level,
)

FITTED = 4096  # examples to which mean, covariance and frequencies are fitted, at most
SCALED = 512  # of these, examples by which φ is standardised, about
MOST = 10.0  # largest |φ|, in standard deviations
LEAST = -100.0  # smallest log-probability of a context, also for impossible levels
FINEST = 64  # levels up to which contexts pay off, as they need the probability of each level


@dataclass(frozen=True)
class ContextLogits:
    """Log-probabilities of the levels of each dimension, by two sources; (B, ..., K) or None."""

    by_clusters: Tensor | None = None  # given all others of z
    by_network: Tensor | None = None

    def at(self, rows: Tensor) -> "ContextLogits":
        """Select some of the B rows."""
        return ContextLogits(*(p if p is None else p[rows.to(p.device)] for p in self._voices))

    @staticmethod
    def gathered(rows: Sequence[Tensor], parts: Sequence["ContextLogits"]) -> "ContextLogits":
        """Concatenate parts in the order of their rows; a source is in all parts or in none."""
        order = torch.cat(list(rows)).argsort()
        voices = zip(*(part._voices for part in parts), strict=True)
        spoken = [[p for p in voice if p is not None] for voice in voices]
        return ContextLogits(*(torch.cat(v)[order.to(v[0].device)] if v else None for v in spoken))

    @property
    def _voices(self) -> tuple[Tensor | None, Tensor | None]:
        return self.by_clusters, self.by_network


NO_CONTEXT = ContextLogits()


@dataclass(frozen=True)
class References:
    """Reference denoisers and statistics of the data; None where a process has no such thing.

    Args:
        x: the examples to which they are fitted, without outliers.
        linear: the denoiser of N(μ, Σ).
        clusters: mixtures of Gaussians of e.
        levels: the Bayes denoiser of independent levels.
        log_frequency: of the levels (if not too many) or symbols in each dimension, (..., K).
        note: a sentence on what is left out.
    """

    x: Tensor
    linear: Linear | None = None
    clusters: GaussianMixtureEnsemble | None = None
    levels: LevelReference | None = None
    log_frequency: Tensor | None = None
    note: str = ""


@singledispatch
def references(process: ForwardProcess, model: Model, x: Tensor, edges: Tensor) -> References:
    """Return the references of a model's process, fitted to examples x, (N, ...).

    A class of processes without references gets none; `@references.register` adds them.
    """
    return References(x)


@references.register
def _(process: GaussianDiffusion, model: Model, x: Tensor, edges: Tensor) -> References:
    e = process.embed(x).flatten(1).double()
    # a single outlier would dominate the fit
    usual = ~apart((e - e.median(0).values).abs().amax(1))
    x, e = x[usual], e[usual]
    fits = e.shape[1] <= WIDEST and len(e) >= FEWEST
    linear, clusters = Linear(e), GaussianMixtureEnsemble(e) if fits else None
    # with sixteen bits, one column of the table would not fit into memory
    if not process.codes or process.codes**2 > TABLE:
        return References(x, linear, clusters)
    levels = LevelReference(model, x, edges)
    log_frequency = levels.log_frequency if process.codes <= FINEST else None
    return References(x, linear, clusters, levels, log_frequency)


@references.register
def _(process: MaskedDiffusion, model: Model, x: Tensor, edges: Tensor) -> References:
    if x[0].numel() * process.count > TABLE:
        note = (
            f"no control variates: their table of {x[0].numel()} times {process.count} symbols"
            f" would exceed {TABLE} numbers"
        )
        return References(x, note=note)
    return References(x, log_frequency=log_frequencies(x.cpu(), process.count).to(x.device))


class ControlVariates:
    """The control variates of a model's costs, computed without its network.

    Args:
        model: the model.
        x: examples to fit to, of the distribution of those to be measured, shape (N, ...).
        edges: times between which the cells lie, the first being that of z_1; shape (cells,).
    """

    def __init__(self, model: Model, x: Tensor, edges: Tensor) -> None:
        self.model, self.edges = model, edges.to(model.device)
        some = as_examples(x[:: math.ceil(len(x) / FITTED)]).to(model.device)
        known = references(model.process, model, some, edges)
        some, self.linear, self.clusters = known.x, known.linear, known.clusters
        self.levels, self.log_frequency = known.levels, known.log_frequency
        self.note = known.note
        image = len(model.shape) == 3 and model.shape[1] * model.shape[2] > 1
        self.roughness = GradientFeatures(some) if image else None
        few = some[:: math.ceil(len(some) / SCALED)]
        phi = torch.cat([self._phi(part) for part in few.split(256)])
        spread = phi.std(0, correction=0)
        self.centre, self.spread = phi.mean(0), torch.where(spread > 0, spread, 1.0)

    @property
    def variates(self) -> int:
        """G, the number of columns of `within`."""
        parts = self.linear, self.log_frequency, self.others
        return 2 * sum(p is not None for p in parts) + (self.others is not None)

    @property
    def lends(self) -> bool:
        """Whether a draw is a better context for others of its example the nearer they are."""
        return self.levels is not None and self.log_frequency is not None

    @property
    def features(self) -> int:
        """1 + F, the number of columns of `between`."""
        return 1 + self.centre.shape[-1]

    @property
    def others(self) -> GaussianMixtureEnsemble | None:
        """The clusters if they are a source of contexts, else None."""
        return self.clusters if self.levels and self.log_frequency is not None else None

    def said(self, draw: TermDraw) -> ContextLogits:
        """Return the contexts of the dimensions at a draw, each without its own evidence."""
        return ContextLogits(self._by_clusters(draw), self._by_network(draw))

    def _by_clusters(self, draw: TermDraw) -> Tensor | None:
        if self.others is None or self.levels is None:
            return None
        z, alpha = draw.z.double().flatten(1), self.model.process.alpha(draw.term.t)
        odds = self.others.odds(z, alpha, self.levels.values).view(*draw.x.shape, -1)
        return (odds + self.levels.log_frequency).log_softmax(-1)

    def _by_network(self, draw: TermDraw) -> Tensor | None:
        if self.log_frequency is None:
            return None
        predicted, process = draw.prediction.levels, self.model.process
        if self.levels is not None and predicted is not None:
            evidence = level_evidence(
                draw.z, self.levels.values.to(draw.z), draw.term.t, self.model.process
            )
            return (predicted.log_probs - evidence).log_softmax(-1).clamp(min=LEAST)
        if process.mask is not None:
            hidden = (draw.z == process.mask)[..., None]
            return torch.where(hidden, draw.prediction.e_hat.clamp(min=LEAST), self.log_frequency)
        return None

    def within(
        self, draw: TermDraw, said: ContextLogits, lender: ContextLogits, alone: Tensor
    ) -> Tensor:
        """Return numbers of mean zero given x and t, shape (B, G).

        Args:
            draw: whose cost they approximate.
            said: contexts at this draw, of which that of the clusters is used.
            lender: contexts at a neighbouring draw of each example; `NO_CONTEXT` for none. The
                difference of the clusters' contexts predicts that of the network's.
            alone: mask of the examples without a neighbouring draw, shape (B,). Their numbers
                are in columns of their own, as they need other coefficients.
        """
        columns, context, lent = [], self.log_frequency, lender.by_network
        if context is not None and lent is not None:
            context = torch.where(over(alone, lent).bool(), context, lent)
        if self.linear is not None:
            columns.append(self.linear.within(self.model, draw))
        if self.levels is not None and context is not None:
            columns.append(self.levels.within(self.model, draw, context))
        elif context is not None:
            columns.append(self._hidden(draw, context))
        told, told_lender = said.by_clusters, lender.by_clusters
        if self.levels is not None and told is not None:
            columns.append(self.levels.within(self.model, draw, told))
        if not columns:
            return draw.cost.new_zeros(len(draw.x), 0)
        both = torch.stack(columns, 1)
        which = alone[:, None]
        columns = [torch.where(which, both, 0.0), torch.where(which, 0.0, both)]
        if self.levels is not None and told is not None:
            moved = torch.zeros_like(both[:, :1])
            if lent is not None and told_lender is not None:
                here = (lent + told - told_lender).log_softmax(-1)
                moved = self.levels.within(self.model, draw, here)[:, None]
            columns.append(torch.where(which, 0.0, moved))
        return torch.cat(columns, 1)

    def _hidden(self, draw: TermDraw, context: Tensor) -> Tensor:
        """Return w Σ_i (1[x_i masked] - (1-α_t)) (-log P(x_i)), (B,), with log P = context."""
        process = self.model.process
        assert process.mask is not None
        surprise = of_level(-context, draw.x)
        share = process.log_one_minus_alpha(draw.term.t).exp()
        hidden = (draw.z == process.mask).double() - over(share, surprise)
        return draw.term.mask_weight(process) * (hidden * surprise).flatten(1).sum(1)

    def between(self, x: Tensor) -> Tensor:
        """Return φ of each example and cell, (B, cells, 1 + F): 1, then standardised numbers."""
        phi = (self._phi(x) - self.centre) / self.spread
        # any numbers are valid, so those of an outlier are moved into the usual range
        phi = phi.nan_to_num(0.0).clamp(-MOST, MOST)
        return torch.cat([torch.ones_like(phi[..., :1]), phi], -1).cpu()

    def _phi(self, x: Tensor) -> Tensor:
        # each of shape (B, cells), or (B, 1) if equal for all cells
        columns = [torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)]
        if self.roughness is not None:
            columns += self.roughness(x).split(1, 1)
        if self.levels is None and self.log_frequency is not None:
            columns.append(of_level(-self.log_frequency, x).flatten(1).sum(1, keepdim=True))
        if self.linear is not None:
            columns.append(_cells(self.linear.divergence(self.model, x, self.edges)))
        if self.clusters is not None:
            features = self.clusters.features(gaussian(self.model).embed(x).flatten(1).double())
            columns += features.split(1, 1)
        if self.levels is not None:
            surprise = of_level(-self.levels.log_frequency, x).flatten(1).sum(1, keepdim=True)
            columns.append(_cells(self.levels.divergence(x), surprise))
        whole = [c.expand(-1, len(self.edges)) for c in columns[1:] or columns]
        return torch.stack(whole, 2)


class NoControlVariates(ControlVariates):
    """No control variates."""

    linear = clusters = levels = log_frequency = None
    note = ""
    features = 1

    def __init__(self, model: Model, edges: Tensor) -> None:
        self.model, self.edges = model, edges

    @override
    def between(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), len(self.edges), 1, dtype=torch.float64)


def _cells(divergence: Tensor, surprise: Tensor | float = 0.0) -> Tensor:
    """Return the reconstruction and the differences of D, (B, cells), from D at the edges."""
    first = surprise - divergence[:, :1]
    return torch.cat([first, divergence[:, :-1] - divergence[:, 1:]], 1)


SCALES = (1 / 16, 1.0, 16.0)  # scales s, in mean absolute differences of neighbouring pixels


class GradientFeatures:
    """Σ log(1 + |d|/s) over an image, at a few scales s, for two kinds of differences d.

    They resemble the bits of a coder that predicts a pixel from the one beside or above it, and of
    one that uses both and the corner. For photographs, they follow the bits of a network more
    closely than any of the references.

    Args:
        x: images, shape (N, C, H, W), of more than one pixel.
    """

    def __init__(self, x: Tensor) -> None:
        neighbours, _ = self._differences(x)
        self.mean = neighbours.mean().clamp(min=1e-300)

    @staticmethod
    def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return |differences| of neighbours, and of a pixel from left + above - corner."""
        x = x.double()
        down, right = x.diff(dim=2), x.diff(dim=3)
        neighbours = torch.cat([down.flatten(1), right.flatten(1)], 1)
        return neighbours.abs(), down.diff(dim=3).flatten(1).abs()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of each image, shape (B, 2 len(SCALES))."""
        kinds = [d / self.mean for d in self._differences(x)]
        return torch.stack([torch.log1p(d / s).sum(1) for d in kinds for s in SCALES], 1)
