"""The bound of each pixel or column, before the sum over dimensions.

Every distribution of the bound is a product over dimensions i given z, so each term splits:

    -ELBO = Σ_i KL_i( q(z_T|x) ‖ P(z_T) ) + E[ -log P(x_i|z_1) ]
                + Σ_t E KL_i( q(z_{t-1}|z_t,x) ‖ P(z_{t-1}|z_t) )
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from nelbo.data.columns import Column, places
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import draw, kl, kl_noise
from nelbo.diffusion.elbo import Bound
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.reverse import Mixture, Posterior, ReverseKernel
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.blocks import joined, map_blocks


def steps_of(model: Model) -> dict[str, ReverseKernel]:
    """Return the reverse kernels that this model can use, by name, its own included."""
    values = model.head.level_values
    mixture = [] if values is None else [Mixture(values)]
    # the model's own is last, and so the one that its name stands for
    steps: list[ReverseKernel] = [*mixture, Posterior(), model.step]
    return {step.name(model.process): step for step in steps if step.fits(model.process)}


def own_step(model: Model) -> str:
    """Return the name of the model's own reverse kernel."""
    return model.step.name(model.process)


def by_dimension(
    model: Model,
    x: Tensor | Batch,
    times: TimeGrid,
    steps: Sequence[ReverseKernel] = (),
    seed: int = 0,
) -> list[Bound]:
    """Draw each term of −ELBO on a grid once, with T network calls per example.

    Args:
        model: the model.
        x: examples in the space of the data, shape (N, *model.shape), or a `Batch`.
        times: the grid.
        steps: reverse kernels P(z_s|z_t) to compare; that of the model where left out.
        seed: of everything random.

    Returns:
        For each kernel Bound(prior, reconstruction, diffusion), shape (N, *model.shape), nats. The
        draws of z, and therefore the first two terms, are common to all kernels.
    """
    batch, steps = model.batch(x), steps or (model.step,)
    blocks = batch.order.split(model.rows)

    def one(some: Batch, g: int) -> list[Bound]:
        return [
            Bound(*(term.cpu() for term in bound)) for bound in _block(model, some, times, steps)
        ]

    with measuring(model, batch):
        parts = map_blocks(model, batch, blocks, (seed,), one)
    return [
        Bound(*(joined(batch, term) for term in zip(*bounds, strict=True)))
        for bounds in zip(*parts, strict=True)
    ]


def by_column(each: Tensor, columns: Sequence[Column]) -> Tensor:
    """Add up costs of the dimensions of a table's rows, (N, D), to those of its columns, (N, C).

    The symbol for a missing cell is part of the cost of its column, so both have the same sum.
    """
    found = torch.zeros(len(each), len(columns), dtype=torch.float64)
    index = torch.tensor([place.index for place in places(columns)])
    return found.index_add_(1, index, each.double())


def _block(
    model: Model, batch: Batch, times: TimeGrid, steps: Sequence[ReverseKernel]
) -> list[Bound]:
    x, process = batch.x, model.process
    e = model.embed(x)
    grid = times.times.to(x.device)[:, None].expand(-1, len(x))
    prior = kl_of_dimensions(process.marginal(e, grid[-1]), process.prior(model.shape, grid[-1]))
    z = draw(process.marginal(e, grid[0]))
    reconstruction = -of_dimensions(model.likelihood(z, grid[0], batch.condition)).log_prob(x)
    diffusion = [torch.zeros_like(prior) for _ in steps]
    for s, t in pairwise(grid):
        z = draw(process.marginal(e, t))
        q = process.posterior(z, e, s, t)
        prediction = model.predict(z, t, batch.condition)
        for step, total in zip(steps, diffusion, strict=True):
            total += kl_of_dimensions(q, step(prediction, z, s, t, process))
    return [Bound(prior, reconstruction, total) for total in diffusion]


def kl_of_dimensions(q: Distribution, p: Distribution) -> Tensor:
    """Return KL( q_i ‖ p_i ) of each dimension, shape (B, ...), nats; of a mixture, one draw."""
    q, p = of_dimensions(q), of_dimensions(p)
    return kl(q, p, kl_noise(q, p))


def of_dimensions(distribution: Distribution) -> Distribution:
    """Return the distributions of the dimensions, whose product is `distribution`."""
    if not isinstance(distribution, Independent):
        raise TypeError(
            f"dimensions must be independent given z; got {type(distribution).__name__}"
        )
    return distribution.base_dist
