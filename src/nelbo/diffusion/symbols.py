r"""Distributions of symbols that never need a table of all symbols at all places.

A vocabulary may have 10^5 symbols and a text 10^3 places, so a table of their probabilities takes
more memory than the network. Masked diffusion asks for little of it:

    Certain       a known symbol at each place
    Uniform       all symbols alike
    Predicted     P(x_i|z_t): softmax of the network's logits where z_t hides x_i, certain where
                  it shows x_i; normalised at the places asked for, a few rows at a time
    MaybeMasked   with probability exp(log_shown) a symbol of one of these, else the mask K:
                  q(z_t|x), q(z_s|z_t,x) and P(z_s|z_t) in turn

The code K of a symbol says that there is none, beyond the end of a shorter text. It is known, so
its probability is 1; its place holds the mask at all times.

and KL( MaybeMasked(certain x) ‖ MaybeMasked(P) ) = p_shown (log p_shown/q_shown - log P(x)) + the
same of the mask: one log-probability per place. `log_probs`, the full table, is for small
vocabularies: an entropy coder, a report.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from types import EllipsisType

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import register_kl
from torch.nn.functional import one_hot, softplus
from typing_extensions import override

from nelbo._utils.batch_rng import BatchShard, rand
from nelbo._utils.numerics import broadcast_shape
from nelbo.diffusion.distributions import Discrete, Shape

AT_ONCE = 2**18  # logits that are normalised at a time, as many as stay in a cache,
PARTS = 256  # or, where those of a network call are more, them in so many parts
WIDE = 4096  # symbols up to which logits are normalised in float64; float32 is enough above


class Symbols(Discrete):
    """Distribution of a symbol 0..K-1 at each place."""

    def __init__(self, count: int, shape: torch.Size, device: torch.device) -> None:
        self.count, self.device = count, device
        Distribution.__init__(self, shape, validate_args=False)

    @property
    @abstractmethod
    def log_probs(self) -> Tensor:  # type: ignore[override]
        """The table of all log-probabilities, (..., K)."""

    @abstractmethod
    @override
    def log_prob(self, value: Tensor, where: Tensor | None = None) -> Tensor:
        """Return log P(value), shape of value; anything outside of `where`, booleans."""

    def read(self, values: Tensor, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and Σ_k log(1 + e^log_odds P_k), float64, in one pass.

        Args:
            values: symbols, (E, ...), of which E log-probabilities are asked at each place.
            log_odds: shape of the places.
        """
        table = self.log_probs + log_odds[..., None].to(self.log_probs.dtype)
        return self.log_prob(values), log1pexp(table).sum(-1, dtype=torch.float64)

    @abstractmethod
    def inverse(self, u: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the symbol at which the distribution function passes u, in [0, 1); shape of u."""

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        return self.inverse(rand(shape, shard, dtype=torch.float64, device=self.device))


class Certain(Symbols):
    """Known symbols.

    Args:
        symbols: integers, shape (...).
        count: the number K of symbols.
    """

    def __init__(self, symbols: Tensor, count: int) -> None:
        self.symbols = symbols.long()
        super().__init__(count, symbols.shape, symbols.device)

    @property
    @override
    def log_probs(self) -> Tensor:  # type: ignore[override]
        return one_hot(self.symbols, self.count).double().log()

    @override
    def log_prob(self, value: Tensor, where: Tensor | None = None) -> Tensor:
        return (value == self.symbols).double().log()

    @override
    def read(self, values: Tensor, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(values), log1pexp(log_odds.double())

    @override
    def inverse(self, u: Tensor, where: Tensor | None = None) -> Tensor:
        return self.symbols.expand(u.shape)

    @property
    @override
    def mode(self) -> Tensor:
        return self.symbols


class Uniform(Symbols):
    """All K symbols alike.

    Args:
        count: the number K of symbols.
        shape: of the places.
        device: of the draws.
    """

    @property
    @override
    def log_probs(self) -> Tensor:  # type: ignore[override]
        each = torch.tensor(-math.log(self.count), dtype=torch.float64, device=self.device)
        return each.expand(*self.batch_shape, self.count)

    @override
    def log_prob(self, value: Tensor, where: Tensor | None = None) -> Tensor:
        each = torch.full_like(value, -math.log(self.count), dtype=torch.float64)
        return torch.where(value == self.count, 0.0, each)

    @override
    def inverse(self, u: Tensor, where: Tensor | None = None) -> Tensor:
        return (u * self.count).long().clamp(max=self.count - 1)


class Predicted(Symbols):
    """P(x_i|z): softmax of logits where z is the mask, certain where z shows a symbol.

    Args:
        logits: of a network, in its own dtype, (..., K), places first.
        z: symbols or the mask, shape (...) of the places.
        mask: the code of the mask; None if no place shows its symbol.
        log_prior: added to the logits, broadcastable to (..., K); None for zeros.
        row: of `logits.flatten(0, -2)` for each place, shape of z; None if they are in order.
        dtype: in which logits are normalised.
        never: symbols of probability 0, (n,); None for no such symbol.
        certain: mask of further places that show their symbol, shape of z; None for no such place.
    """

    def __init__(
        self,
        logits: Tensor,
        z: Tensor,
        mask: int | None,
        log_prior: Tensor | None = None,
        row: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        never: Tensor | None = None,
        certain: Tensor | None = None,
    ) -> None:
        count = logits.shape[-1]
        self.logits, self.row, self.dtype = logits, row, dtype
        self.never = never
        self.log_prior = None if log_prior is None else log_prior.expand(*z.shape, count)
        self.symbols = z.long()
        self.hidden = torch.ones_like(z, dtype=torch.bool) if mask is None else z == mask
        if certain is not None:
            self.hidden = self.hidden & ~certain
        super().__init__(count, z.shape, logits.device)

    @property
    @override
    def log_probs(self) -> Tensor:  # type: ignore[override]
        shows = torch.arange(self.count, device=self.device) == self.symbols[..., None]
        return torch.where(self.hidden[..., None], self.table(), shows.to(self.dtype).log())

    def table(self) -> Tensor:
        """Return the log-softmax of the logits at all places, also those that show, (..., K)."""
        shape = (*self.batch_shape, self.count)
        logits = self.logits if self.row is None else self.logits.flatten(0, -2)[self.row]
        return self._normalised(logits.expand(shape), self.log_prior)

    def rows(self, where: Tensor | None = None) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Yield places that are hidden, as indices of z, with their log-probabilities, (n, K).

        Args:
            where: places to leave out are False in it, shape of z.
        """
        wanted = self.hidden if where is None else self.hidden & where
        places = wanted.nonzero(as_tuple=True)
        size = max(1, max(AT_ONCE, self.logits.numel() // PARTS) // self.count)
        for some in zip(*(v.split(size) for v in places), strict=True):
            if not len(some[0]):
                return
            if self.row is None:
                logits = self.logits[some]
            else:
                logits = self.logits.flatten(0, -2)[self.row[some]]
            prior = None if self.log_prior is None else self.log_prior[some]
            yield some, self._normalised(logits, prior)

    def _normalised(self, logits: Tensor, log_prior: Tensor | None) -> Tensor:
        logits = logits.to(self.dtype)
        logits = logits if log_prior is None else logits + log_prior
        if self.never is not None:
            logits = logits.index_fill(-1, self.never, -torch.inf)
        return logits.log_softmax(-1)

    @override
    def log_prob(self, value: Tensor, where: Tensor | None = None) -> Tensor:
        value = value.long().expand(broadcast_shape(value.shape, self.batch_shape))
        found = self._of_shown(value)
        for places, log_probs in self.rows(_any(where, value.ndim - len(self.batch_shape))):
            self._gather(found, value, places, log_probs)
        return torch.where(value == self.count, 0.0, found)

    @override
    def read(self, values: Tensor, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        found, total = self._of_shown(values), log1pexp(log_odds.double())
        for places, log_probs in self.rows():
            self._gather(found, values, places, log_probs)
            terms = log1pexp(log_probs + log_odds[places][:, None].to(self.dtype))
            total[places] = terms.sum(-1, dtype=torch.float64)
        return torch.where(values == self.count, 0.0, found), total

    def _of_shown(self, value: Tensor) -> Tensor:
        """Return log-probabilities where the symbol shows."""
        return (value == self.symbols).to(self.dtype).log()

    def _gather(
        self, found: Tensor, value: Tensor, places: tuple[Tensor, ...], log_probs: Tensor
    ) -> None:
        """Write log-probabilities of the values at some places, of (n, K), into `found`."""
        at: tuple[EllipsisType | Tensor, ...] = (..., *places)
        asked = value[at].reshape(-1, len(log_probs)).T.clamp(max=self.count - 1)  # (n, E)
        extra = value.shape[: value.ndim - len(self.batch_shape)]
        found[at] = log_probs.gather(1, asked).T.reshape(*extra, -1)

    @override
    def inverse(self, u: Tensor, where: Tensor | None = None) -> Tensor:
        extra = u.ndim - len(self.batch_shape)
        found = self.symbols.expand(u.shape).clone()
        for places, log_probs in self.rows(_any(where, extra)):
            at: tuple[EllipsisType | Tensor, ...] = (..., *places)
            # in float64, as float32 truncates tails; a u below the total skips zeros at the end
            cdf = log_probs.double().exp().cumsum(-1)
            total = cdf[:, -1:]
            below = torch.nextafter(total, torch.zeros_like(total))
            scaled = torch.minimum(u[at].reshape(-1, len(cdf)).T * total, below)
            symbol = torch.searchsorted(cdf, scaled.contiguous(), right=True)
            found[at] = symbol.T.reshape(*u.shape[:extra], -1)
        return found

    @property
    @override
    def mode(self) -> Tensor:
        found = self.symbols.clone()
        for places, log_probs in self.rows():
            found[places] = log_probs.argmax(-1)
        return found


def log1pexp(v: Tensor) -> Tensor:
    """Return log(1 + e^v), elementwise."""
    return softplus(v, threshold=40.0)  # beyond it e^-v is less than a rounding error of v


def _any(where: Tensor | None, extra: int) -> Tensor | None:
    """Return which places are wanted in any of the draws, the first `extra` dimensions."""
    return where.flatten(0, extra - 1).any(0) if where is not None and extra else where


class MaybeMasked(Discrete):
    """A symbol with probability exp(log_shown), else the mask K.

    Args:
        source: distribution of the symbol.
        log_shown: broadcastable to the places, float64.
        log_masked: log(1 - exp(log_shown)), of the same shape.
    """

    def __init__(self, source: Symbols, log_shown: Tensor, log_masked: Tensor) -> None:
        self.source, self.mask = source, source.count
        self.log_shown, self.log_masked = log_shown, log_masked
        shape = broadcast_shape(source.batch_shape, log_shown.shape)
        Distribution.__init__(self, shape, validate_args=False)

    @property
    def log_probs(self) -> Tensor:  # type: ignore[override]
        """The table of all log-probabilities, the mask last, (..., K + 1)."""
        table = self.source.log_probs
        table = table.to(torch.promote_types(table.dtype, self.log_shown.dtype))
        shown = self.log_shown[..., None] + table
        return torch.cat([shown, self.log_masked[..., None].expand_as(shown[..., :1])], -1)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        shown = value != self.mask
        symbol = self.source.log_prob(torch.where(shown, value, 0), shown)
        return torch.where(shown, self.log_shown + symbol, self.log_masked)

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        u = rand(shape, shard, dtype=torch.float64, device=self.source.device)
        show = self.log_shown.exp()
        u = u * (show + self.log_masked.exp())
        shown = u < show
        return torch.where(shown, self.source.inverse(u / show, shown), self.mask)

    @property
    @override
    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)


@register_kl(MaybeMasked, MaybeMasked)
def _kl_maybe_masked(p: MaybeMasked, q: MaybeMasked) -> Tensor:
    masked, shown = p.log_masked > -torch.inf, p.log_shown > -torch.inf
    of_mask = p.log_masked.exp() * torch.where(masked, p.log_masked - q.log_masked, 0.0)
    shown = shown.expand(p.batch_shape)
    of_symbol = p.log_shown - q.log_shown + _kl_symbols(p.source, q.source, shown)
    return of_mask + p.log_shown.exp() * torch.where(shown, of_symbol, 0.0)


def _kl_symbols(p: Symbols, q: Symbols, where: Tensor) -> Tensor:
    if isinstance(p, Certain):
        return -q.log_prob(p.symbols, where)
    log_p, log_q = p.log_probs, q.log_probs
    log_ratio = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * log_ratio).sum(-1)
