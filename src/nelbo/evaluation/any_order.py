r"""log P(x) of a masked model that shows one symbol at a time, in random order: exact, if short.

Each order reaches x, so P(x) is the mean over all L! orders σ of Π_j P(x_σj | x_σ1..x_σj-1); the
any-order bound is the mean of their logarithms, and lies below log P(x) by Jensen. What follows
depends on what shows and not on how it came to show, so the mean is a recursion over the 2^L sets
S of places that show:

    f(all) = 1,   f(S) = 1/(L - |S|) Σ_{i not in S} P(x_i | x_S) f(S ∪ {i}),   P(x) = f(∅).

It takes 2^L - 1 network calls for each x.
"""

import math

import torch
from torch import Tensor

from nelbo.diffusion.batch import Batch, rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.unmasking import time_of_share

LONGEST = 16  # symbols of an example: 65 535 calls


def check_length(model: Model, batch: Batch) -> None:
    """Refuse examples with too many symbols for a recursion over all sets of them.

    Raises:
        ValueError: as said.
    """
    longest = int(model.scored_places(batch).flatten(1).sum(1).max())
    if longest > LONGEST:
        raise ValueError(
            "P(x) in random order takes 2^L network calls for L hidden symbols, of which at most"
            f" {LONGEST} are allowed; got {longest}: choose another order, or measure the bound"
            " alone"
        )


def calls_for(model: Model, batch: Batch) -> int:
    """Return the number of network calls that P(x) of these examples in random order takes."""
    scored = model.scored_places(batch).flatten(1).sum(1)
    return int((2 ** scored.long() - 1).sum())


def log_prob(model: Model, batch: Batch) -> Tensor:
    """Return log P(x|φ) of the sampler in random order; (B,), nats, exact.

    Args:
        model: a masked model; its `dtype` is the precision of the arithmetic around the network.
        batch: examples, of a model of tokens with what shows, of at most `LONGEST` hidden symbols.
    """
    mask, x = model.process.mask, batch.x.long().flatten(1)
    blank = model.blank(len(batch), batch.condition).long()
    hidden = model.scored_places(batch).flatten(1)
    found = torch.zeros(len(batch), dtype=torch.float64, device=x.device)
    for count in hidden.sum(1).unique().tolist():  # the sets of what shows, once for each length
        shows = _sets(count, x.device)
        t = time_of_share(model, 1 - shows.double().mean(1))
        for i in (hidden.sum(1) == count).nonzero()[:, 0]:
            places = hidden[i].nonzero()[:, 0]
            log_p = torch.zeros(shows.shape, dtype=torch.float64, device=x.device)
            for some in torch.arange(len(shows) - 1, device=x.device).split(model.rows):
                z = blank[i].flatten().repeat(len(some), 1)
                z[:, places] = torch.where(shows[some], x[i, places], z[:, places])
                z = z.view(len(some), *blank.shape[1:])
                given = rows_of(batch.condition, i.repeat(len(some)))
                symbols = model.predict(z, t[some], given).symbols(z, mask)
                each = symbols.log_prob(batch.x[i].long().expand_as(z), _hidden(model, z))
                log_p[some] = each.double().flatten(1)[:, places]
            found[i] = _mean_over_orders(log_p, shows)
    return found


def _sets(count: int, device: torch.device) -> Tensor:
    """Return all sets of places, as masks (2^count, count); bit i of their number is place i."""
    numbers = torch.arange(2**count, device=device)
    return (numbers[:, None] & (1 << torch.arange(count, device=device))) > 0


def _mean_over_orders(log_p: Tensor, shows: Tensor) -> Tensor:
    """Return log f(∅) from log P(x_i|x_S) of all sets S, (2^L, L), where i does not show."""
    count = shows.shape[1]
    bits = 1 << torch.arange(count, device=log_p.device)
    log_f = torch.zeros(len(shows), dtype=torch.float64, device=log_p.device)
    for size in reversed(range(count)):
        some = (shows.sum(1) == size).nonzero()[:, 0]
        further = (log_p[some] + log_f[some[:, None] | bits]).masked_fill(shows[some], -torch.inf)
        log_f[some] = further.logsumexp(1) - math.log(count - size)
    return log_f[0]


def _hidden(model: Model, z: Tensor) -> Tensor:
    assert model.process.mask is not None
    return z == model.process.mask
