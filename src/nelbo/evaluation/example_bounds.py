"""The bound of each example by draws of its own, averaged, with an error for each.

Each replicate of an example takes one draw of the reconstruction and some of the diffusion term,
stratified over the times; the differences between replicates give the error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo._utils.batch_rng import drawn_by_rows, rand, row_streams
from nelbo._utils.distributed import map_across_processes
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import Bound
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.times import TimeDiscretization, draw_terms, times_of
from nelbo.evaluation.blocks import joined
from nelbo.evaluation.intervals import errors

CALLS = 96  # network calls per example by default
REPLICATES = 8  # of an example, at least, for its standard error


@dataclass(frozen=True, repr=False)
class ExampleBounds:
    """The terms of −ELBO of each example and the standard error of their sum, (N,) each, nats.

    The error widens for what few draws do not show, so that ± 1.96 of it is a 95 % interval
    (`intervals`); NaN where it is unknown.
    """

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    standard_error: Tensor

    @property
    def elbo(self) -> Tensor:
        """The estimate of the lower bound on log P(x) of each example, (N,), nats."""
        return -(self.prior + self.reconstruction + self.diffusion)

    def __len__(self) -> int:
        return len(self.prior)

    def __repr__(self) -> str:
        pairs = zip(self.elbo[:4].tolist(), self.standard_error[:4].tolist(), strict=True)
        some = ", ".join(f"{value:.4g} ± {error:.2g}" for value, error in pairs)
        return f"ELBO of {len(self)} examples, nats: {some}{', ..' if len(self) > 4 else ''}"


def elbo(
    model: Model,
    batch: Batch,
    *,
    times: TimeDiscretization | None = None,
    calls: int = CALLS,
    seed: int = 0,
    by_content: bool = False,
    track: Track = iter,
) -> ExampleBounds:
    """Return the bound of each example; `nelbo.elbo` has it of runs, and takes data of any kind.

    Args:
        model: measured in evaluation mode with float64 around the network.
        batch: the examples, and their conditions.
        times: of the bound; continuous time by default.
        calls: network calls per example.
        seed: of everything random.
        by_content: derive the draws of an example from the seed and its values alone, not from
            the other examples; equal examples then have equal draws.
        track: wraps the blocks of examples.

    Raises:
        ValueError: as for `nelbo.elbo`.
    """
    times = times_of(model, times)
    least = 2 * REPLICATES
    if integer("calls", calls) < least:
        raise ValueError(
            f"calls must be at least {least}, for an error of each example; got {calls}; try"
            f" {CALLS}; one differentiable draw is nelbo.diffusion.times.elbo"
        )
    # of a grid of few steps, each term is in each replicate, and there are more replicates
    whole = times.terms if times.steps is not None else calls
    draws = max(1, min(whole, calls // REPLICATES - 1))
    found = replicates_of(
        model,
        batch,
        times,
        draws,
        calls // (draws + 1),
        integer("seed", seed, 0),
        track,
        by_content,
    )
    prior, reconstruction, diffusion = (term.mean(1) for term in found)
    return ExampleBounds(prior, reconstruction, diffusion, errors([found.elbo]))


def replicates_of(
    model: Model,
    batch: Batch,
    times: TimeDiscretization,
    draws: int,
    replicates: int,
    seed: int,
    track: Track = iter,
    by_content: bool = False,
) -> Bound:
    """Return independent draws of the terms of each example, (N, replicates) each, nats.

    Args:
        model: the model.
        batch: the examples.
        times: of the bound.
        draws: of the diffusion term in each replicate.
        replicates: number of replicates.
        seed: of everything random.
        track: wraps the blocks of examples, for a progress bar.
        by_content: as for `elbo`.
    """

    def one(g: int) -> Tensor:
        few, each = batch[blocks[g]].to(model.device), []
        streams = row_streams(few.x, seed) if by_content else None
        with seeded(seed, g), drawn_by_rows(streams):
            for _ in range(replicates):
                v = rand((len(few), 1), dtype=torch.float64)
                u = (torch.arange(draws) + v) / draws
                each.append(torch.stack(draw_terms(model, few, times, u)))
        return torch.stack(each, 2).cpu()

    with measuring(model, batch):
        blocks = batch.order.split(max(1, model.rows // draws))
        return Bound(*joined(batch, map_across_processes(len(blocks), one, track), 1))
