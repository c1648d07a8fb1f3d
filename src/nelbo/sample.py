r"""Samplers on a grid of T times, T network calls.

ancestral         z_T ~ P(z_T),  z_{t-1} ~ P(z_{t-1}|z_t),  x ~ P(x|z_1): the model's own law,
                  the one whose bound `evaluate` states for the same grid and step
probability_flow  z_s = √α_s ê + √(1-α_s) ε̂, the most probable x at the end: deterministic
                  given z_T (Song et al. 2021, DDIM with η = 0); not the law of the bound
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nelbo._numerics import draw, seeded
from nelbo._progress import Track
from nelbo.estimate import Grid
from nelbo.model import Model, measuring
from nelbo.process import Gaussian


def ancestral(model: Model, count: int, times: Grid, seed: int = 0, track: Track = iter) -> Tensor:
    """x ~ P(x|φ) by ancestral sampling.

    Args:
        model: the model.
        count: number of samples.
        times: the grid; `Grid.uniform(T)`.
        seed: everything random follows from it.
        track: wraps the steps, for a progress bar.

    Returns:
        Samples in the space of the data, shape (count, *model.shape).
    """

    def step(z: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return draw(model.reverse(z, s, t))

    def decode(z: Tensor, t: Tensor) -> Tensor:
        return model.likelihood(z, t).sample()

    return _descend(model, count, times, seed, step, decode, track)


def probability_flow(
    model: Model, count: int, times: Grid, seed: int = 0, track: Track = iter
) -> Tensor:
    """x at the end of the deterministic path from z_T ~ P(z_T); arguments as for `ancestral`.

    Raises:
        ValueError: the process is not Gaussian: symbols have no deterministic path.
    """
    process = model.process
    if not isinstance(process, Gaussian):
        raise ValueError(
            f"a deterministic path needs a Gaussian process; the model's is"
            f" {type(process).__name__}; use the ancestral sampler"
        )

    def step(z: Tensor, s: Tensor, t: Tensor) -> Tensor:
        e_hat = model.predict(z, t).e_hat
        q_s, q_t = process.marginal(e_hat, s).base_dist, process.marginal(e_hat, t).base_dist
        return q_s.loc + q_s.scale * (z - q_t.loc) / q_t.scale

    def decode(z: Tensor, t: Tensor) -> Tensor:
        return model.likelihood(z, t).mode

    return _descend(model, count, times, seed, step, decode, track)


def _descend(
    model: Model,
    count: int,
    times: Grid,
    seed: int,
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    decode: Callable[[Tensor, Tensor], Tensor],
    track: Track,
) -> Tensor:
    """From z_T down to z_1 and x, as many at a time as memory allows."""
    if count < 1:
        raise ValueError(f"the number of samples must be at least 1; got {count}")
    grid = times.times.to(model.device)
    parts = []
    with measuring(model), seeded(seed):
        for begin in range(0, count, model.rows):
            n = min(model.rows, count - begin)
            z = model.process.prior(model.shape, grid[-1].expand(n)).sample()
            for i in track(range(len(grid) - 1, 0, -1)):
                z = step(z, grid[i - 1].expand(n), grid[i].expand(n))
            parts.append(decode(z, grid[0].expand(n)))
    return torch.cat(parts)
