r"""Control variates: numbers of known mean that vary as the costs of the network do.

A draw of a term of the bound costs c(x, z), one network call. Two kinds of number take variance
from it and leave its expectation alone:

    within    r(x, z) - E[ r(x, z) | x, t ], for a reference r that needs no network
    between   φ(x), any numbers of the example alone, for each cell of the times

The references, for e = embed(x) and z_t = √α_t e + √(1-α_t) ε:

    linear    the denoiser of N(μ, Σ), mean and covariance of the data: a quadratic in ε
    levels    the Bayes denoiser of independent dimensions whose levels have log-probabilities o.
              A dimension's cost depends on its own ε alone, so E is one integral over ε
    symbols   the same for masks: whether a symbol hides is one Bernoulli variable

o may be anything that is independent of the dimension's own ε: the log-frequencies of the data;
the same and what mixtures of Gaussians say of the dimension given all others of z (`clusters`);
or, where an example is drawn more than once, what the network said of the dimension at *another*
of its draws, maybe at quite another time. At low noise that takes nine tenths of the variance.

For the exact denoiser of any law p, the diffusion term between times s < t is D(s) - D(t),
D(t) = KL( q(z_t|x) ‖ p(z_t) ), for each single x: by the chain rule for the KL of the two chains.
Those differences are φ of a cell; what the mixtures of Gaussians say of e, and how rough an image
is, are φ of all cells.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._numerics import over
from nelbo.clusters import FEWEST, Clusters
from nelbo.data import as_examples
from nelbo.heads import LevelPrediction, LevelTable, Prediction, level_evidence, log_frequencies
from nelbo.model import Model
from nelbo.process import Absorbing, Gaussian, Levels
from nelbo.reverse import Mixture
from nelbo.roughness import Roughness
from nelbo.terms import Decode, Step, Term

FITTED = 4096  # examples whose mean, covariance and frequencies are taken
WIDEST = 1024  # dimensions up to which covariances are; beyond, variances
FINEST = 64  # levels up to which a reference of levels pays: it asks for each one's probability
NODES, REACH = 8, 6.0  # of the integral over ε, from -REACH to REACH
TABLE = 2**23  # integrands that the table of the levels may have


@dataclass(frozen=True)
class Draw:
    """One network call for each of B examples: z = z_t, what was predicted, and its cost (B,)."""

    x: Tensor
    term: Term
    z: Tensor
    prediction: Prediction
    state: Tensor  # of the generator after the call: the noise of a Monte Carlo KL
    cost: Tensor


def observe(model: Model, x: Tensor, term: Term) -> Draw:
    """Draw a term and keep what its network call saw."""
    seen: list[tuple[Tensor, Prediction, Tensor]] = []

    def keep(head: object, inputs: tuple[Tensor, Tensor], prediction: Prediction) -> None:
        seen.append((inputs[1], prediction, _generator(inputs[1])))

    handle = model.head.register_forward_hook(keep)
    try:
        cost = term.cost(model, x).double()
    finally:
        handle.remove()
    return Draw(x, term, *seen[-1], cost)


def _generator(z: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(z.device) if z.is_cuda else torch.get_rng_state()


@contextmanager
def _same_noise(draw: Draw) -> Iterator[None]:
    with torch.random.fork_rng([draw.z.device] if draw.z.is_cuda else []):
        if draw.z.is_cuda:
            torch.cuda.set_rng_state(draw.state, draw.z.device)
        else:
            torch.set_rng_state(draw.state)
        yield


class Linear:
    """The denoiser of N(μ, Σ) in the eigenvectors of Σ.

    Args:
        e: embedded examples, flat, shape (N, D); μ and Σ are theirs.
    """

    def __init__(self, e: Tensor) -> None:
        self.mean = e.mean(0)
        centred = e - self.mean
        if e.shape[1] <= WIDEST:
            variance, self.vectors = torch.linalg.eigh(centred.T @ centred / len(e))
        else:
            variance, self.vectors = centred.square().mean(0), None
        self.variance = variance.clamp(min=0) + 1e-6 * variance.mean() + 1e-12

    def _rotated(self, v: Tensor) -> Tensor:
        return v if self.vectors is None else v @ self.vectors

    def within(self, model: Model, draw: Draw) -> Tensor:
        """w (‖e - ê‖² - its mean), shape (B,)."""
        process, t = _gaussian(model), draw.term.t
        e, z = process.embed(draw.x).flatten(1), draw.z.double().flatten(1)
        alpha = process.alpha(t)[:, None]
        noise = process.log_one_minus_alpha(t).exp()[:, None]
        a = self._rotated(e - self.mean)
        n = self._rotated(z - alpha.sqrt() * e) / noise.sqrt()
        total = alpha * self.variance + noise
        of_a, of_n = noise / total, (alpha * noise).sqrt() * self.variance / total
        centred = of_n.square() * (n.square() - 1) - 2 * of_a * of_n * a * n
        return draw.term.error_weight(process) * centred.sum(1)

    def divergence(self, model: Model, x: Tensor, t: Tensor) -> Tensor:
        """D at each of the times t, shape (B, len(t))."""
        process = _gaussian(model)
        a = self._rotated(process.embed(x).flatten(1) - self.mean)
        columns = []
        for time in t:
            alpha, noise = process.alpha(time), process.log_one_minus_alpha(time).exp()
            total = alpha * self.variance + noise
            ratio = noise / total
            columns.append((ratio - 1 - ratio.log() + alpha * a.square() / total).sum(1) / 2)
        return torch.stack(columns, 1)


class LevelReference:
    """The Bayes denoiser of independent dimensions.

    Args:
        model: of levels.
        x: examples whose frequencies are taken, shape (N, ...).
        edges: times at which D is tabulated.
    """

    def __init__(self, model: Model, x: Tensor, edges: Tensor) -> None:
        embedding = _gaussian(model).embedding
        assert isinstance(embedding, Levels)
        self.values = embedding.values
        log_frequency = log_frequencies(x.cpu(), embedding.count).to(self.values.device)
        self.group, log_group = self._group(log_frequency.flatten(0, -2), len(edges))
        self.log_frequency = log_group[self.group].reshape(log_frequency.shape)
        #: D of each group of dimensions, level and edge
        self.table = self._tabulate(model, log_group, edges)

    def _group(self, log_frequency: Tensor, edges: int) -> tuple[Tensor, Tensor]:
        """Dimensions of neighbouring mean level share frequencies where a table of all is dear."""
        dims, count = log_frequency.shape
        groups = max(1, min(dims, TABLE // (count * count * edges)))
        order = (log_frequency.exp() @ self.values).argsort()
        group = torch.empty(dims, dtype=torch.long, device=order.device)
        group[order] = torch.arange(dims, device=order.device) * groups // dims
        shared = torch.zeros(groups, count, dtype=torch.float64, device=order.device)
        shared.index_add_(0, group, log_frequency.exp())
        return group, (shared / shared.sum(1, keepdim=True)).log()

    def _tabulate(self, model: Model, log_group: Tensor, edges: Tensor) -> Tensor:
        count = len(self.values)
        x = torch.arange(count, device=self.values.device)[:, None].expand(-1, len(log_group))
        columns = [_divergence(model, x, log_group, t.expand(count)) for t in edges]
        return torch.stack(columns, -1).transpose(0, 1)

    def divergence(self, x: Tensor) -> Tensor:
        """D at the edges, shape (B, edges)."""
        return self.table[self.group, x.flatten(1)].sum(1)

    def within(self, model: Model, draw: Draw, context: Tensor) -> Tensor:
        """r - E r under log-probabilities `context`, shape (..., K); (B,)."""
        posterior = _posterior(model, context.expand(*draw.x.shape, -1), draw.term.t)
        if isinstance(draw.term, Decode):
            return _centred(
                lambda z: -_of_level(posterior(z).log_softmax(-1), draw.x), model, draw
            )
        if isinstance(draw.term, Step) and isinstance(model.step, Mixture):
            log_probs = posterior(draw.z.double()).log_softmax(-1)
            return self._mixture_within(model, draw, draw.term.s, log_probs, context)
        e = _gaussian(model).embed(draw.x)
        square = _centred(
            lambda z: (e - posterior(z).softmax(-1) @ self.values).square(), model, draw
        )
        return draw.term.error_weight(_gaussian(model)) * square

    def _mixture_within(
        self, model: Model, draw: Draw, s: Tensor, log_probs: Tensor, context: Tensor
    ) -> Tensor:
        """KL( q(z_s|z_t,x) ‖ mixture step ) with the noise of the draw, and D(s) - D(t)."""
        process, t, z = _gaussian(model), draw.term.t, draw.z
        prediction = LevelTable(log_probs.exp() @ self.values.to(z), log_probs)
        with _same_noise(draw):
            q = process.posterior(z, model.embed(draw.x), s, t)
            cost = kl_divergence(q, model.step(prediction, z, s, t, process))
        low, high = (_divergence(model, draw.x, context, u) for u in (s, t))
        return cost - (low - high).flatten(1).sum(1)


class Controls:
    """All that is known of a model's costs without its network.

    Args:
        model: the model.
        x: examples of the same law as those to be measured, or these, shape (N, ...): what is
            fitted is fitted to them.
        edges: times between which the cells lie, the first being that of z_1; shape (cells,).
    """

    def __init__(self, model: Model, x: Tensor, edges: Tensor) -> None:
        self.model, self.edges = model, edges.to(model.device)
        some = as_examples(x[:: math.ceil(len(x) / FITTED)]).to(model.device)
        self.linear: Linear | None = None
        self.clusters: Clusters | None = None
        self.levels: LevelReference | None = None
        #: log-frequencies of the levels (not too many) or symbols in each dimension, (..., K)
        self.log_frequency: Tensor | None = None
        process = model.process
        if isinstance(process, Gaussian):
            e = process.embed(some).flatten(1).double()
            self.linear = Linear(e)
            if e.shape[1] <= WIDEST and len(e) >= FEWEST:
                self.clusters = Clusters(e)
            if isinstance(process.embedding, Levels):
                self.levels = LevelReference(model, some, edges)
                if process.embedding.count <= FINEST:
                    self.log_frequency = self.levels.log_frequency
        elif isinstance(process, Absorbing):
            self.log_frequency = log_frequencies(some.cpu(), process.count).to(some.device)
        image = len(model.shape) == 3 and model.shape[1] * model.shape[2] > 1
        self.roughness = Roughness(some) if image else None
        phi = torch.cat([self._phi(part) for part in some.split(256)])
        spread = phi.std(0, correction=0)
        self.centre, self.spread = phi.mean(0), torch.where(spread > 0, spread, 1.0)

    def at(self, rows: slice | Tensor) -> "Controls":
        """The same for some of the examples that the model is given conditions of."""
        controls = copy.copy(self)
        controls.model = self.model.at(rows)
        return controls

    @property
    def variates(self) -> int:
        """G, the columns of `within`."""
        return 2 * sum(p is not None for p in (self.linear, self.log_frequency, self.others))

    @property
    def lends(self) -> bool:
        """Whether a draw tells others of its example the more the nearer they are in time."""
        return self.levels is not None and self.log_frequency is not None

    @property
    def features(self) -> int:
        """1 + F, the columns of `between`."""
        return 1 + self.centre.shape[-1]

    @property
    def others(self) -> Clusters | None:
        """The clusters, if they are asked what other dimensions say of the levels of one."""
        return self.clusters if self.levels and self.log_frequency is not None else None

    def lend(self, draw: Draw) -> Tensor | None:
        """What a draw tells other draws of its examples: log-probabilities of the levels of each
        dimension, without the dimension's own evidence; shape (B, ..., K)."""
        if self.log_frequency is None:
            return None
        if self.levels is not None and isinstance(draw.prediction, LevelPrediction):
            evidence = level_evidence(
                draw.z, self.levels.values.to(draw.z), draw.term.t, self.model.process
            )
            return (draw.prediction.log_probs - evidence).log_softmax(-1)
        process = self.model.process
        if isinstance(process, Absorbing):
            hidden = (draw.z == process.mask)[..., None]
            return torch.where(hidden, draw.prediction.e_hat, self.log_frequency)
        return None

    def within(self, draw: Draw, context: Tensor | None, alone: Tensor) -> Tensor:
        """Numbers of mean zero given x and t, shape (B, G).

        Args:
            draw: the draw whose cost they follow.
            context: what was lent to it, shape (B, ..., K), if anything was.
            alone: which examples were lent nothing, shape (B,). Their numbers are other columns
                than those of the others, for other coefficients.
        """
        columns = []
        if self.log_frequency is not None:
            if context is None:
                context = self.log_frequency
            else:
                context = torch.where(over(alone, context).bool(), self.log_frequency, context)
        if self.linear is not None:
            columns.append(self.linear.within(self.model, draw))
        if self.levels is not None and context is not None:
            columns.append(self.levels.within(self.model, draw, context))
        elif context is not None:
            columns.append(self._hidden(draw, context))
        if self.levels is not None and self.others is not None:
            z, alpha = draw.z.double().flatten(1), self.model.process.alpha(draw.term.t)
            odds = self.others.odds(z, alpha, self.levels.values).view(*draw.x.shape, -1)
            told = (odds + self.levels.log_frequency).log_softmax(-1)
            columns.append(self.levels.within(self.model, draw, told))
        if not columns:
            return draw.cost.new_zeros(len(draw.x), 0)
        both = torch.stack(columns, 1)
        which = alone[:, None]
        return torch.cat([torch.where(which, both, 0.0), torch.where(which, 0.0, both)], 1)

    def _hidden(self, draw: Draw, context: Tensor) -> Tensor:
        """w Σ_i (1[x_i hidden] - (1-α_t)) (-log P(x_i)), log P = context."""
        process = self.model.process
        assert isinstance(process, Absorbing)
        surprise = _of_level(-context, draw.x)
        share = process.log_one_minus_alpha(draw.term.t).exp()
        hidden = (draw.z == process.mask).double() - over(share, surprise)
        return draw.term.mask_weight(process) * (hidden * surprise).flatten(1).sum(1)

    def between(self, x: Tensor) -> Tensor:
        """φ of each example and cell, (B, cells, F): a one, then numbers of mean 0, variance 1."""
        phi = (self._phi(x) - self.centre) / self.spread
        return torch.cat([torch.ones_like(phi[..., :1]), phi], -1).cpu()

    def _phi(self, x: Tensor) -> Tensor:
        # each of shape (B, cells), or (B, 1) for all cells alike
        columns = [torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)]
        if self.roughness is not None:
            columns += self.roughness(x).split(1, 1)
        if isinstance(self.model.process, Absorbing) and self.log_frequency is not None:
            columns.append(_of_level(-self.log_frequency, x).flatten(1).sum(1, keepdim=True))
        if self.linear is not None:
            columns.append(_cells(self.linear.divergence(self.model, x, self.edges)))
        if self.clusters is not None:
            features = self.clusters.features(_gaussian(self.model).embed(x).flatten(1).double())
            columns += features.split(1, 1)
        if self.levels is not None:
            surprise = _of_level(-self.levels.log_frequency, x).flatten(1).sum(1, keepdim=True)
            columns.append(_cells(self.levels.divergence(x), surprise))
        whole = [c.expand(-1, len(self.edges)) for c in columns[1:] or columns]
        return torch.stack(whole, 2)


class Nothing(Controls):
    """Nothing is known, and nothing taken off."""

    variates, features, lends = 0, 1, False

    def __init__(self, model: Model, edges: Tensor) -> None:
        self.model, self.edges = model, edges

    def lend(self, draw: Draw) -> None:
        return None

    def within(self, draw: Draw, context: Tensor | None, alone: Tensor) -> Tensor:
        return draw.cost.new_zeros(len(draw.x), 0)

    def between(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), len(self.edges), 1, dtype=torch.float64)


def _cells(divergence: Tensor, surprise: Tensor | float = 0.0) -> Tensor:
    """From D at the edges to the reconstruction and the differences, shape (B, cells)."""
    first = surprise - divergence[:, :1]
    return torch.cat([first, divergence[:, :-1] - divergence[:, 1:]], 1)


def _of_level(table: Tensor, x: Tensor) -> Tensor:
    """table_k at k = x_i of each dimension, shape of x."""
    return table.expand(*x.shape, table.shape[-1]).gather(-1, x[..., None])[..., 0]


def _gaussian(model: Model) -> Gaussian:
    assert isinstance(model.process, Gaussian)
    return model.process


def _nodes(like: Tensor, sharp: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """ε and weight of the trapezoid rule for N(0, 1), shape of `like`, float64.

    Each element has its own random shift: that is unbiased for any integrand, and elements do not
    share what is left of the error. `sharp` is the distance of levels in units of the noise:
    where it exceeds 1 the posterior jumps between levels, and the nodes stand closer.
    """
    count = NODES if sharp.max() < 1 else 2 * NODES
    width = 2 * REACH / count
    shift = torch.rand(like.shape, dtype=torch.float64, device=like.device) - count / 2
    for i in range(count):
        e = width * (i + shift)
        yield e, width / math.sqrt(2 * math.pi) * torch.exp(-0.5 * e.square())


def _sharpness(model: Model, t: Tensor) -> Tensor:
    """Distance of neighbouring levels in units of the noise, shape of t."""
    process = _gaussian(model)
    assert isinstance(process.embedding, Levels)
    gap = process.embedding.values[1] - process.embedding.values[0]
    return gap * (-process.schedule(t) / 2).exp()


def _posterior(model: Model, context: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
    """z_t to context_k + log N(z; √α_t v_k, 1-α_t) + z²/(2 (1-α_t)), shape (..., K)."""
    process = _gaussian(model)
    assert isinstance(process.embedding, Levels)
    values = process.embedding.values
    of_z = (process.log_alpha(t) / 2 - process.log_one_minus_alpha(t)).exp()
    base = context.double() - over((-process.schedule(t)).exp() / 2, context) * values.square()
    return lambda z: base + (over(of_z, z) * z)[..., None] * values


def _centred(cost: Callable[[Tensor], Tensor], model: Model, draw: Draw) -> Tensor:
    """Σ_i cost_i(z) - E cost_i, for costs of each dimension that see its own noise only; (B,)."""
    centred = cost(draw.z.double())
    q = _gaussian(model).marginal(model.embed(draw.x).double(), draw.term.t).base_dist
    for e, weight in _nodes(q.loc, _sharpness(model, draw.term.t)):
        centred = centred - weight * cost(q.loc + q.scale * e)
    return centred.flatten(1).sum(1)


def _divergence(model: Model, x: Tensor, context: Tensor, t: Tensor) -> Tensor:
    """D_i(t) = KL( q(z_t|x_i) ‖ Σ_k P_k q(z_t|v_k) ) of each dimension, log P = context; as x."""
    process = _gaussian(model)
    q = process.marginal(process.embed(x), t).base_dist
    posterior = _posterior(model, context.expand(*x.shape, -1), t)
    total = torch.zeros_like(q.loc)
    for e, weight in _nodes(q.loc, _sharpness(model, t)):
        z = q.loc + q.scale * e
        log_p = posterior(z).logsumexp(-1) - (z / q.scale).square() / 2
        total = total + weight * (-e.square() / 2 - log_p)
    return total
