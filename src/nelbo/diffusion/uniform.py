r"""Uniform-state diffusion: noise replaces a symbol by any of the K, itself included.

With α = α_t, r = α_t/α_s and s < t, for each symbol,

    q(z_t|x)     = α [z_t = x] + (1-α)/K
    q(z_s|z_t,x) = ( r [z_s = z_t] + (1-r)/K ) q(z_s|x) / q(z_t|x)

A model puts probabilities P_k in place of the known x. They are its prediction of x_i from all
symbols except z_i, whose own evidence these formulas add: P(x_i = k|z_t) ∝ P_k q(z_i|x_i = k). If
P_k = P(x_i = k|z_t without z_i), then P(z_s|z_t) is the exact reverse kernel.

In continuous time, with m(k) = q(z_t = k|x), its prediction m̂ = α P + (1-α)/K, u = m/m(z_t) and
û = m̂/m̂(z_t), the rate is

    γ'(t) (1-α)/K Σ_{j≠z_t} [ u_j log(u_j/û_j) - u_j + û_j ]

Sources: Austin et al. 2021 (D3PM), Schiff et al. 2025 (UDLM), Sahoo et al. 2025 (Duo). All of it
takes three log-probabilities of m̂ and Σ_j log m̂_j at each place, a few rows of logits at a time,
so that no table of all symbols at all places is made.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence
from torch.distributions.kl import register_kl
from torch.nn.functional import one_hot
from torch.special import xlog1py
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo._utils.batch_rng import BatchShard, rand
from nelbo._utils.numerics import broadcast_shape, log1mexp, over, slope
from nelbo.diffusion.distributions import Discrete, Shape
from nelbo.diffusion.process import SymbolProcess, per_example
from nelbo.diffusion.schedules import Schedule
from nelbo.diffusion.symbols import Certain, Predicted, Symbols, Uniform

if TYPE_CHECKING:
    from nelbo.diffusion.prediction import Prediction

FAR = 15.0  # largest |γ| of a network's input; α differs from its limit by 3e-7 there


class MaybeReplaced(Discrete):
    """A symbol of `source` with probability α, else any of the K.

    Args:
        source: distribution of the symbol.
        log_kept: log α, broadcastable to the places, float64.
        log_replaced: log(1-α), of the same shape.
    """

    def __init__(self, source: Symbols, log_kept: Tensor, log_replaced: Tensor) -> None:
        self.source, self.count = source, source.count
        self.log_kept = log_kept
        self.log_each = log_replaced - math.log(self.count)
        shape = broadcast_shape(source.batch_shape, log_kept.shape)
        Distribution.__init__(self, shape, validate_args=False)

    @property
    def log_probs(self) -> Tensor:  # type: ignore[override]
        """The table of all log-probabilities, (..., K)."""
        kept = self.log_kept[..., None] + self.source.log_probs
        return torch.logaddexp(kept, self.log_each[..., None].to(kept))

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        return self._replaced(self.source.log_prob(value), value)

    def _replaced(self, log_p: Tensor, value: Tensor) -> Tensor:
        found = torch.logaddexp(self.log_kept + log_p, self.log_each)
        return torch.where(value == self.count, 0.0, found)  # beyond the end of a shorter text

    def read(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what divergences take, of the places, (...) each, in one pass.

        Returns:
            log P_x, log P_z, and Σ_j log( P_j K/(1-α) ) of all other symbols j, float64.
        """
        each, values = self.log_each, torch.stack([x.expand_as(z), z])
        log_p, total = self.source.read(values, (self.log_kept - each).expand(self.batch_shape))
        at_x, at_z = self._replaced(log_p, values)
        rest = total - (at_z - each) - torch.where(x == z, 0.0, at_x - each)
        return at_x, at_z, torch.where(z == self.count, 0.0, rest)

    def choose(self, u: Tensor) -> Tensor:
        """Return a symbol for each uniform u in [0, 1), shape of u."""
        kept = self.log_kept.exp().expand(u.shape)
        keep = u < kept
        of_source = self.source.inverse(torch.where(keep, u / kept, 0.0), keep)
        rest = torch.where(keep, 0.0, (u - kept) / (1 - kept))
        if isinstance(self.source, Certain):  # nothing is there beyond the end of a shorter text
            keep = keep | (self.source.symbols == self.count)
        return torch.where(keep, of_source, (rest * self.count).long().clamp(max=self.count - 1))

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        return self.choose(rand(shape, shard, dtype=torch.float64, device=self.source.device))

    @property
    @override
    def mode(self) -> Tensor:
        return self.source.mode


class Bridge(Discrete):
    """z_s with probability ∝ ( r [z_s = z_t] + (1-r)/K ) P(z_s).

    Args:
        before: P(z_s).
        z: z_t, shape of the places.
        log_kept: log r, broadcastable to the places, float64.
        log_replaced: log(1-r), of the same shape.
    """

    def __init__(
        self, before: MaybeReplaced, z: Tensor, log_kept: Tensor, log_replaced: Tensor
    ) -> None:
        self.before, self.z = before, z.long()
        self.log_kept = log_kept
        self.log_each = log_replaced - math.log(before.count)
        Distribution.__init__(self, z.shape, validate_args=False)

    @cached_property
    def at_z(self) -> Tensor:
        """log P(z_s = z_t) of `before`."""
        return self.before.log_prob(self.z)

    def norm(self, at_z: Tensor) -> Tensor:
        """Return log( r P(z_s = z_t) + (1-r)/K ), from the log of this P."""
        return torch.logaddexp(self.log_kept + at_z, self.log_each)

    def of_step(self, stays: Tensor) -> Tensor:
        """Return log( r [stays] + (1-r)/K )."""
        return torch.logaddexp(torch.where(stays, self.log_kept, -torch.inf), self.log_each)

    @property
    def log_probs(self) -> Tensor:  # type: ignore[override]
        """The table of all log-probabilities, (..., K)."""
        stays = one_hot(self.z, self.before.count).bool().movedim(-1, 0)
        of_step = self.of_step(stays) - self.norm(self.at_z)
        return self.before.log_probs + of_step.movedim(0, -1)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        of_step = self.of_step(value == self.z) - self.norm(self.at_z)
        return self.before.log_prob(value) + of_step

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        u = rand(shape, shard, dtype=torch.float64, device=self.z.device)
        stay = (self.log_kept + self.at_z - self.norm(self.at_z)).exp()
        stays = (u < stay) | (self.z == self.before.count)
        moved = self.before.choose(torch.where(stays, 0.0, (u - stay) / (1 - stay)))
        return torch.where(stays, self.z, moved)

    @property
    @override
    def mode(self) -> Tensor:
        other = self.before.mode
        return torch.where(self.log_prob(other) > self.log_prob(self.z), other, self.z)


@register_kl(MaybeReplaced, Uniform)
def _kl_to_uniform(p: MaybeReplaced, q: Uniform) -> Tensor:
    if not isinstance(p.source, Certain):
        return math.log(p.count) - torch.special.entr(p.log_probs.exp()).sum(-1)
    count, kept, each = p.count, p.log_kept.exp(), p.log_each.exp()
    same = xlog1py(kept + each, kept * (count - 1)) + xlog1py((count - 1) * each, -kept)
    return torch.where(p.source.symbols == count, 0.0, same)


@register_kl(Bridge, Bridge)
def _kl_bridges(p: Bridge, q: Bridge) -> Tensor:
    known = p.before.source
    if not isinstance(known, Certain):
        log_p, log_q = p.log_probs, q.log_probs
        return (log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p - log_q)).sum(-1)
    x, z = known.symbols, p.z
    (p_x, p_z, p_rest), (q_x, q_z, q_rest) = (v.before.read(x, z) for v in (p, q))
    norm, stays = p.norm(p_z), torch.ones_like(z, dtype=torch.bool)
    parts = (  # log-probabilities of z_t, of x and of each other symbol, with log-ratios
        (p_z + p.of_step(stays) - norm, p_z - q_z),
        (torch.where(x == z, -torch.inf, p_x + p.of_step(~stays) - norm), p_x - q_x),
        (p.before.log_each + p.of_step(~stays) - norm, p_rest - q_rest),
    )
    total = q.norm(q_z) - norm
    for log_p, ratio in parts:
        total = total + log_p.exp() * torch.where(log_p == -torch.inf, 0.0, ratio)
    return total


class UniformDiffusion(SymbolProcess):
    """Uniform-state diffusion of symbols 0..K-1.

    e is x itself; a prediction of it has log-probabilities (..., K), see the head of this file.

    Args:
        schedule: γ(t), with α_t = sigmoid(-γ(t)); its ends may be infinite.
        count: the number K of symbols.
        as_codes: a network gets the codes of z, one channel, and embeds them itself; by default
            it gets K channels, one-hot.
        shorter: whether examples may be shorter than others: x and z are K beyond their end, which
            costs nothing.
    """

    @checked
    def __init__(
        self, schedule: Schedule, count: int, as_codes: bool = False, shorter: bool = False
    ) -> None:
        super().__init__(schedule, count, count, as_codes, shorter)

    @override
    def log_snr_input(self, t: Tensor) -> Tensor:
        return self.schedule(t).clamp(-FAR, FAR)

    @override
    def transition(self, z: Tensor, s: Tensor, t: Tensor) -> Independent:
        kept = self.log_kept(s, t)
        return per_example(self._replaced(Certain(z, self.count), kept, log1mexp(kept)))

    @override
    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        return per_example(self._marginal(Certain(e, self.count), t))

    @override
    def posterior_of(self, z: Tensor, symbols: Symbols, s: Tensor, t: Tensor) -> Independent:
        return per_example(self._bridge(self._marginal(symbols, s), z, self.log_kept(s, t)))

    @override
    def likelihood(self, prediction: "Prediction", z: Tensor, t: Tensor) -> Discrete:
        certain = torch.zeros_like(t)
        clean = self._replaced(prediction.symbols(z, None), certain, certain - torch.inf)
        return self._bridge(clean, z, self.log_alpha(t))

    @override
    def prior(self, shape: torch.Size | tuple[int, ...], t: Tensor) -> Independent:
        return per_example(Uniform(self.count, torch.Size((len(t), *shape)), t.device))

    @override
    def rate_of(self, z: Tensor, e: Tensor, symbols: Symbols, t: Tensor) -> Tensor:
        """Return the rate of the head of this file, (B,); there, u_j = m_j/m_z.

        Σ_{j≠z} û_j - u_j = 1/m̂_z - 1/m_z, and u_j is that of x, or the same for all others. At
        the ends of an infinite γ, times that are never drawn, it is 0.
        """
        inside = self.schedule(t).isfinite()
        t = torch.where(inside, t, 0.5)
        each = self._of_places(z.long(), e.long(), symbols, t)
        return torch.where(inside, self._pace(t) * each.flatten(1).sum(1), 0.0)

    def _pace(self, t: Tensor) -> Tensor:
        """Return γ'(t) (1-α)/K, shape of t."""
        return slope(self.schedule, t) * self.log_one_minus_alpha(t).exp() / self.count

    def _of_places(self, z: Tensor, x: Tensor, symbols: Symbols, t: Tensor) -> Tensor:
        """Return the sum over j of the rate for each place, shape of z, (..., *x.shape)."""
        m, m_hat = (self._marginal(v, t) for v in (Certain(x, self.count), symbols))
        (at_x, at_z, rest), (hat_x, hat_z, hat_rest) = (v.read(x, z) for v in (m, m_hat))
        apart = x != z
        of_x = (at_x - at_z).exp() * ((at_x - hat_x) - (at_z - hat_z))
        others = self.count - 1 - apart.double()
        log_ratios = rest - hat_rest - others * (at_z - hat_z)
        of_others = (m.log_each - at_z).exp() * log_ratios
        lost = (-at_z).exp() * torch.expm1(at_z - hat_z)
        return torch.where(apart, of_x, 0.0) + of_others + lost

    def costs_of_symbols(self, x: Tensor, log_p: Tensor, s: Tensor | None, t: Tensor) -> Tensor:
        """Return the cost of each place with each symbol there as that of z_t, (K, B, ...), nats.

        Args:
            x: examples, (B, ...).
            log_p: of the symbols of each place given all others, (B, ..., K).
            s: earlier times of a step, (B,); None for the rate in continuous time.
            t: (B,), at which γ is finite.
        """
        x = x.long()
        z = torch.arange(self.count, device=x.device).view(-1, *(1,) * x.ndim).expand(-1, *x.shape)
        known, opinion = Certain(x, self.count), Predicted(log_p, x, None)
        if s is None:
            return over(self._pace(t), x) * self._of_places(z, x, opinion, t)
        kept = self.log_kept(s, t)
        return kl_divergence(
            *(self._bridge(self._marginal(v, s), z, kept) for v in (known, opinion))
        )

    def _marginal(self, symbols: Symbols, t: Tensor) -> MaybeReplaced:
        return self._replaced(symbols, self.log_alpha(t), self.log_one_minus_alpha(t))

    def _replaced(self, symbols: Symbols, kept: Tensor, replaced: Tensor) -> MaybeReplaced:
        ones = (1,) * (len(symbols.batch_shape) - 1)
        return MaybeReplaced(symbols, kept.reshape(-1, *ones), replaced.reshape(-1, *ones))

    def _bridge(self, before: MaybeReplaced, z: Tensor, kept: Tensor) -> Bridge:
        ones = (1,) * (len(before.batch_shape) - 1)
        kept, replaced = (v.reshape(-1, *ones) for v in (kept, log1mexp(kept)))
        return Bridge(before, z.long(), kept, replaced)

    @override
    def symbols(self, e: Tensor, z: Tensor) -> Symbols:
        if e.ndim == z.ndim:
            return Certain(e, self.count)
        return Predicted(e, z, None, dtype=e.dtype)
