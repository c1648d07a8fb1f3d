r"""Masked diffusion, of a whole example or of one block of it after the other.

Each symbol is kept with the probability α of its place, else masked (equation 9). z holds symbols
0..K-1 or the mask K. e is x itself; a prediction of it has log-probabilities (..., K), of which
those of the masked places alone are computed (`symbols`).

    MaskedDiffusion   α_t is that of all places
    BlockDiffusion    blocks of places are masked one after the other, the last one first:

        log P(x) = Σ_b log P(x_b|x_<b),   block b of n:  τ_b = clamp(n t - (n - 1 - b), 0, 1)

    A block has the α of its own time τ_b. While it is masked, those before it are clean and those
    after it masked wholly, so the bound is the sum over blocks of the bounds of masked diffusion
    of a block given the text before it, and an even draw of t draws a block, and a time in it.

Sources: Austin et al. 2021 (D3PM, absorbing state), Shi et al. 2024 (MD4), Arriola et al. 2025
(BD3-LM).
"""

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Independent
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo._utils.batch_rng import BatchShard
from nelbo._utils.numerics import log1mexp, slope
from nelbo._utils.scalars import integer
from nelbo.diffusion.distributions import Discrete
from nelbo.diffusion.process import Shape, SymbolProcess, per_example
from nelbo.diffusion.schedules import Schedule
from nelbo.diffusion.symbols import Certain, MaybeMasked, Predicted, Symbols, Uniform

if TYPE_CHECKING:
    from nelbo.diffusion.prediction import Prediction

SAME = 1e-9  # difference of times, in blocks, that rounding may make


class Masking(SymbolProcess):
    """Masks, with a time of each place in the schedule.

    Args:
        schedule: γ, with α = sigmoid(-γ).
        count: the number K of symbols.
        as_codes: a network gets the codes of z, one channel, and embeds them itself; by default
            it gets K + 1 channels, one-hot, the last for the mask.
        shorter: whether examples may be shorter than others: x and z are K beyond their end, which
            costs nothing.
    """

    mask: int

    @checked
    def __init__(
        self, schedule: Schedule, count: int, as_codes: bool = False, shorter: bool = False
    ) -> None:
        super().__init__(schedule, count, count + 1, as_codes, shorter)
        self.mask = count

    @abstractmethod
    def times_of_places(self, t: Tensor, shape: Shape) -> Tensor:
        """Return the time in the schedule of each place, broadcastable to (B, *shape)."""

    @abstractmethod
    def rates_of_places(self, t: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return -α'/(1-α) of the places that are being masked, (B,), and a mask of these."""

    @override
    def log_snr_input(self, t: Tensor) -> Tensor:
        # Given the visible symbols, P(x|z_t) does not depend on t (Ou et al. 2024).
        return torch.zeros_like(t)

    def _kept(self, s: Tensor, t: Tensor) -> Tensor:
        """Return log(α_t/α_s) at times of places; 0 where all is masked at s already."""
        gone = self.log_alpha(s) == -torch.inf
        return torch.where(gone, 0.0, self.log_kept(s, t))

    @override
    def transition(self, z: Tensor, s: Tensor, t: Tensor) -> Independent:
        kept = self._kept(*(self.times_of_places(v, z.shape[1:]) for v in (s, t)))
        shown = z != self.mask
        log_shown = torch.where(shown, kept, -torch.inf)
        log_masked = torch.where(shown, log1mexp(kept), 0.0)
        symbols = Certain(torch.where(shown, z, 0), self.count)
        return per_example(MaybeMasked(symbols, log_shown, log_masked))

    @override
    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        t = self.times_of_places(t, e.shape[1:])
        shown, masked = self.log_alpha(t), self.log_one_minus_alpha(t)
        return per_example(MaybeMasked(Certain(e, self.count), shown, masked))

    @override
    def posterior_of(self, z: Tensor, symbols: Symbols, s: Tensor, t: Tensor) -> Independent:
        s, t = (self.times_of_places(v, z.shape[1:]) for v in (s, t))
        masked = self.log_one_minus_alpha(t)
        reveal = self.log_alpha(s) + log1mexp(self._kept(s, t)) - masked
        stay = self.log_one_minus_alpha(s) - masked
        hidden = z == self.mask
        log_shown = torch.where(hidden, reveal, 0.0)
        log_masked = torch.where(hidden, stay, -torch.inf)
        return per_example(MaybeMasked(symbols, log_shown, log_masked))

    @override
    def blank(self, shape: Shape) -> Tensor:
        return torch.full(shape, self.mask, dtype=torch.float64)

    @override
    def picture(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return z, z == self.mask

    @override
    def mean(self, e: Tensor, z: Tensor) -> Tensor:
        """Return E[x|z_t], where visible symbols are certain."""
        mean = super().mean(e, z)
        return torch.where(z == self.mask, mean, z.to(mean))

    @override
    def prior(self, shape: Shape, t: Tensor) -> Independent:
        # Symbols are unmasked with probability α_T, uniformly: without them, the KL is infinite.
        symbols = Uniform(self.count, torch.Size((len(t), *shape)), t.device)
        t = self.times_of_places(t, shape)
        shown, masked = self.log_alpha(t), self.log_one_minus_alpha(t)
        return per_example(MaybeMasked(symbols, shown, masked))

    @override
    def rate_of(self, z: Tensor, e: Tensor, symbols: Symbols, t: Tensor) -> Tensor:
        """Return -α'(t)/(1-α_t) Σ_masked -log P(x_i|z_t), (B,) (equation 9); -α'/(1-α) = γ' α."""
        rates, places = self.rates_of_places(t, z.shape[1:])
        hidden = (z == self.mask) & places
        surprise = torch.where(hidden, -symbols.log_prob(e, hidden).double(), 0.0)
        return rates * surprise.flatten(1).sum(1)

    @override
    def symbols(self, e: Tensor, z: Tensor) -> Symbols:
        if e.ndim == z.ndim:
            return Certain(torch.where(z == self.mask, e.long(), z.long()), self.count)
        return Predicted(e, z, self.mask, dtype=e.dtype)


class MaskedDiffusion(Masking):
    """Masked diffusion: all places have the same α_t; see `Masking` for the arguments."""

    any_order = True

    @override
    def times_of_places(self, t: Tensor, shape: Shape) -> Tensor:
        return t.reshape(-1, *(1 for _ in shape))

    @override
    def rates_of_places(self, t: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        everywhere = torch.ones((1, *(1 for _ in shape)), dtype=torch.bool, device=t.device)
        return slope(self.schedule, t) * self.alpha(t), everywhere

    @override
    def reveal(self, x: Tensor, t: Tensor, shard: BatchShard | None = None) -> Tensor:
        # The model predicts from any visible symbols, so known ones may be visible at any time.
        return x


class BlockDiffusion(Masking):
    """Masked diffusion of blocks, each given the clean ones before it (BD3-LM).

    Places are counted from the first, over all dimensions of an example; the last block may be
    shorter. Blocks of one place are an autoregressive model, whose bound is exact, and one block
    is `MaskedDiffusion`. Any network will do: what it must not see is masked. A step over several
    blocks shows them independently, given what shows before it.

    Args:
        schedule: γ over the time τ of a block, with α = 1 at 0 and 0 at 1 where the text before a
            block is to be clean and that after it masked, such as `PowerAlpha`.
        count: the number K of symbols.
        block: places of a block.
        as_codes: see `Masking`.
        shorter: likewise.
    """

    alike = False

    @checked
    def __init__(
        self,
        schedule: Schedule,
        count: int,
        block: int,
        as_codes: bool = False,
        shorter: bool = False,
    ) -> None:
        super().__init__(schedule, count, as_codes, shorter)
        self.block = integer("block", block, 1)

    @override
    def blocks(self, shape: Shape) -> int:
        return -(-torch.Size(shape).numel() // self.block)

    @override
    def block_of_places(self, shape: Shape) -> Tensor:
        return (torch.arange(torch.Size(shape).numel()) // self.block).view(shape)

    def current(self, t: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return the block that is being masked at the times t, from 0, and its τ; (B,) each.

        At n t = 1, 2, .. it is the one whose last symbols are masked then.
        """
        n = self.blocks(shape)
        passed = self._passed(t, n)
        done = (passed.ceil() - 1).clamp(min=0)
        return (n - 1 - done).long(), passed - done

    @override
    def window(self, t: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        block, tau = self.current(t, shape)
        return (block + 1) * self.block, tau

    @override
    def notes(self, symbol: str) -> tuple[str, ...]:
        return (
            f"blocks of {self.block} {symbol}s are hidden one after the other, each given the"
            f" {symbol}s before it",
        )

    @staticmethod
    def _passed(t: Tensor, n: int) -> Tensor:
        """Return n t, and the integer where rounding alone keeps it from being one."""
        passed = n * t
        whole = passed.round()
        return torch.where((passed - whole).abs() < SAME, whole, passed)

    @override
    def times_of_places(self, t: Tensor, shape: Shape) -> Tensor:
        n, dims = self.blocks(shape), torch.Size(shape).numel()
        after = n - 1 - torch.arange(dims, device=t.device) // self.block
        times = (self._passed(t, n)[:, None] - after).clamp(0, 1)
        return times.view(-1, *shape)

    @override
    def rates_of_places(self, t: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        block, tau = self.current(t, shape)
        dims = torch.Size(shape).numel()
        places = torch.arange(dims, device=t.device) // self.block == block[:, None]
        rates = self.blocks(shape) * slope(self.schedule, tau) * self.alpha(tau)
        return rates, places.view(-1, *shape)

    @override
    def predicted_posterior(
        self, z: Tensor, prediction: "Prediction", s: Tensor, t: Tensor
    ) -> Independent:
        self._check_step(prediction, s, t, z.shape[1:])
        return super().predicted_posterior(z, prediction, s, t)

    @override
    def likelihood(self, prediction: "Prediction", z: Tensor, t: Tensor) -> Discrete:
        self._check_step(prediction, torch.zeros_like(t), t, z.shape[1:])
        return super().likelihood(prediction, z, t)

    def _check_step(self, prediction: "Prediction", s: Tensor, t: Tensor, shape: Shape) -> None:
        """Raise a ValueError if a step shows symbols of a block that is not predicted."""
        n = self.blocks(shape)
        begun = (self._passed(t, n).ceil() - 1).clamp(min=0)
        if prediction.ends_with_block and (self._passed(s, n) < begun).any():
            raise ValueError(
                f"each step shows tokens of one block, and there are {n} blocks: the number of"
                f" steps must be a multiple of {n}; or leave the steps out"
            )
