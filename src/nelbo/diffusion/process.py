r"""The encoder q, which turns data into noise. All its conditionals are known in closed form.

For times s < t, e = embed(x), and α_t = sigmoid(-γ(t)) from a schedule, a process is given by
q(z_t|z_s), q(z_t|x) and q(z_s|z_t,x): Gaussian (`gaussian`, equations 2-6), masked (`masked`,
equation 9), uniform (`uniform`), or a product of these (`product`).

Each conditional is a method that returns a distribution with batch shape (B,). `posterior` serves
both q(z_s|z_t,x), given e, and the model's p(z_s|z_t), given a prediction of e.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.nn.functional import logsigmoid, one_hot
from typing_extensions import override

from nelbo._utils.batch_rng import BatchShard
from nelbo.diffusion.distributions import Discrete, draw
from nelbo.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from nelbo.diffusion.prediction import Prediction
    from nelbo.diffusion.symbols import Symbols

Shape = torch.Size | tuple[int, ...]


def per_example(distribution: Distribution) -> Independent:
    """Return the distribution of whole examples: all dimensions but the first are event ones."""
    return Independent(distribution, len(distribution.batch_shape) - 1, validate_args=False)


class ForwardProcess(nn.Module, ABC):
    """q(z_t|x) and its conditionals, with α_t from `schedule`.

    A new process is one subclass that passes `ProcessContract` of the tests; whatever differs
    between processes is a method here. The defaults suit symbols that noise replaces by others of
    the same codes. Control variates and costs known in advance, which improve estimates and are
    optional, are registered by class in `evaluation` (`references`, `step_costs`).
    """

    #: channels of `features` per dimension of the data
    channels: int
    #: numbers of e per dimension of the data
    width: int = 1
    #: number of codes of a dimension of the data, 0..codes-1; 0 for a real number
    codes: int = 0
    #: the value of z that masks a dimension, if z is either x or masked; else None
    mask: int | None = None
    #: whether masks may hide any symbols, equally likely sets of each size: a model of any order
    any_order: bool = False
    #: whether a network gets the codes of z, of one channel, and embeds them itself
    as_codes: bool = False
    #: code of x and z beyond the end of a shorter example, which costs nothing; None for none
    absent: int | None = None
    #: whether the process has a probability flow, a deterministic path from noise to data
    has_flow: bool = False
    #: name of the posterior as a reverse kernel, in comparisons
    posterior_name: str = "reverse step"
    #: whether all dimensions have the same process, so that some of them represent all
    alike: bool = True

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @property
    def factors(self) -> "Sequence[ForwardProcess]":
        """The processes of the groups of columns; for other data, this process alone."""
        return (self,)

    def split(self, v: Tensor) -> list[Tensor]:
        """Split x or z, (B, ...), into those of the `factors`."""
        return [v]

    @classmethod
    def require(cls, process: "ForwardProcess", need: str, hint: str = "") -> Self:
        """Return the process if it is of this class, for parts whose formulas hold only here.

        Args:
            process: to check.
            need: start of the message.
            hint: end of the message.

        Raises:
            ValueError: if it is of another class.
        """
        if not isinstance(process, cls):
            raise ValueError(f"{need}; got {type(process).__name__}{hint}")
        return process

    def log_alpha(self, t: Tensor | float) -> Tensor:
        """Return log α_t, shape of t, float64."""
        return logsigmoid(-self.schedule(t))

    def log_one_minus_alpha(self, t: Tensor | float) -> Tensor:
        """Return log(1 - α_t), shape of t, float64; not as a difference, so exact at both ends."""
        return logsigmoid(self.schedule(t))

    def alpha(self, t: Tensor | float) -> Tensor:
        """Return α_t, shape of t, float64."""
        return self.log_alpha(t).exp()

    def log_kept(self, s: Tensor | float, t: Tensor | float) -> Tensor:
        """Return log(α_t/α_s), the share of the signal at s that remains at t; log(1-β)."""
        return self.log_alpha(t) - self.log_alpha(s)

    def shows(self, t: Tensor) -> bool:
        """Return whether z_t is certain to tell x at all of the times t; so symbols may be."""
        return False

    def hides(self, t: Tensor) -> bool:
        """Return whether z_t is the same for all x and noise at all of the times t: all masks."""
        return self.mask is not None and bool((self.alpha(t) == 0).all())

    def blocks(self, shape: Shape) -> int:
        """Return the number of blocks of an example, which are noised one after the other."""
        return 1

    def block_of_places(self, shape: Shape) -> Tensor:
        """Return the number of the block of each dimension, from 0, whose noise is at one time."""
        return torch.zeros(shape, dtype=torch.long)

    def fit_statistics(self, x: Tensor) -> None:
        """Fit to training examples x, (N, ...), before training; does nothing here."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Return e, the data in the space of the process, float64."""

    @abstractmethod
    def features(self, z: Tensor) -> Tensor:
        """Return the input of a network, (B, C, ...), with `channels` channels for each of z."""

    @abstractmethod
    def log_snr_input(self, t: Tensor) -> Tensor:
        """Return the noise level that is an input of a network, shape of t."""

    @abstractmethod
    def transition(self, z: Tensor, s: Tensor, t: Tensor) -> Independent:
        """Return q(z_t|z_s) for z = z_s and s < t."""

    @abstractmethod
    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        """Return q(z_t|x) for e = embed(x)."""

    @abstractmethod
    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        """Return q(z_s|z_t,x) for z = z_t and s < t; e is embed(x) or a prediction of e."""

    def predicted_posterior(
        self, z: Tensor, prediction: "Prediction", s: Tensor, t: Tensor
    ) -> Independent:
        """Return `posterior` with a prediction of e in place of e."""
        return self.posterior(z, prediction.e_hat, s, t)

    def predicted_rate(self, z: Tensor, e: Tensor, prediction: "Prediction", t: Tensor) -> Tensor:
        """Return `rate` of a prediction of e, (B,)."""
        return self.rate(z, e, prediction.e_hat, t)

    def likelihood(self, prediction: "Prediction", z: Tensor, t: Tensor) -> Discrete:
        """Return P(x_i|z_t) of symbols: where z shows them certain, and else as predicted."""
        return prediction.symbols(z, self.mask)

    @abstractmethod
    def prior(self, shape: Shape, t: Tensor) -> Independent:
        """Return p(z_T) for the shape of one example and the last times t, shape (B,)."""

    def blank(self, shape: Shape) -> Tensor:
        """Return a latent without information on x, for the shape of one example, float64."""
        return torch.zeros(shape, dtype=torch.float64)

    def grid_width(self, shape: Shape, s: Tensor | None, t: Tensor, u: Tensor | None) -> Tensor:
        """Return the spacing of the grid on which z_t is coded, shape of one example; 1 here.

        Args:
            shape: of one example.
            s: the time before t on a grid of times, a scalar; None where t is the first.
            t: the time, a scalar.
            u: the time after t, a scalar; None where t is the last.
        """
        return torch.ones_like(t).expand(shape)

    def linear_transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return a and b, shape of t, if q(z_t|z_s) = N(a z_s, b²); None otherwise."""
        return None

    def window(self, t: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return how many places, from the first, a prediction at times t depends on; (B,) each.

        Also return the time in the schedule of those that noise reaches: all of them and t here.
        """
        return torch.full(t.shape, math.prod(shape), device=t.device), t

    def notes(self, symbol: str) -> tuple[str, ...]:
        """Return a sentence on the order of noise, if it has one that the bound depends on.

        Args:
            symbol: name of a dimension, such as token.
        """
        return ()

    def picture(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_t in the units of the data, for display, and a mask of hidden dimensions.

        Args:
            z: latents at one time, (B, ...); symbols here.
            t: their time, a scalar.
        """
        return z, torch.zeros_like(z, dtype=torch.bool)

    def mean(self, e: Tensor, z: Tensor) -> Tensor:
        """Return E[x|z_t] in the units of the data, shape of z, for a prediction e at z = z_t.

        Here e is the log-probabilities of the codes.
        """
        probabilities = e.exp()
        return probabilities @ torch.arange(probabilities.shape[-1]).to(probabilities)

    def reveal(self, x: Tensor, t: Tensor, shard: BatchShard | None = None) -> Tensor:
        """Return z_t of dimensions whose x is known: one draw of q(z_t|x), or x for symbols."""
        return draw(self.marginal(self.embed(x), t), shard)

    @abstractmethod
    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        """Return lim_{s→t} KL( posterior(z, e, s, t) ‖ posterior(z, e_hat, s, t) )/(t-s); (B,)."""


class SymbolProcess(ForwardProcess):
    """A process of symbols 0..K-1, which noise replaces; e is x itself.

    Args:
        schedule: γ, with α = sigmoid(-γ).
        count: the number K of symbols.
        states: number of values of z: K, or K + 1 with a mask.
        as_codes: a network gets the codes of z, one channel, and embeds them itself; by default
            it gets one channel for each state, one-hot.
        shorter: whether examples may be shorter than others: x and z are K beyond their end.
    """

    posterior_name = "categorical step"

    def __init__(
        self, schedule: Schedule, count: int, states: int, as_codes: bool, shorter: bool
    ) -> None:
        super().__init__(schedule)
        if count < 2:
            raise ValueError(f"levels must be at least 2; got {count}")
        self.count = self.codes = count
        self.as_codes, self.channels = as_codes, 1 if as_codes else states
        self.absent = count if shorter else None

    @override
    def shows(self, t: Tensor) -> bool:
        return bool((self.log_one_minus_alpha(t) == -torch.inf).all())

    @override
    def embed(self, x: Tensor) -> Tensor:
        return x.long()

    @abstractmethod
    def symbols(self, e: Tensor, z: Tensor) -> "Symbols":
        """Return the distribution of the symbols given z, of known ones e or log P, (..., K)."""

    @abstractmethod
    def posterior_of(self, z: Tensor, symbols: "Symbols", s: Tensor, t: Tensor) -> Independent:
        """Return q(z_s|z_t) of symbols with a distribution given z = z_t."""

    @abstractmethod
    def rate_of(self, z: Tensor, e: Tensor, symbols: "Symbols", t: Tensor) -> Tensor:
        """Return `rate` of a prediction with a distribution of the symbols, (B,)."""

    @override
    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        return self.posterior_of(z, self.symbols(e, z), s, t)

    @override
    def predicted_posterior(
        self, z: Tensor, prediction: "Prediction", s: Tensor, t: Tensor
    ) -> Independent:
        return self.posterior_of(z, prediction.symbols(z, self.mask), s, t)

    @override
    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        return self.rate_of(z, e, self.symbols(e_hat, z), t)

    @override
    def predicted_rate(self, z: Tensor, e: Tensor, prediction: "Prediction", t: Tensor) -> Tensor:
        return self.rate_of(z, e, prediction.symbols(z, self.mask), t)

    @override
    def mean(self, e: Tensor, z: Tensor) -> Tensor:
        return e.double() if e.ndim == z.ndim else super().mean(e, z)

    @override
    def features(self, z: Tensor) -> Tensor:
        if self.as_codes:
            return z.double()
        # K has a channel as the mask; without masks, none, where a shorter example has no symbol
        of_code = one_hot(z.long(), self.count + 1)[..., : self.channels]
        return of_code.movedim(-1, 2).flatten(1, 2).double()
