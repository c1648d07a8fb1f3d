"""Reference denoisers without a network, whose costs have a known mean; see `control_variates`."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nelbo._utils.numerics import over
from nelbo.diffusion.distributions import kl
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import log_frequencies
from nelbo.diffusion.prediction import LevelTable
from nelbo.diffusion.terms import DiffusionTerm, ReconstructionTerm, TermDraw

WIDEST = 1024  # dimensions up to which covariances are estimated; above, only variances
NODES = 8  # of the integral over ε
REACH = 6.0  # range of this integral, -REACH to REACH
TABLE = 2**23  # integrals in the table of the levels, at most
CACHED = 2**18  # numbers with which to compute at a time: about what the cache of a CPU holds


class Linear:
    """The denoiser of N(μ, Σ), in the eigenvectors of Σ.

    Args:
        e: embedded examples, flat, shape (N, D), with mean μ and covariance Σ.
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

    def within(self, model: Model, draw: TermDraw) -> Tensor:
        """Return w (‖e - ê‖² - its mean), shape (B,)."""
        process, t = gaussian(model), draw.term.t
        parts = zip(*(v.split(rows_cached(draw.x)) for v in (draw.x, draw.z, t)), strict=True)
        return draw.term.error_weight(process) * torch.cat(
            [self._centred(process, *part) for part in parts]
        )

    def _centred(self, process: GaussianDiffusion, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return ‖e - ê‖² less its mean given e, for examples x and their z at times t; (B,).

        With a = e - μ, z - √α e of mean square 1-α, and r = λ/(α λ + 1-α) in the eigenvectors,
        e - ê = (1 - α r) a - u,  u = √α r (z - √α e).
        """
        e, alpha = process.embed(x).flatten(1), process.alpha(t)[:, None]
        noise = process.log_one_minus_alpha(t).exp()[:, None]
        a = self._rotated(e - self.mean)
        u = self._rotated(torch.addcmul(z.double().flatten(1), alpha.sqrt(), e, value=-1))
        # in place, as these are passes over all numbers beside one call of the network
        r = (alpha * self.variance).add_(noise).reciprocal_().mul_(self.variance)
        mean = (alpha * noise)[:, 0] * torch.einsum("bd,bd->b", r, r)
        u = u.mul_(r).mul_(alpha.sqrt())
        other = r.mul_(-2 * alpha).add_(2).mul_(a)
        return torch.einsum("bd,bd->b", u, u - other) - mean

    def divergence(self, model: Model, x: Tensor, t: Tensor) -> Tensor:
        """Return D at each of the times t, shape (B, len(t))."""
        process = gaussian(model)
        a = self._rotated(process.embed(x).flatten(1) - self.mean)
        alpha, noise = process.alpha(t), process.log_one_minus_alpha(t).exp()
        total = alpha * self.variance[:, None] + noise  # (D, len(t))
        ratio = noise / total
        # one product of matrices: at each time alone, this costs as much as calls of a network
        return ((ratio - 1 - ratio.log()).sum(0) + a.square() @ (alpha / total)) / 2


class LevelReference:
    """The Bayes denoiser of independent dimensions.

    Args:
        model: of levels.
        x: examples that give the frequencies of the levels, shape (N, ...).
        edges: times at which D is tabulated.
    """

    def __init__(self, model: Model, x: Tensor, edges: Tensor) -> None:
        embedding = gaussian(model).embedding
        self.values = embedding.values
        log_frequency = log_frequencies(x.cpu(), embedding.count).to(self.values.device)
        self.group, log_group = self._group(log_frequency.flatten(0, -2), len(edges))
        self.log_frequency = log_group[self.group].reshape(log_frequency.shape)
        #: D of each group of dimensions, level and edge
        self.table = self._tabulate(model, log_group, edges)

    def _group(self, log_frequency: Tensor, edges: int) -> tuple[Tensor, Tensor]:
        """Let dimensions of similar mean level share frequencies if a full table is too large."""
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

    def within(self, model: Model, draw: TermDraw, context: Tensor) -> Tensor:
        """Return r - E r, (B,), with the log-probabilities `context`, shape (..., K)."""
        posterior = _posterior(model, context.expand(*draw.x.shape, -1), draw.term.t)
        if isinstance(draw.term, ReconstructionTerm):
            return _centred(lambda z: -of_level(posterior(z).log_softmax(-1), draw.x), model, draw)
        if isinstance(draw.term, DiffusionTerm) and model.step.mixes_levels:
            log_probs = posterior(draw.z.double()).log_softmax(-1)
            return self._mixture_within(model, draw, draw.term.s, log_probs, context)
        e = gaussian(model).embed(draw.x)
        square = _centred(
            lambda z: (e - mean_level(posterior(z), self.values)).square(), model, draw
        )
        return draw.term.error_weight(gaussian(model)) * square

    def _mixture_within(
        self, model: Model, draw: TermDraw, s: Tensor, log_probs: Tensor, context: Tensor
    ) -> Tensor:
        """Return KL( q(z_s|z_t,x) ‖ mixture kernel ), with the draw's noise, - [D(s) - D(t)]."""
        process, t, z = gaussian(model), draw.term.t, draw.z
        prediction = LevelTable(log_probs.exp() @ self.values.to(z), log_probs)
        q = process.posterior(z, model.embed(draw.x), s, t)
        cost = kl(q, model.step(prediction, z, s, t, process), draw.noise)
        low, high = (_divergence(model, draw.x, context, u) for u in (s, t))
        return cost - (low - high).flatten(1).sum(1)


def rows_cached(x: Tensor) -> int:
    """Return the number of examples of x, (N, ...), to compute with at a time."""
    return max(1, CACHED // x[0].numel()) if x.device.type == "cpu" else max(1, len(x))


def mean_level(logits: Tensor, values: Tensor) -> Tensor:
    """Return Σ_k v_k softmax_k(logits), shape (...), from logits (..., K), which are overwritten.

    In float64, and for few levels, this takes a third of the time of `softmax(-1) @ values`.
    """
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    sums = weights @ torch.stack([values, torch.ones_like(values)], 1)
    return sums[..., 0] / sums[..., 1]


def of_level(table: Tensor, x: Tensor) -> Tensor:
    """Return table_k at k = x_i of each dimension, shape of x."""
    return table.expand(*x.shape, table.shape[-1]).gather(-1, x[..., None])[..., 0]


def gaussian(model: Model) -> GaussianDiffusion:
    """Return the process of a model, which must be Gaussian for these references."""
    return GaussianDiffusion.require(
        model.process, "the reference denoiser needs a Gaussian process"
    )


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


def _posterior(model: Model, context: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
    """Return z_t -> context_k + log N(z; √α_t v_k, 1-α_t) + z²/(2 (1-α_t)), shape (..., K)."""
    process = gaussian(model)
    values = process.embedding.values
    of_z = (process.log_alpha(t) / 2 - process.log_one_minus_alpha(t)).exp()
    base = context.double() - over((-process.schedule(t)).exp() / 2, context) * values.square()
    return lambda z: torch.addcmul(base, (over(of_z, z) * z)[..., None], values)


def _centred(cost: Callable[[Tensor], Tensor], model: Model, draw: TermDraw) -> Tensor:
    """Return Σ_i cost_i(z) - E cost_i, (B,), where cost_i depends on the noise of i alone."""
    centred = cost(draw.z.double())
    q = gaussian(model).marginal(model.embed(draw.x).double(), draw.term.t).base_dist
    for e, weight in _nodes(q.loc):
        centred = centred - weight * cost(q.loc + q.scale * e)
    return centred.flatten(1).sum(1)


def _divergence(model: Model, x: Tensor, context: Tensor, t: Tensor) -> Tensor:
    """Return D_i(t) = KL( q(z_t|x_i) ‖ Σ_k P_k q(z_t|v_k) ), log P = context, shape of x."""
    process = gaussian(model)
    q = process.marginal(process.embed(x), t).base_dist
    posterior = _posterior(model, context.expand(*x.shape, -1), t)
    total = torch.zeros_like(q.loc)
    for e, weight in _nodes(q.loc):
        z = q.loc + q.scale * e
        log_p = posterior(z).logsumexp(-1) - (z / q.scale).square() / 2
        total = total + weight * (-e.square() / 2 - log_p)
    return total
