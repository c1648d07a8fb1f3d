r"""Samplers on a grid of T times, with T network calls per sample.

ancestral         z_T ~ P(z_T),  z_{t-1} ~ P(z_{t-1}|z_t),  x ~ P(x|z_1): the distribution
                  of the model, whose bound `evaluate` gives for the same grid and step
rejection         x ~ P(x|x in S): draws outside S are drawn again as a whole
probability_flow  z_s = √α_s ê + √(1-α_s) ε̂, then the most probable x: deterministic given
                  z_T (Song et al. 2021, DDIM with η = 0); not the distribution of the bound
complete          the unknown dimensions of x given the known ones

In `complete`, known dimensions follow q(z_s|z_t,x) and unknown ones P(z_s|z_t). In masked
diffusion, known symbols are visible from the start and each step draws from P(x_i|visible ones):
the model's conditional distribution, in the order in which the steps unmask. In Gaussian diffusion
it is an approximation: P(z_s|z_t) sees the known dimensions with the noise of time t instead of x.
Returning to z_t ~ q(z_t|z_s) and repeating the step makes both parts consistent (RePaint, Lugmayr
et al. 2022).

With a condition for each sample, a model draws from P(x|c). Several processes share the samples,
with the same noise as on one process (`nelbo._utils.batch_rng`).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nelbo._utils.arguments import checked
from nelbo._utils.batch_rng import BatchShard, gather_rows, local_shard
from nelbo._utils.numerics import derive_seed, seeded
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.times import TimeGrid, grid_of

MOST = 20  # draws per accepted sample, at most, on average
PATIENCE = 1000  # draws for any one sample, at most about
BELIEVED = 200  # draws after which the acceptance rate is trusted
NO_NUMBERS = (
    "the network's output is not finite, so there is nothing to draw from: its weights are damaged"
    " or grew without bound; restore them from a copy, or train again with a smaller --lr"
)


@checked
def ancestral(
    model: Model,
    count: int,
    times: TimeGrid | int,
    seed: int = 0,
    track: Track = iter,
    condition: Tensor | None = None,
) -> Tensor:
    """Draw x ~ P(x|φ) by ancestral sampling.

    Args:
        model: the model.
        count: number of samples.
        times: the grid, or a number of even steps.
        seed: of everything random.
        track: wraps the steps, for a progress bar.
        condition: c of each sample, (count, F), for a model of P(x|c).

    Returns:
        Samples in the space of the data, shape (count, *model.shape).
    """

    def step(rows: Tensor, z: Tensor, s: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        return draw(model.reverse(z, s, t, rows_of(condition, rows)), part)

    def decode(rows: Tensor, z: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        return draw(model.likelihood(z, t, rows_of(condition, rows)), part)

    model.check_condition(condition, count)
    return descend(model, count, times, seed, step, decode, track=track)


def check_path(model: Model) -> None:
    """Refuse a model whose latents have no deterministic path.

    Raises:
        ValueError: as said.
    """
    if not model.process.has_flow:
        raise ValueError(
            f"a deterministic path needs a Gaussian process; the model's is"
            f" {type(model.process).__name__}; use the ancestral sampler"
        )


def probability_flow(
    model: Model,
    count: int,
    times: TimeGrid | int,
    seed: int = 0,
    track: Track = iter,
    condition: Tensor | None = None,
) -> Tensor:
    """Return x at the end of the deterministic path from z_T ~ P(z_T).

    Arguments and result are as for `ancestral`.

    Raises:
        ValueError: if the process has no such path, as symbols have none.
    """
    process = model.process
    check_path(model)

    def step(rows: Tensor, z: Tensor, s: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        e_hat = model.predict(z, t, rows_of(condition, rows)).e_hat
        q_s, q_t = process.marginal(e_hat, s).base_dist, process.marginal(e_hat, t).base_dist
        return q_s.loc + q_s.scale * (z - q_t.loc) / q_t.scale

    def decode(rows: Tensor, z: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        return model.likelihood(z, t, rows_of(condition, rows)).mode

    model.check_condition(condition, count)
    return descend(model, count, times, seed, step, decode, track=track)


def complete(
    model: Model,
    x: Tensor,
    known: Tensor,
    times: TimeGrid | int,
    seed: int = 0,
    rounds: int = 1,
    track: Track = iter,
    condition: Tensor | None = None,
) -> Tensor:
    """Draw the unknown dimensions of x given the known ones.

    Args:
        model: the model.
        x: examples in the space of the data, shape (N, *model.shape); unknown dimensions may have
            any value of the data.
        known: mask of the known dimensions, booleans that broadcast to x.
        times: the grid, or a number of even steps.
        seed: of everything random.
        rounds: repetitions of each step; a sample takes T times as many network calls.
        track: wraps the steps, for a progress bar.
        condition: c of each sample, (N, F), for a model of P(x|c).

    Returns:
        x with the unknown dimensions drawn, shape (N, *model.shape).

    Raises:
        ValueError: if the examples have another shape, or `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    if x.shape[1:] != model.shape:
        raise ValueError(f"examples must have the shape {model.shape}; got {tuple(x.shape[1:])}")
    process, known = model.process, known.expand(x.shape).to(model.device)
    x = x.to(model.device)

    def start(rows: Tensor, z: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        return torch.where(known[rows], process.reveal(x[rows], t, part), z)

    def step(rows: Tensor, z: Tensor, s: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        e, here, lower = model.embed(x[rows]), known[rows], z
        for turn in range(rounds):
            if turn:
                z = torch.where(here, z, draw(process.transition(lower, s, t), part))
            free = draw(model.reverse(z, s, t, rows_of(condition, rows)), part)
            lower = torch.where(here, draw(process.posterior(z, e, s, t), part), free)
        return lower

    def decode(rows: Tensor, z: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        drawn = draw(model.likelihood(z, t, rows_of(condition, rows)), part)
        return torch.where(known[rows], x[rows], drawn)

    model.check_condition(condition, len(x))
    return descend(model, len(x), times, seed, step, decode, start, track)


class LowAcceptanceError(ValueError):
    """Rejection sampling accepts hardly any sample."""


class Accepted(NamedTuple):
    """Samples that rejection sampling accepted.

    Attributes:
        x: the samples, (count, *shape).
        drawn: number of draws that they took.
        outside: number of these draws outside the set.
    """

    x: Tensor
    drawn: int
    outside: int


def rejection(
    draw: Callable[[Tensor, int], Tensor],
    count: int,
    inside: Callable[[Tensor], Tensor],
    seed: int = 0,
) -> Accepted:
    """Draw x ~ P(x|x in S): samples outside S are drawn again, as a whole, until they are in S.

    For x in S, P(x|x in S) >= P(x). The first draws depend on the seed alone, not on S.

    Args:
        draw: returns samples for rows, (N,), and a seed.
        count: number of samples.
        inside: returns which of the samples it gets are in S, booleans (N,).
        seed: of everything random.

    Raises:
        LowAcceptanceError: if a sample in S takes more than MOST draws on average.
    """
    waiting, drawn, outside, tries, found = torch.arange(count), 0, 0, 0, None
    for turn in itertools.count():
        share = 1 - outside / drawn if drawn else 1.0
        often = math.ceil(1 / max(share, 1 / MOST)) << max(turn - 1, 0)
        tries += often
        rows = waiting.repeat_interleave(often)
        x = draw(rows, derive_seed(seed, turn) if turn else seed)
        good = inside(x)
        drawn, outside = drawn + len(rows), outside + int((~good).sum())
        found = x.new_empty((count, *x.shape[1:])) if found is None else found
        good = good.reshape(-1, often)
        done, first = good.any(1), good.int().argmax(1)
        chosen = x.reshape(-1, often, *x.shape[1:])[torch.arange(len(waiting)), first]
        found[waiting[done]] = chosen[done]
        waiting = waiting[~done]
        kept = drawn - outside
        if not len(waiting):
            return Accepted(found, drawn, outside)
        if (drawn >= BELIEVED and MOST * kept < drawn) or tries >= PATIENCE:
            raise LowAcceptanceError(
                f"only {kept} of {drawn} samples that the model drew lie in the required set"
            )
    raise AssertionError


def descend(
    model: Model,
    count: int,
    times: TimeGrid | int,
    seed: int,
    step: Callable[[Tensor, Tensor, Tensor, Tensor, BatchShard], Tensor],
    decode: Callable[[Tensor, Tensor, Tensor, BatchShard], Tensor],
    start: Callable[[Tensor, Tensor, Tensor, BatchShard], Tensor] = lambda rows, z, t, part: z,
    track: Track = iter,
) -> Tensor:
    """Sample from z_T down to z_1 and x, as many rows at a time as memory allows.

    Args:
        model: the model.
        count: number of samples.
        times: the grid, or a number of even steps.
        seed: of everything random.
        step: returns z_s for rows, z_t, s, t and the shard of which the rows are.
        decode: returns x for rows, z_1, the time of z_1 and the shard.
        start: returns z_T for rows, a draw from the prior, the last time and the shard.
        track: wraps the steps, for a progress bar.

    Returns:
        Samples in the space of the data, shape (count, *model.shape).

    Raises:
        ValueError: if `count` is below 1, or an output of the network is not finite.
    """
    if count < 1:
        raise ValueError(f"the number of samples must be at least 1; got {count}")
    grid = grid_of(model, times).times.to(model.device)
    parts, blocks = [], torch.arange(count).split(model.rows)
    calls = iter(track(range(len(blocks) * len(grid))))  # of all blocks, for one progress bar
    with measuring(model), seeded(seed), numbers_only(model.network):
        for rows in blocks:
            part = local_shard(len(rows))
            own = part.of(rows)
            t = [each.expand(len(own)) for each in grid]
            z = start(own, draw(model.process.prior(model.shape, t[-1]), part), t[-1], part)
            for i in range(len(grid) - 1, 0, -1):
                next(calls)
                z = step(own, z, t[i - 1], t[i], part)
            next(calls)
            parts.append(gather_rows(part, decode(own, z, t[0], part)))
        next(calls, None)  # completes the progress bar
    return torch.cat(parts)


@contextmanager
def numbers_only(network: nn.Module) -> Iterator[None]:
    """Inside, raise a ValueError when an output of the network is not finite.

    Draws from such an output would be meaningless, such as the first symbol every time.
    """

    def check(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.isfinite().all():
            raise ValueError(NO_NUMBERS)

    handle = network.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
