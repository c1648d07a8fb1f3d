r"""The order in which a masked model shows its symbols, k at a time.

A sampler that shows first what the model is surest of takes the order from what shows already:

    left-to-right   the first hidden places
    greedy          the largest probability of any symbol
    margin          the largest difference of the two most probable symbols
    entropy         the least entropy

and draws the k symbols of a step independently, at temperature 1. Ties go to the earlier place. As
the order is a function of what shows, one path leads to each x, and its probability is exact:

    P(x) = Π_steps Π_{i in next(z)} P(x_i|z),   z = what shows before the step.

A model with a time input gets the time at which this share of its symbols is hidden. Of block
diffusion, the symbols are those of the first block in which one is hidden: blocks follow each
other from left to right, and the order is one within each.

`random`, one symbol at a time in any order, has many paths to each x, and P(x) is a mean over them
(`evaluation.any_order`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.schedules import time_of
from nelbo.diffusion.symbols import Predicted


def _margin(log_p: Tensor) -> Tensor:
    best = log_p.exp().topk(min(2, log_p.shape[-1]), -1).values
    return best[:, 0] - best[:, 1:].sum(-1)


RANDOM = "random"
#: how sure a model is of a place, from its log-probabilities there (n, K); None for no such order
SURENESS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "left-to-right": None,
    "greedy": lambda log_p: log_p.amax(-1),
    "margin": _margin,
    "entropy": lambda log_p: -torch.special.entr(log_p.exp()).sum(-1),
}
_TEMPERED = "it draws from other probabilities than the model's, which have temperature 1"
#: why samplers of these names have no such likelihood
REFUSED = {
    "confidence": "it looks at the symbols drawn, so it reaches each x by many paths; greedy takes"
    " the largest probability of any symbol instead",
    "top-p": _TEMPERED,
    "top-k": _TEMPERED,
    "temperature": _TEMPERED,
}


@dataclass(frozen=True)
class UnmaskingOrder:
    """An order that is a function of what shows, or the random one.

    Args:
        name: left-to-right, greedy, margin, entropy or random.
        tokens_per_step: k, the number of symbols that a step shows; the last shows what is left.

    Raises:
        ValueError: the order has no exact likelihood, or k is below 1.
    """

    name: str
    tokens_per_step: int = 1

    def __post_init__(self) -> None:
        if self.name not in (*SURENESS, RANDOM):
            why = REFUSED.get(self.name, "it is no order that looks only at what shows")
            known = ", ".join([*SURENESS, RANDOM])
            raise ValueError(f"the sampler must be one of {known}; got {self.name!r}: {why}")
        count = integer("tokens_per_step", self.tokens_per_step, 1)
        if self.name == RANDOM and count > 1:
            raise ValueError(f"random shows one symbol at a time; got tokens_per_step {count}")
        object.__setattr__(self, "tokens_per_step", count)

    def mask_of(self, model: Model) -> int:
        """Return the value of z that hides a symbol.

        Raises:
            ValueError: if the model masks no symbols, or, for the random order, those of one block
                after the other.
        """
        mask = model.process.mask
        if mask is None or (self.name == RANDOM and not model.process.any_order):
            raise ValueError(
                f"the sampler {self.name} needs a masked model; got one of"
                f" {type(model.process).__name__}"
            )
        return mask

    def next(self, symbols: Predicted, hidden: Tensor) -> Tensor:
        """Return a mask of the places that are shown next, shape of `hidden`.

        Args:
            symbols: what the model predicts from what shows.
            hidden: mask of the places that can be shown, (B, ...).
        """
        score = torch.full(hidden.shape, -torch.inf, dtype=torch.float64, device=hidden.device)
        sureness = SURENESS[self.name]
        if sureness is None:
            score[hidden] = 0.0
        else:
            for places, log_p in symbols.rows(hidden):
                score[places] = sureness(log_p).double()
        ranked = score.flatten(1).sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(hidden).flatten(1)
        chosen = chosen.scatter(1, ranked[:, : self.tokens_per_step], True)
        return chosen.view_as(hidden) & hidden


def order_of_name(
    sampler: str | None, tokens_per_step: int | None = None
) -> UnmaskingOrder | None:
    """Return the order of that name; None for none.

    Args:
        sampler: name of the order, or None.
        tokens_per_step: k; 1 where left out.

    Raises:
        ValueError: the order has no exact likelihood, or k was given without an order.
    """
    if sampler is None:
        if tokens_per_step is not None:
            raise ValueError("tokens_per_step belongs to a sampler; give one, such as greedy")
        return None
    return UnmaskingOrder(sampler, 1 if tokens_per_step is None else tokens_per_step)


def order_for(
    model: Model, sampler: str | None, tokens_per_step: int | None = None
) -> UnmaskingOrder | None:
    """Return the order of that name for a model to sample or measure, see `order_of_name`.

    Raises:
        ValueError: as there, or the model masks no symbols.
    """
    order = order_of_name(sampler, tokens_per_step)
    if order is not None:
        order.mask_of(model)
    return order


def unmask(
    model: Model,
    z: Tensor,
    condition: Tensor | None,
    order: UnmaskingOrder,
    show: Callable[[Predicted, Tensor, Tensor], Tensor],
    places: Tensor | None = None,
) -> Tensor:
    """Show the hidden symbols of z in an order; return x, shape of z.

    A step calls the network once for each row in which something is hidden.

    Args:
        model: a masked model.
        z: symbols and masks at the start, such as `model.blank`, (B, ...).
        condition: of each row, or None.
        order: the order.
        show: returns the symbols that z gets, (R, ...), from their distribution, a mask of the
            places (R, ...) and the rows of z that these are, (R,).
        places: mask of the places to show, shape of z; those that hold the mask where left out.
    """
    z, mask = z.long().clone(), order.mask_of(model)
    scored = (z == mask) if places is None else places
    left = scored.clone()
    while len(rows := left.flatten(1).any(1).nonzero()[:, 0]):
        now, (t, hidden) = z[rows], _current(model, left[rows], scored[rows])
        symbols = model.predict(now, t, rows_of(condition, rows)).symbols(now, mask)
        chosen = order.next(symbols, hidden)
        z[rows] = torch.where(chosen, show(symbols, chosen, rows), now)
        left[rows] = left[rows] & ~chosen
    return z


def _current(model: Model, left: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the time at which these places are hidden, (B,), and those of the first block.

    Args:
        model: a masked model, of blocks or of one block of all places.
        left: mask of the places that are hidden, (B, ...), at least one of each row.
        scored: mask of the places that were hidden at the start, likewise.
    """
    block = model.process.block_of_places(left.shape[1:]).to(left.device)
    after = torch.where(left, block.max() - block, -1).flatten(1).amax(1)  # blocks, (B,)
    inside = block.max() - block == after.view(-1, *(1,) * block.ndim)
    hidden, of_block = left & inside, scored & inside
    share = hidden.flatten(1).sum(1) / of_block.flatten(1).sum(1).double()
    return (after + time_of_share(model, share)) / (block.max() + 1), hidden


def time_of_share(model: Model, hidden: Tensor) -> Tensor:
    """Return the time at which this share of the symbols is hidden, 1 - α_t; shape of `hidden`."""
    schedule = model.process.schedule
    return time_of(schedule, hidden.double().logit(), schedule.start)
