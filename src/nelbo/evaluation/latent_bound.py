"""The mean bound of images under a diffusion model of the latents of an autoencoder.

Each replicate of an example draws z ~ q(z|x) anew, and with it one draw of each term of the bound
and some of the diffusion term, stratified over the times. All of these are independent, so the
differences between replicates and between examples give the error.
"""

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.latent import LatentBound, LatentModel, evaluating, latent_terms
from nelbo.diffusion.model import counting
from nelbo.diffusion.times import TimeDiscretization
from nelbo.evaluation.blocks import check_not_empty, joined, map_blocks, measurement, scale_of
from nelbo.evaluation.intervals import errors
from nelbo.evaluation.replicates import standard_error_of
from nelbo.evaluation.result import CurvePoint, LatentEvaluation, LatentTerms

CALLS = 24  # calls of the prior's network per example by default
REPLICATES = 2  # of an example, for its error
NUMBERS = 2**20  # numbers of examples that are encoded together


def evaluate_latent(
    model: LatentModel,
    x: Tensor | Batch,
    *,
    times: TimeDiscretization,
    calls: float | None = None,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> LatentEvaluation:
    """Measure the mean bound on −log P(x|φ) of images, by a model of their latents.

    Args:
        model: the model; measured in evaluation mode with float64 around the networks.
        x: examples (N, *model.shape), or a `Batch` of examples and conditions.
        times: of the prior.
        calls: of the prior's network per example, at most, at least 4; 24 by default.
        seed: of everything random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: the examples are not of the model, lack conditions, or there are too few calls.
    """
    seed = integer("seed", seed, 0)
    batch = Batch.of(x)
    check_not_empty(batch)
    model.check(batch)
    calls = CALLS if calls is None else calls
    least = 2 * REPLICATES
    if not calls >= least:
        raise ValueError(
            f"calls must be at least {least} for a model of latents, in which each example is"
            f" measured {REPLICATES} times; got {calls}; give fewer examples instead"
        )
    whole = max(times.terms, 1)
    draws = int(calls // REPLICATES) - 1
    draws = min(whole, draws) if times.steps is not None else draws
    replicates = int(calls // (draws + 1))
    blocks = batch.order.split(max(1, NUMBERS // model.dims))

    def draw(some: Batch, g: int) -> tuple[Tensor, Tensor]:
        q, each, over_time = model.posterior(some.x), [], []
        for _ in range(replicates):
            v = torch.rand(len(some), 1, dtype=torch.float64)
            found = latent_terms(model, some, q, times, (torch.arange(draws) + v) / draws)
            over_time.append(found.diffusion.cpu())
            found = found._replace(diffusion=found.diffusion.mean(1))
            each.append(torch.stack(found[:]).cpu())
        return torch.stack(each, 2), torch.stack(over_time, 1)

    with evaluating(model), counting(model.prior.network) as made:
        found = map_blocks(model.prior, batch, blocks, (seed,), draw, track)
        called = sum(gather(made.forward))
    terms = joined(batch, (each for each, _ in found), 1)  # (5, N, R)
    over_time = joined(batch, (each for _, each in found))  # (N, R, n)
    total = terms.sum(0)
    record = measurement(
        model,
        batch,
        total.mean().item(),
        standard_error_of(total),
        called,
        seed=seed,
        weights=weights,
        split=split,
    )
    names, scale = LatentBound._fields, scale_of(model)
    return LatentEvaluation(
        **vars(record),
        terms=LatentTerms(
            **{name: scale * terms[i].mean().item() for i, name in enumerate(names)}
        ),
        visited=len(batch),
        steps=times.steps,
        curve=_curve(over_time, times, scale),
        per_example=LatentBound(*terms.mean(2)),
        per_example_error=errors([total]),
        notes=(f"P(x|z) is {model.law} around the decoded image, without clipping",),
        encoder_calls_per_example=1.0,
        decoder_calls_per_example=float(replicates),
    )


def _curve(over_time: Tensor, times: TimeDiscretization, scale: float) -> list[CurvePoint]:
    """Return the diffusion term in each stratum of the times, from draws (N, R, n)."""
    if not times.terms:
        return []
    draws = over_time.shape[2]
    each = scale * over_time.flatten(0, 1) / draws
    ends = times.at(torch.linspace(0, 1, draws + 1, dtype=torch.float64)).tolist()
    mean, error = each.mean(0).tolist(), (each.var(0) / len(each)).sqrt().tolist()
    return [CurvePoint(*point) for point in zip(ends[:-1], ends[1:], mean, error, strict=True)]
