"""Small models whose bound is known exactly, for each single example.

`bound(x, times)` gives the three terms, shape (N, 3), without a random number and without the
estimators: closed forms, quadrature over z_t and t, or sums over all states.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.closed_forms import Formula, legendre_nodes, normal_nodes, states
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import Categorical, GaussianDensity, LevelDecoder
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits, SymbolLogits, XPrediction
from nelbo.diffusion.process import SymbolProcess
from nelbo.diffusion.product import (
    ProductDecoder,
    ProductDiffusion,
    ProductParametrization,
    ProductReverseKernel,
)
from nelbo.diffusion.reverse import Mixture, Posterior, ReverseKernel
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.times import TimeDiscretization, TimeGrid
from nelbo.diffusion.uniform import UniformDiffusion
from nelbo.integrations import wrap_tokens

D = 2  # dimensions of each
FLAT = torch.zeros(D, dtype=torch.float64)


@dataclass
class Known:
    """A model, examples, and the truth about them."""

    model: Model
    examples: Callable[[int], Tensor]
    terms: Callable[[Tensor, TimeDiscretization], Tensor]

    def bound(self, x: Tensor, times: TimeDiscretization) -> Tensor:
        """Prior, reconstruction and diffusion of each example, shape (N, 3), nats."""
        distinct, place = x.unique(dim=0, return_inverse=True)
        with torch.no_grad():
            return self.terms(distinct, times)[place]


def _over_time(
    times: TimeDiscretization, step: Callable, rate: Callable, n: int = 24
) -> Tensor | float:
    """Σ step(s, t) over a grid, or ∫ rate(t) dt."""
    if isinstance(times, TimeGrid):
        return sum(step(s, t) for s, t in itertools.pairwise(times.times))
    nodes = zip(*legendre_nodes(times.first, 1.0, n), strict=True)
    return sum(weight * rate(t) for t, weight in nodes)


# ---- a linear denoiser of real data: a closed form in z


def gaussian() -> Known:
    """ê = c(γ) M z_t, not the best one and mixing dimensions."""
    low, high, spread = -4.0, 2.0, 0.2
    mix = torch.tensor([[0.9, 0.2], [-0.1, 0.7]], dtype=torch.float64)
    affine = Affine(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.7]))

    def network(z: Tensor, gamma: Tensor) -> Tensor:
        return torch.sigmoid(-gamma)[:, None].sqrt() * z @ mix.T

    decoder = GaussianDensity(affine, spread).requires_grad_(False)
    process = GaussianDiffusion(Linear(low, high), affine)
    model = Model(Formula(network), process, XPrediction(), Posterior(), decoder, (D,))

    def examples(n: int) -> Tensor:
        with seeded(31):
            a = torch.randn(n, D, dtype=torch.float64)
        return torch.stack([2 * a[:, 0] + 0.5, 0.5 * a[:, 0] + 0.4 * a[:, 1] ** 2 - 1], 1)

    def terms(x: Tensor, times: TimeDiscretization) -> Tensor:
        e = (x - torch.tensor([0.5, -1.0])) / torch.tensor([2.0, 0.7])

        def snr(t: Tensor) -> Tensor:
            return torch.exp(-(low + (high - low) * t))

        def error(t: Tensor) -> Tensor:
            alpha = snr(t) / (1 + snr(t))
            bias = e - alpha * e @ mix.T
            return bias.square().sum(1) + alpha * (1 - alpha) * mix.square().sum()

        one = torch.ones((), dtype=torch.float64)
        alpha = snr(one) / (1 + snr(one))
        prior = (alpha * e.square() - alpha - torch.log1p(-alpha)).sum(1) / 2
        decoded = error(torch.tensor(times.first).double()) / (2 * spread**2)
        decoded = decoded + D / 2 * math.log(2 * math.pi * spread**2) + math.log(2.0 * 0.7)
        diffusion = _over_time(
            times,
            lambda s, t: (snr(s) - snr(t)) / 2 * error(t),
            lambda t: (high - low) * snr(t) / 2 * error(t),
        )
        return torch.stack([prior, decoded, diffusion + 0 * prior], 1)

    return Known(model, examples, terms)


# ---- levels with their mixture step: quadrature over z_t and z_s

NODES, WEIGHTS = normal_nodes(49, 7.0)


def levels(step: type[ReverseKernel] = Mixture) -> Known:
    """Four levels; logits lean with both dimensions of z_t and the time."""
    kinds = Levels(4)
    lean = torch.tensor([-1.0, 0.5, 0.2, 1.1], dtype=torch.float64)

    def network(z: Tensor, gamma: Tensor) -> Tensor:
        other = (1.5 * z.flip(1) + 0.1 * gamma[:, None]).tanh()
        return (other + 0.3 * z)[..., None] * lean

    head = LevelLogits(kinds.values)
    reverse = Mixture(kinds.values) if step is Mixture else step()
    process = GaussianDiffusion(Linear(-4.0, 2.5), kinds)
    model = Model(Formula(network), process, head, reverse, LevelDecoder(), (D,))

    def examples(n: int) -> Tensor:
        with seeded(32):
            p = torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.1, 0.3, 0.5, 0.1]])
            x = torch.multinomial(p, n, replacement=True)
            x[1, ::3] = x[0, ::3]
        return x.T.to(torch.uint8)

    def terms(x: Tensor, times: TimeDiscretization) -> Tensor:
        return torch.stack([_terms_of_levels(model, one, times) for one in x.long()])

    return Known(model, examples, terms)


def _terms_of_levels(model: Model, one: Tensor, times: TimeDiscretization) -> Tensor:
    """Costs of a single example (D,), expectations by quadrature."""
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten()
    noise = torch.cartesian_prod(NODES, NODES)
    x = one.expand(len(noise), D)
    e = model.embed(x)

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.expand(len(x))
        q = model.process.marginal(e, t).base_dist
        return q.loc + q.scale * noise, t

    def step(s: Tensor, t: Tensor) -> Tensor:
        z, t = at(t)
        s = s.expand(len(x))
        q, p = model.process.posterior(z, e, s, t), model.reverse(z, s, t)
        if not isinstance(model.step, Mixture):
            return weights @ kl_divergence(q, p)
        before = q.base_dist.loc + q.base_dist.scale * NODES[:, None, None]
        ratio = q.base_dist.log_prob(before) - p.base_dist.log_prob(before)
        return weights @ torch.tensordot(WEIGHTS, ratio, 1).sum(1)

    def rate(t: Tensor) -> Tensor:
        z, t = at(t)
        return weights @ model.process.rate(z, e, model.predict(z, t).e_hat, t)

    last = torch.ones(1, dtype=torch.float64)
    prior = kl_divergence(model.process.marginal(e[:1], last), model.process.prior((D,), last))[0]
    z, t = at(torch.tensor(times.first, dtype=torch.float64))
    decoded = weights @ -model.likelihood(z, t).log_prob(x)
    return torch.stack([prior, decoded, torch.as_tensor(_over_time(times, step, rate))])


# ---- symbols, with masks or without: sums over all states

K = 3


def symbols(process: SymbolProcess | None = None) -> Known:
    """Predictions of which nothing is special, one for each state z."""
    process = MaskedDiffusion(PowerAlpha(2.0), K) if process is None else process
    channels = process.channels
    every = torch.tensor(states(channels - 1, D))
    with seeded(33):
        table = torch.randn(len(every), D, K, dtype=torch.float64)

    def network(features: Tensor, level: Tensor) -> Tensor:
        z = features.reshape(-1, D, channels).argmax(-1)
        return table[z[:, 0] * channels + z[:, 1]]

    model = Model(Formula(network), process, SymbolLogits(K), Posterior(), Categorical(), (D,))

    def examples(n: int) -> Tensor:
        with seeded(34):
            return torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n * D, True).view(n, D)

    def one_example(one: Tensor, times: TimeDiscretization) -> Tensor:
        x = one.expand_as(every)
        e = model.embed(x)

        def mean(values: Tensor, t: Tensor) -> Tensor:
            weights = model.process.marginal(e, t).log_prob(every).exp()
            return torch.where(weights > 0, weights * values, 0.0).sum()

        def step(s: Tensor, t: Tensor) -> Tensor:
            s, t = (v.expand(len(every)) for v in (s, t))
            q, p = model.process.posterior(every, e, s, t), model.reverse(every, s, t)
            return mean(kl_divergence(q, p), t)

        def rate(t: Tensor) -> Tensor:
            t = t.expand(len(every))
            return mean(model.process.rate(every, e, model.predict(every, t).e_hat, t), t)

        last = torch.ones(1, dtype=torch.float64)
        marginal = model.process.marginal(e[:1], last)
        prior = kl_divergence(marginal, model.process.prior((D,), last))[0]
        first = torch.full((len(every),), times.first, dtype=torch.float64)
        decoded = mean(-model.likelihood(every, first).log_prob(x), first)
        return torch.stack([prior, decoded, torch.as_tensor(_over_time(times, step, rate))])

    def terms(x: Tensor, times: TimeDiscretization) -> Tensor:
        return torch.stack([one_example(one, times) for one in x])

    return Known(model, examples, terms)


MODELS: dict[str, Callable[[], Known]] = {
    "gaussian": gaussian,
    "levels": levels,
    "symbols": symbols,
}


# ---- larger ones, of pairs of dimensions that nothing ties to each other


def pairs(known: Known, shape: tuple[int, ...]) -> Known:
    """Examples of this shape, each pair of whose dimensions is an example of `known`."""
    one, each = known.model, torch.Size(shape).numel() // D

    def network(features: Tensor, level: Tensor) -> Tensor:
        parts = features.reshape(len(features) * each, -1)
        found: Tensor = one.network(parts, level.repeat_interleave(each))
        return found.reshape(len(features), *shape, *found.shape[2:])

    return Known(
        Model(Formula(network), one.process, one.head, one.step, one.decoder, shape),
        lambda n: known.examples(n * each).reshape(n, *shape),
        lambda x, times: known.bound(x.reshape(-1, D), times).view(len(x), each, 3).sum(1),
    )


def image() -> Known:
    """2 x 3 pixels of four levels."""
    return pairs(levels(), (1, 2, 3))


def text() -> Known:
    """Eight symbols."""
    return pairs(symbols(), (8,))


def replaced() -> Known:
    """Eight symbols of uniform-state diffusion."""
    return pairs(symbols(UniformDiffusion(PowerAlpha(3.0), K)), (8,))


def table() -> Known:
    """Two real columns and four categories."""
    parts, sizes = [gaussian(), pairs(symbols(), (4,))], [D, 4]
    one, other = (part.model for part in parts)

    def network(features: Tensor, level: Tensor) -> Tensor:
        found = one.network(features[:, :D], level), other.network(features[:, D:], level)
        return torch.cat([v.flatten(1) for v in found], 1)

    def terms(x: Tensor, times: TimeDiscretization) -> Tensor:
        return parts[0].terms(x[:, :D], times) + parts[1].terms(x[:, D:].long(), times)

    return Known(
        Model(
            Formula(network),
            ProductDiffusion([one.process, other.process], sizes),
            ProductParametrization([one.head, other.head], sizes),
            ProductReverseKernel([one.step, other.step]),
            ProductDecoder([one.decoder, other.decoder]),
            (sum(sizes),),
        ),
        lambda n: torch.cat([part.examples(n).double() for part in parts], 1),
        terms,
    )


class Counted(torch.nn.Module):
    """Logits of each place that depend on the number of hidden tokens alone, for any length."""

    def __init__(self, count: int = 4, longest: int = 48) -> None:
        super().__init__()
        self.mask, self.pad = count, count + 1
        shape = longest, count + 2
        self.of_place = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits((ids == self.mask).double().mean(1), ids.shape[1])

    def logits(self, share: Tensor, length: int) -> Tensor:
        """Return the logits of places with a share of hidden tokens, (B, L, V), given (B,)."""
        return self.of_place[:length] * (0.5 + 2 * share[:, None, None])

    def bound(self, text: Tensor) -> Tensor:
        """Return Σ_l of the mean cost over the places of a text, with l hidden."""
        length = len(text)
        logits = self.logits(torch.arange(1, length + 1).double() / length, length)
        log_p = logits[..., : self.mask].log_softmax(-1)
        return -log_p[:, torch.arange(length), text].mean(1).sum()


def lengths() -> Known:
    """Texts of 4, 7, 12 and 48 tokens of a wrapped model, in continuous time."""
    with seeded(3):
        module = Counted()
    model = wrap_tokens(module, module.mask, pad_id=module.pad)

    def examples(n: int) -> Tensor:
        with seeded(31):
            ids = torch.randint(module.mask, (n, 48))
        sizes = torch.tensor([4, 7, 12, 48])[torch.arange(n) % 4]
        return torch.where(torch.arange(48) < sizes[:, None], ids, module.pad)

    def terms(x: Tensor, times: TimeDiscretization) -> Tensor:
        assert times.steps is None
        whole = torch.stack([module.bound(text[text != module.pad]) for text in x])
        return torch.stack([0 * whole, 0 * whole, whole], 1)

    return Known(model, examples, terms)


LARGER: dict[str, Callable[[], Known]] = {
    "image": image,
    "text": text,
    "replaced": replaced,
    "table": table,
}
