r"""Control variates: numbers of known mean that correlate with the costs of the network.

A draw of a term of the bound costs c(x, z), one network call. Two kinds of numbers reduce its
variance and leave its expectation unchanged:

    within    r(x, z) - E[ r(x, z) | x, t ], for a reference r that needs no network
    between   φ(x), any numbers of the example alone, for each stratum of the times

The references, for e = embed(x) and z_t = √α_t e + √(1-α_t) ε:

    linear    the denoiser of N(μ, Σ), mean and covariance of the data: a quadratic in ε
    levels    the Bayes denoiser of independent dimensions whose levels have log-probabilities o.
              The cost of a dimension depends on its own ε alone, so E is one integral over ε
    symbols   the same for masks: whether a symbol is masked is one Bernoulli variable; and for
              symbols that noise replaces: which of K it becomes. Rare early changes cost much, so
              that few draws without the variate would miss them, and their spread as well

o, the context, may be anything that is independent of the dimension's own ε: the log-frequencies
of the data; these plus the evidence of all other dimensions of z under mixtures of Gaussians; or
the network's prediction at a neighbouring draw of the same example, with noise of its own, also
corrected by the difference between the mixtures' evidence at this z and at that one. At low noise
this removes nine tenths of the variance.

For the exact denoiser of any distribution p, the diffusion term between times s < t is
D(s) - D(t), D(t) = KL( q(z_t|x) ‖ p(z_t) ), for each single x, by the chain rule for the KL of the
two chains. These differences are φ of a stratum; features of e from the mixtures of Gaussians, and
of the gradients of an image, are φ of all strata.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, singledispatch

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.data.schema import as_examples
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.gaussian_mixture import FEWEST, GaussianMixtureEnsemble
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import log_frequencies
from nelbo.diffusion.prediction import level_evidence
from nelbo.diffusion.process import ForwardProcess, SymbolProcess
from nelbo.diffusion.terms import TermDraw
from nelbo.diffusion.uniform import UniformDiffusion
from nelbo.evaluation.intervals import FAR, apart
from nelbo.evaluation.price import PASS, SHARE, Budget, Work
from nelbo.evaluation.reference_denoisers import (
    NODES,
    TABLE,
    LevelReference,
    Linear,
    gaussian,
    of_level,
    rows_cached,
)
from nelbo.evaluation.time_density import FITTED, WIDEST

#: smallest log-probability of a context, also for impossible levels
LEAST = math.log(torch.finfo(torch.float64).eps)
FINEST = 64  # levels up to which contexts pay off, as they need the probability of each level


class ControlVariate:
    """Numbers that correlate with the costs of a model; none, unless a subclass has some."""

    #: the number of columns of `within`
    columns = 0
    #: whether a neighbouring draw gives them a context
    paired = False
    #: coefficient of each column of a pair where no pilot tells a better one
    usual = 0.0
    #: a sentence on what is left out
    note = ""

    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        """Return numbers of mean zero given x and t for each draw, shape (n, B, columns).

        Args:
            draws: one draw of each example, or two neighbouring ones.
        """
        return torch.stack([draw.cost.new_zeros(len(draw.x), 0) for draw in draws])

    def between(self, x: Tensor) -> list[Tensor]:
        """Return numbers of the examples alone, (B, S) for each stratum or (B, 1) for all."""
        return []


class LinearVariate(ControlVariate):
    """Costs of the denoiser of N(μ, Σ)."""

    columns = 1

    def __init__(self, model: Model, e: Tensor, edges: Tensor) -> None:
        self.model, self.edges, self.reference = model, edges, Linear(e)

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        return torch.stack([self.reference.within(self.model, d)[:, None] for d in draws])

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        return [_strata(self.reference.divergence(self.model, x, self.edges))]


class LevelVariates(ControlVariate):
    """Costs of the Bayes denoiser of independent levels, given a context.

    Args:
        model: of levels.
        x: examples to fit to.
        edges: of the strata.
        mixtures: of the embedded examples, as a source of contexts.
    """

    def __init__(
        self, model: Model, x: Tensor, edges: Tensor, mixtures: GaussianMixtureEnsemble | None
    ) -> None:
        self.model, self.mixtures = model, mixtures
        self.reference = LevelReference(model, x, edges)
        self.paired = model.process.codes <= FINEST
        self.columns = 0 if not self.paired else 1 if mixtures is None else 2

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        if not self.columns:
            return super().within(draws)
        contexts = [self.reference.log_frequency] * len(draws)
        if len(draws) == 2:
            contexts = [self._by_network(draw) for draw in reversed(draws)]
        columns = [contexts]
        if self.mixtures is not None:
            moved = [self._by_mixtures(self.mixtures, draw) for draw in draws]
            moves = zip(contexts, moved, reversed(moved), strict=True)
            columns = [moved, [(o + here - there).log_softmax(-1) for o, here, there in moves]]
        found = [
            [self.reference.within(self.model, draw, o) for draw, o in zip(draws, of, strict=True)]
            for of in columns
        ]
        return torch.stack([torch.stack(column) for column in found], -1)

    def _by_network(self, draw: TermDraw) -> Tensor:
        """Return the log-probabilities of the network without the dimension's own evidence."""
        predicted, values = draw.prediction.levels, self.reference.values
        if predicted is None:
            return self.reference.log_frequency
        evidence = level_evidence(draw.z, values.to(draw.z), draw.term.t, self.model.process)
        return (predicted.log_probs - evidence).log_softmax(-1).clamp(min=LEAST)

    def _by_mixtures(self, mixtures: GaussianMixtureEnsemble, draw: TermDraw) -> Tensor:
        """Return log-frequencies plus the evidence of all other dimensions of z."""
        z, alpha = draw.z.double().flatten(1), self.model.process.alpha(draw.term.t)
        odds = mixtures.odds(z, alpha, self.reference.values).view(*draw.x.shape, -1)
        return (odds + self.reference.log_frequency).log_softmax(-1)

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        surprise = of_level(-self.reference.log_frequency, x).flatten(1).sum(1, keepdim=True)
        return [_strata(self.reference.divergence(x), surprise)]


class SymbolVariate(ControlVariate):
    """Costs of symbols that noise changed, given a context: Σ_i c_i(z_i) - E[ c_i(z_i)|x ].

    The context is log P(x_i = k) of each place, by the network at a neighbouring draw.

    Args:
        model: of symbols.
        x: examples to fit to.
    """

    columns, paired, usual = 1, True, 1.0

    def __init__(self, model: Model, x: Tensor) -> None:
        self.model, self.absent = model, model.process.codes
        self.log_frequency = log_frequencies(x.cpu(), model.process.codes).to(x.device)

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        contexts = [self.log_frequency] * len(draws)
        if len(draws) == 2:
            contexts = [self._by_network(draw) for draw in reversed(draws)]
        pairs = zip(draws, contexts, strict=True)
        return torch.stack([self._centred(draw, context)[:, None] for draw, context in pairs])

    def _by_network(self, draw: TermDraw) -> Tensor:
        return draw.prediction.e_hat.clamp(min=LEAST)

    def _centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        """Return Σ_i c_i(z_i) - E[ c_i(z_i)|x ], (B,)."""
        raise NotImplementedError

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        return [self._surprise(self.log_frequency, x).flatten(1).sum(1, keepdim=True)]

    def _surprise(self, log_p: Tensor, x: Tensor) -> Tensor:
        """Return -log p of the symbols, shape of x; 0 where a shorter text has none."""
        return torch.where(x == self.absent, 0.0, of_level(-log_p, x.clamp(max=self.absent - 1)))


class MaskVariate(SymbolVariate):
    """The same for masks, w Σ_i (1[masked] - its probability) c_i with c_i = -log P(x_i)."""

    @override
    def _by_network(self, draw: TermDraw) -> Tensor:
        hidden = (draw.z == self.absent)[..., None]  # the mask has the code of what is absent
        return torch.where(hidden, super()._by_network(draw), self.log_frequency)

    @override
    def _centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        process, surprise = self.model.process, self._surprise(context, draw.x)
        share = process.log_one_minus_alpha(draw.term.t).exp()
        changed = (draw.z != draw.x).double() - over(share, surprise)
        return draw.term.mask_weight(process) * (changed * surprise).flatten(1).sum(1)


class ReplacedVariate(SymbolVariate):
    """The same for uniform-state diffusion, where the symbol k costs c_i(k) as that of z_t."""

    @override
    def _by_network(self, draw: TermDraw) -> Tensor:
        # certain where a symbol shows, which costs nothing
        return draw.prediction.symbols(draw.z, None).log_probs.clamp(min=LEAST)

    @override
    def _centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        process = UniformDiffusion.require(self.model.process, "symbols that noise replaces")
        context = context.expand(*draw.x.shape, -1)
        found = []
        for rows in torch.arange(len(draw.x), device=context.device).split(
            max(1, TABLE // (context[0].numel()))
        ):
            x, z, t = draw.x[rows].long(), draw.z[rows].long(), draw.term.t[rows]
            s = None if draw.term.before is None else draw.term.before[rows]
            cost = process.costs_of_symbols(x, context[rows], s, t)  # (K, rows, ...)
            each = torch.arange(len(cost), device=x.device).view(-1, *(1,) * x.ndim)
            q = process.marginal(x, t).base_dist.log_prob(each.expand_as(cost)).exp()
            mean = torch.where(q > 0, q * cost, 0.0).sum(0)
            own = cost.gather(0, z.clamp(max=self.absent - 1)[None])[0]
            found.append(torch.where(x == self.absent, 0.0, own - mean).flatten(1).sum(1))
        return torch.cat(found)


class MixtureFeatures(ControlVariate):
    """Densities of the embedded examples under mixtures of Gaussians."""

    def __init__(self, model: Model, mixtures: GaussianMixtureEnsemble) -> None:
        self.model, self.mixtures = model, mixtures

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        e = gaussian(self.model).embed(x).flatten(1).double()
        return list(self.mixtures.features(e).split(1, 1))


@dataclass(frozen=True)
class Candidate:
    """A control variate before it is fitted, with its price.

    Args:
        name: for the note where it is left out.
        work: passes over numbers, roughly, as measured.
        make: fits it.
    """

    name: str
    work: Work
    make: Callable[[], ControlVariate]


@singledispatch
def variates_of(
    process: ForwardProcess, model: Model, x: Tensor, edges: Tensor
) -> list[Candidate]:
    """Return the control variates of a model's process, to be fitted to examples x, (N, ...).

    Those that explain most for their price are first. A class of processes has none unless
    `@variates_of.register` adds them.
    """
    return []


@variates_of.register
def _(process: GaussianDiffusion, model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    count, dims, strata, levels = len(x), model.dims, len(edges), process.codes
    whole = dims <= WIDEST  # with covariances
    turn = dims**2 / PASS * 4 if whole else 0.0  # into eigenvectors
    e = cache(lambda: process.embed(x).flatten(1).double())
    found = [
        Candidate(
            "the denoiser of a Gaussian",
            Work(count * (5 * dims + turn), 8 * dims + turn, 3 * dims + 2 * turn),
            lambda: LinearVariate(model, e(), edges),
        )
    ]
    mixtures = cache(lambda: GaussianMixtureEnsemble(e()))
    clustered = whole and count >= FEWEST
    odds = dims * (300 + dims) if clustered else 0
    if clustered:
        found.append(
            Candidate(
                "mixtures of Gaussians",
                Work(count * odds, odds, 0.0),
                lambda: MixtureFeatures(model, mixtures()),
            )
        )
    # with sixteen bits, one column of the table would not fit into memory
    if levels and levels**2 <= TABLE:
        integrals = min(TABLE, dims * levels**2 * strata)
        contexts = (NODES + 1) * levels * dims if levels <= FINEST else 0
        found.append(
            Candidate(
                "the denoiser of independent levels",
                Work(
                    2 * NODES * integrals + 9 * count * dims,
                    6 * dims,
                    2 * contexts * (1 + clustered) + odds * (contexts > 0),
                ),
                lambda: LevelVariates(model, x, edges, mixtures() if clustered else None),
            )
        )
    return found


@variates_of.register(MaskedDiffusion)
@variates_of.register(UniformDiffusion)
def _(process: SymbolProcess, model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    free = Work(0, 0, 0)  # they take no more than the normalisation of the logits
    if model.dims * process.codes > TABLE:
        none = ControlVariate()
        none.note = (
            f"no control variates: their table of {model.dims} times {process.codes} symbols"
            f" would exceed {TABLE} numbers"
        )
        return [Candidate("none", free, lambda: none)]
    kind = ReplacedVariate if process.mask is None else MaskVariate
    return [Candidate("costs of symbols", free, lambda: kind(model, x))]


class ControlVariates:
    """The control variates of a model's costs, computed without its network.

    Args:
        model: the model.
        x: examples to fit to, of the distribution of those to be measured, (N, ...); without
            them, there are no control variates.
        edges: times between which the strata lie, the first being that of z_1; shape (S,).
        pairs: let draws have two network calls, each the context of the other, where it helps.
        budget: what they may cost; anything where left out.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor | None,
        edges: Tensor,
        pairs: bool = True,
        budget: Budget | None = None,
    ) -> None:
        self.model, self.edges = model, edges.to(model.device)
        #: network calls of a draw
        self.calls = 1
        self.parts: list[ControlVariate] = []
        self.left_out: list[str] = []
        self.centre = self.spread = torch.ones(0, dtype=torch.float64, device=model.device)
        if x is None:
            return
        some = as_examples(x[:: math.ceil(len(x) / FITTED)]).to(model.device)
        if model.process.has_flow:
            # a single outlier would dominate the fit
            e = model.process.embed(some).flatten(1).double()
            some = some[~apart((e - e.median(0).values).abs().amax(1))]
        spent = 0.0
        for candidate in _candidates(model, some, self.edges):
            price = 0.0 if budget is None else budget.price(candidate.work)
            if budget is None or budget.allows(spent + price):
                self.parts.append(candidate.make())
                spent += price
            else:
                self.left_out.append(candidate.name)
        self.calls += pairs and any(part.paired for part in self.parts)
        phi = torch.cat([self._phi(part) for part in some.split(256)])
        self.centre = phi.mean(0)
        spread = (phi - self.centre).square().mean(0).sqrt()
        self.spread = torch.where(spread > 0, spread, 1.0)

    @property
    def note(self) -> str:
        """A sentence on what is left out."""
        notes = [part.note for part in self.parts if part.note]
        if self.left_out:
            notes.append(
                f"control variates were left out, as they would take more than {SHARE:.1%} of the"
                f" operations of the network: {', '.join(self.left_out)};"
                " --variates or variates=True includes them"
            )
        return "; ".join(notes)

    @property
    def columns(self) -> int:
        """G, the number of columns of `within`."""
        return sum(part.columns for part in self.parts)

    @property
    def usual(self) -> Tensor:
        """Coefficients of the columns of `within` without a pilot, (G,): 0 for single calls."""
        known = self.calls > 1
        each = [torch.full((part.columns,), known * part.usual) for part in self.parts]
        return torch.cat([torch.zeros(0), *each]).double()

    @property
    def features(self) -> int:
        """1 + F, the number of columns of `between`."""
        return 1 + self.centre.shape[-1]

    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        """Return numbers of mean zero given x and t, (n, B, G), for one or two draws (n)."""
        none = ControlVariate().within(draws)
        return torch.cat([none, *(part.within(draws) for part in self.parts)], 2)

    def between(self, x: Tensor) -> Tensor:
        """Return φ of each example and stratum, (B, S, 1 + F): 1, then standardised numbers."""
        phi = (self._phi(x) - self.centre) / self.spread
        # any numbers are valid, so those of an outlier are moved into the usual range
        phi = phi.nan_to_num(0.0).clamp(-FAR, FAR)
        return torch.cat([torch.ones_like(phi[..., :1]), phi], -1).cpu()

    def _phi(self, x: Tensor) -> Tensor:
        columns = [column for part in self.parts for column in part.between(x)]
        if not columns:
            return torch.zeros(len(x), len(self.edges), 0, dtype=torch.float64, device=x.device)
        return torch.stack([column.expand(-1, len(self.edges)) for column in columns], 2)


def _candidates(model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    """Return all control variates of a model, to be fitted to examples x."""
    found = variates_of(model.process, model, x, edges)
    if len(model.shape) == 3 and model.shape[1] * model.shape[2] > 1:
        work = Work(6 * min(len(x), 256) * model.dims, 3 * model.dims, 0.0)
        gradients = Candidate("gradients of the images", work, lambda: GradientFeatures(x))
        return [gradients, *found]
    return found


def _strata(divergence: Tensor, surprise: Tensor | float = 0.0) -> Tensor:
    """Return the reconstruction and the differences of D, (B, S), from D at the edges."""
    first = surprise - divergence[:, :1]
    return torch.cat([first, divergence[:, :-1] - divergence[:, 1:]], 1)


class GradientFeatures(ControlVariate):
    """Σ log(1 + |d|/s) over an image for two kinds of differences d, s the mean of the first.

    They resemble the bits of a coder that predicts a pixel from the one beside or above it, and of
    one that uses both and the corner. For photographs, they follow the bits of a network more
    closely than any of the references.

    Args:
        x: images, shape (N, C, H, W), of more than one pixel.
    """

    def __init__(self, x: Tensor) -> None:
        neighbours, _ = self._differences(x[:256])  # a scale: some examples do
        self.mean = neighbours.mean().clamp(min=1e-300)

    @staticmethod
    def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return |differences| of neighbours, and of a pixel from left + above - corner."""
        x = x.double()
        down, right = x.diff(dim=2), x.diff(dim=3)
        neighbours = torch.cat([down.flatten(1), right.flatten(1)], 1)
        return neighbours.abs_(), down.diff(dim=3).flatten(1).abs_()

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        # parts that stay in the cache
        parts = [
            torch.stack([(d / self.mean).log1p_().sum(1) for d in self._differences(part)], 1)
            for part in x.split(rows_cached(x))
        ]
        return list(torch.cat(parts).split(1, 1))
