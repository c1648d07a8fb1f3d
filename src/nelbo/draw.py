"""One network call and what it saw."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.heads import Prediction
from nelbo.model import Model
from nelbo.terms import Term


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
def same_noise(draw: Draw) -> Iterator[None]:
    """What is random within has the noise that the draw's cost had."""
    with torch.random.fork_rng([draw.z.device] if draw.z.is_cuda else []):
        if draw.z.is_cuda:
            torch.cuda.set_rng_state(draw.state, draw.z.device)
        else:
            torch.set_rng_state(draw.state)
        yield
