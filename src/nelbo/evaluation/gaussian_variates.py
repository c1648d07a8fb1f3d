"""Control variates of Gaussian diffusion: reference denoisers whose costs have a known mean.

See `control_variates`. None needs a network of its own.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.diffusion.distributions import kl
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.gaussian_mixture import FEWEST, RANK, GaussianMixtureEnsemble
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import log_frequencies
from nelbo.diffusion.prediction import LevelTable, level_evidence
from nelbo.diffusion.terms import DiffusionTerm, ReconstructionTerm, TermDraw
from nelbo.evaluation.price import CALLS, PASS, Work
from nelbo.evaluation.variate import (
    HELD,
    LEAST,
    TABLE,
    WIDEST,
    Candidate,
    ControlVariate,
    OfDraws,
    OfExamples,
    of_symbol,
    rows_cached,
    together,
    variates_of,
)

NODES, REACH = 8, 6.0  # of the integral over ε, from -REACH to REACH
TOGETHER = 2**17  # numbers of the table's integrals that are computed together, about
OF_A_COMPONENT = 70  # passes over a number for a component of a mixture
FINEST = 64  # levels up to which contexts pay off, as they need the probability of each level


class LinearVariate(ControlVariate):
    """Costs of the denoiser of N(μ, Σ), in the eigenvectors of Σ.

    Above WIDEST dimensions Σ = U Λ Uᵀ, where U are the eigenvectors along each axis: along the
    columns of an image, and along the rows of all its channels. An axis that is longer still is
    left as it is. Then only the numbers of examples are used: those of draws take too long.

    Args:
        model: the model.
        x: examples with mean μ and covariance Σ, (N, ...).
        edges: times between the strata.
    """

    def __init__(self, model: Model, x: Tensor, edges: Tensor) -> None:
        self.process, self.edges = gaussian(model), edges
        self.sizes = axes_of(model)
        self.usual = (0.0,) if model.dims <= WIDEST else ()
        e = self._embedded(x)
        self.mean = e.mean(0)
        centred = e - self.mean
        self.vectors: list[Tensor | None] = []
        for axis, size in enumerate(self.sizes, 1):
            rows = centred.view(-1, *self.sizes).movedim(axis, -1).reshape(-1, size)
            known = size <= WIDEST
            self.vectors.append(torch.linalg.eigh(rows.T @ rows)[1] if known else None)
        variance = self._rotated(centred).square().mean(0)
        self.variance = variance + 1e-6 * variance.mean() + 1e-12

    def _embedded(self, x: Tensor) -> Tensor:
        return self.process.embed(x).flatten(1).double()

    def _rotated(self, v: Tensor) -> Tensor:
        *first, last = self.vectors
        v = v.view(-1, *self.sizes)
        for vectors in first:
            v = v if vectors is None else vectors.T @ v
        return (v if last is None else v @ last).flatten(1)

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        """Return w (‖e - ê‖² - its mean), shape (n, B, columns)."""
        if not self.columns:
            return super().within(draws)
        found = []
        for draw in draws:
            parts = zip(
                *(v.split(rows_cached(draw.x)) for v in (draw.x, draw.z, draw.term.t)),
                strict=True,
            )
            error = torch.cat([self._centred(*part) for part in parts])
            found.append(draw.term.error_weight(self.process) * error)
        return torch.stack(found)[..., None]

    def _centred(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return ‖e - ê‖² less its mean given e, for examples x and their z at times t; (B,).

        With a = e - μ, z - √α e of mean square 1-α, and r = λ/(α λ + 1-α) in the eigenvectors,
        e - ê = (1 - α r) a - u,  u = √α r (z - √α e).
        """
        e, alpha = self._embedded(x), self.process.alpha(t)[:, None]
        noise = self.process.log_one_minus_alpha(t).exp()[:, None]
        a = self._rotated(e - self.mean)
        u = self._rotated(torch.addcmul(z.double().flatten(1), alpha.sqrt(), e, value=-1))
        # in place, as these are passes over all numbers beside one call of the network
        r = (alpha * self.variance).add_(noise).reciprocal_().mul_(self.variance)
        mean = (alpha * noise)[:, 0] * torch.einsum("bd,bd->b", r, r)
        u = u.mul_(r).mul_(alpha.sqrt())
        other = r.mul_(-2 * alpha).add_(2).mul_(a)
        return torch.einsum("bd,bd->b", u, u - other) - mean

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        return [_strata(self.divergence(x))]

    def divergence(self, x: Tensor) -> Tensor:
        """Return D at each of the edges, shape (B, S)."""
        a, t = self._rotated(self._embedded(x) - self.mean), self.edges
        alpha, noise = self.process.alpha(t), self.process.log_one_minus_alpha(t).exp()
        total = alpha * self.variance[:, None] + noise  # (D, S)
        ratio = noise / total
        # one product of matrices: at each time alone, this costs as much as calls of a network
        return ((ratio - 1 - ratio.log()).sum(0) + a.square() @ (alpha / total)) / 2


class LevelVariates(ControlVariate):
    """Costs of the Bayes denoiser of independent levels, given a context.

    Args:
        model: of levels.
        x: examples that give the frequencies of the levels, (N, ...).
        edges: times between the strata.
    """

    #: of the embedded examples, as a source of contexts
    mixtures: GaussianMixtureEnsemble | None = None

    def __init__(self, model: Model, x: Tensor, edges: Tensor) -> None:
        self.model, self.process = model, gaussian(model)
        self.values, count = self.process.embedding.values, model.process.codes
        self.paired = count <= FINEST
        # the network's own context explains its costs as they are; the mixtures' is another's
        known = float(model.head.level_values is not None)
        self.usual = (known,) if self.paired else ()
        log_frequency = log_frequencies(x.cpu(), count).to(self.values.device)
        self.group, log_group = self._group(log_frequency.flatten(0, -2), len(edges))
        self.log_frequency = log_group[self.group].reshape(log_frequency.shape)
        self.log_group, self.edges = log_group, edges

    def moved_by(self, mixtures: GaussianMixtureEnsemble) -> "LevelVariates":
        """Return the same with contexts that mixtures of the embedded examples move."""
        other = copy.copy(self)
        other.mixtures, other.usual = mixtures, (0.0, *self.usual)
        return other

    @cached_property
    def table(self) -> Tensor:
        """D of each group of dimensions, level and edge."""
        count, log_group = self.model.process.codes, self.log_group
        levels = torch.arange(count, device=self.values.device)[:, None].expand(-1, len(log_group))
        columns = []
        for some in self.edges.split(max(1, TOGETHER // log_group.numel() // count)):
            every = levels.expand(len(some), *levels.shape).flatten(0, 1)
            found = self._divergence(every, log_group, some.repeat_interleave(count))
            columns.append(found.view(len(some), *levels.shape))
        return torch.cat(columns).permute(2, 1, 0).contiguous()

    def _group(self, log_frequency: Tensor, edges: int) -> tuple[Tensor, Tensor]:
        """Let dimensions of similar mean level share frequencies if a full table is too large."""
        dims, count = log_frequency.shape
        groups = _groups(dims, count, edges)
        order = (log_frequency.exp() @ self.values).argsort()
        group = torch.empty(dims, dtype=torch.long, device=order.device)
        group[order] = torch.arange(dims, device=order.device) * groups // dims
        shared = torch.zeros(groups, count, dtype=torch.float64, device=order.device)
        shared.index_add_(0, group, log_frequency.exp())
        return group, (shared / shared.sum(1, keepdim=True)).log()

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        if not self.columns:
            return super().within(draws)
        contexts = [self.log_frequency] * len(draws)
        if len(draws) == 2:
            contexts = [self._by_network(draw) for draw in reversed(draws)]
        columns = [contexts]
        if self.mixtures is not None:
            moved = [self._by_mixtures(self.mixtures, draw) for draw in draws]
            moves = zip(contexts, moved, reversed(moved), strict=True)
            columns = [moved, [(o + here - there).log_softmax(-1) for o, here, there in moves]]
        found = [
            [self.centred(draw, o) for draw, o in zip(draws, of, strict=True)] for of in columns
        ]
        return torch.stack([torch.stack(column) for column in found], -1)

    def _by_network(self, draw: TermDraw) -> Tensor:
        """Return the log-probabilities of the network without the dimension's own evidence."""
        predicted = draw.prediction.levels
        if predicted is None:
            return self.log_frequency
        evidence = level_evidence(draw.z, self.values.to(draw.z), draw.term.t, self.process)
        return (predicted.log_probs - evidence).log_softmax(-1).clamp(min=LEAST)

    def _by_mixtures(self, mixtures: GaussianMixtureEnsemble, draw: TermDraw) -> Tensor:
        """Return log-frequencies plus the evidence of all other dimensions of z."""
        z, alpha = draw.z.double().flatten(1), self.process.alpha(draw.term.t)
        odds = mixtures.odds(z, alpha, self.values).view(*draw.x.shape, -1)
        return (odds + self.log_frequency).log_softmax(-1)

    def centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        """Return r - E r, (B,), with the log-probabilities `context`, shape (..., K)."""
        posterior = self._posterior(context.expand(*draw.x.shape, -1), draw.term.t)
        if isinstance(draw.term, ReconstructionTerm):
            return self._without_mean(
                lambda z: -of_symbol(posterior(z).log_softmax(-1), draw.x), draw
            )
        if isinstance(draw.term, DiffusionTerm) and self.model.step.mixes_levels:
            log_probs = posterior(draw.z.double()).log_softmax(-1)
            return self._of_mixture(draw, draw.term.s, log_probs, context)
        e = self.process.embed(draw.x)
        square = self._without_mean(
            lambda z: (e - mean_level(posterior(z), self.values)).square(), draw
        )
        return draw.term.error_weight(self.process) * square

    def _of_mixture(self, draw: TermDraw, s: Tensor, log_probs: Tensor, context: Tensor) -> Tensor:
        """Return KL( q(z_s|z_t,x) ‖ mixture kernel ), with the draw's noise, - [D(s) - D(t)]."""
        t, z = draw.term.t, draw.z
        prediction = LevelTable(log_probs.exp() @ self.values.to(z), log_probs)
        q = self.process.posterior(z, self.model.embed(draw.x), s, t)
        cost = kl(q, self.model.step(prediction, z, s, t, self.process), draw.noise)
        low, high = (self._divergence(draw.x, context, u) for u in (s, t))
        return cost - (low - high).flatten(1).sum(1)

    def _posterior(self, context: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
        """Return z_t -> context_k + log N(z; √α_t v_k, 1-α_t) + z²/(2 (1-α_t)), (..., K)."""
        process, values = self.process, self.values
        of_z = (process.log_alpha(t) / 2 - process.log_one_minus_alpha(t)).exp()
        base = context.double() - over((-process.schedule(t)).exp() / 2, context) * values.square()
        return lambda z: torch.addcmul(base, (over(of_z, z) * z)[..., None], values)

    def _without_mean(self, cost: Callable[[Tensor], Tensor], draw: TermDraw) -> Tensor:
        """Return Σ_i cost_i(z) - E cost_i, (B,), if cost_i depends on the noise of i alone."""
        centred = cost(draw.z.double())
        q = self.process.marginal(self.model.embed(draw.x).double(), draw.term.t).base_dist
        for e, weight in _nodes(q.loc):
            centred = centred - weight * cost(q.loc + q.scale * e)
        return centred.flatten(1).sum(1)

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        surprise = of_symbol(-self.log_frequency, x).flatten(1).sum(1, keepdim=True)
        return [_strata(self.divergence(x), surprise)]

    def divergence(self, x: Tensor) -> Tensor:
        """Return D at the edges, shape (B, edges)."""
        _, levels, edges = self.table.shape
        table, places = self.table.reshape(-1, edges), self.group * levels
        found = []
        for part in x.flatten(1).split(rows_cached(x)):
            # how often each level is in each group: fewer numbers than one of D for each dimension
            counts = torch.zeros(len(part), len(table), dtype=table.dtype, device=x.device)
            counts.scatter_add_(1, places + part, torch.ones_like(part, dtype=table.dtype))
            found.append(counts @ table)
        return torch.cat(found)

    def _divergence(self, x: Tensor, context: Tensor, t: Tensor) -> Tensor:
        """Return D_i(t) = KL( q(z_t|x_i) ‖ Σ_k P_k q(z_t|v_k) ), log P = context, shape of x."""
        q = self.process.marginal(self.process.embed(x), t).base_dist
        posterior = self._posterior(context.expand(*x.shape, -1), t)
        total = torch.zeros_like(q.loc)
        for e, weight in _nodes(q.loc):
            z = q.loc + q.scale * e
            log_p = posterior(z).logsumexp(-1) - (z / q.scale).square() / 2
            total = total + weight * (-e.square() / 2 - log_p)
        return total


class MixtureFeatures(ControlVariate):
    """Densities of the embedded examples under mixtures of Gaussians."""

    def __init__(self, model: Model, mixtures: GaussianMixtureEnsemble) -> None:
        self.model, self.mixtures = model, mixtures

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        e = gaussian(self.model).embed(x).flatten(1).double()
        return list(self.mixtures.features(e).split(1, 1))


@variates_of.register
def _(process: GaussianDiffusion, model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    count, dims, strata, levels = len(x), model.dims, len(edges), process.codes
    whole = dims <= WIDEST  # with covariances of all dimensions
    calls, alike = CALLS / together(dims), CALLS / min(together(dims), count)
    sizes = [size for size in axes_of(model) if size <= WIDEST]
    # into eigenvectors: products of float64, which take twice the time of a network's
    turn = 4 * dims * sum(sizes) / PASS
    eigen = CALLS + sum(size**3 for size in sizes) / 16
    e = cache(lambda: process.embed(x).flatten(1).double())
    linear = cache(lambda: LinearVariate(model, x, edges))
    fit = eigen + count * (5 * dims + turn)  # in the price of both, as one may be left out
    name = "the denoiser of a Gaussian"
    found = [
        Candidate(
            f"{name} (examples)",
            Work(fit, example=alike + 8 * dims + turn),
            lambda: OfExamples(linear()),
        )
    ]
    if whole:
        draw = 3 * calls + 4 * dims + 3 * turn
        found.append(Candidate(f"{name} (draws)", Work(fit, draw=draw), lambda: OfDraws(linear())))
    mixtures = cache(lambda: GaussianMixtureEnsemble(e()))
    clustered = whole and count >= FEWEST
    components = sum(GaussianMixtureEnsemble.sizes(count, dims)) if clustered else 0
    odds = 14 * alike + OF_A_COMPONENT * components * dims
    step = OF_A_COMPONENT * components * (4 + min(dims, RANK))  # of EM, all steps
    fit = eigen + 10 * CALLS + count * step
    if clustered:
        features = Work(fit, example=odds)
        found.append(
            Candidate(
                "mixtures of Gaussians", features, lambda: MixtureFeatures(model, mixtures())
            )
        )
    # with sixteen bits, one column of the table would not fit into memory
    if levels and levels**2 <= TABLE:
        name, frequencies = "the denoiser of independent levels", 9 * count * dims
        independent = cache(lambda: LevelVariates(model, x, edges))
        integrals = _groups(dims, levels, strata) * levels**2 * strata
        work = Work(3 * NODES * integrals + frequencies, example=alike + 12 * dims)
        found.append(Candidate(f"{name} (examples)", work, lambda: OfExamples(independent())))
        if levels <= FINEST:
            contexts = 2 * (NODES + 1) * levels * dims * (1 + clustered)
            draw = 14 * calls + contexts + clustered * odds
            found.append(
                Candidate(
                    f"{name} (draws)",
                    Work(frequencies + clustered * fit, draw=draw),
                    lambda: OfDraws(
                        independent().moved_by(mixtures()) if clustered else independent()
                    ),
                    alone=model.head.level_values is not None,
                )
            )
    return found


def _strata(divergence: Tensor, surprise: Tensor | float = 0.0) -> Tensor:
    """Return the reconstruction and the differences of D, (B, S), from D at the edges."""
    first = surprise - divergence[:, :1]
    return torch.cat([first, divergence[:, :-1] - divergence[:, 1:]], 1)


def mean_level(logits: Tensor, values: Tensor) -> Tensor:
    """Return Σ_k v_k softmax_k(logits), shape (...), from logits (..., K), which are overwritten.

    In float64, and for few levels, this takes a third of the time of `softmax(-1) @ values`.
    """
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    sums = weights @ torch.stack([values, torch.ones_like(values)], 1)
    return sums[..., 0] / sums[..., 1]


def gaussian(model: Model) -> GaussianDiffusion:
    """Return the process of a model, which must be Gaussian for these references."""
    return GaussianDiffusion.require(
        model.process, "the reference denoiser needs a Gaussian process"
    )


def _groups(dims: int, levels: int, edges: int) -> int:
    """Return the number of groups of dimensions whose divergences are computed together."""
    return max(1, min(dims, HELD // (levels**2 * edges)))


def axes_of(model: Model) -> tuple[int, ...]:
    """Return the sizes of the one or two axes along which a covariance is estimated."""
    last = model.shape[-1]
    whole = model.dims <= WIDEST or last == model.dims
    return (model.dims,) if whole else (model.dims // last, last)


def _nodes(like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ε and weights of the trapezoid rule for N(0, 1), shape of `like`, float64.

    Each element has its own random shift, which makes the rule unbiased for any integrand, and the
    remaining errors of elements independent.
    """
    width = 2 * REACH / NODES
    shift = torch.rand(like.shape, dtype=torch.float64, device=like.device) - NODES / 2
    for i in range(NODES):
        e = width * (i + shift)
        yield e, width / math.sqrt(2 * math.pi) * torch.exp(-0.5 * e.square())
