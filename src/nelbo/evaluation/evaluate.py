"""The mean bound of a data set, its terms, its error and its cost in network calls.

time_estimator    draws over the time, for any process
masks             exact numbers of masks, for texts of tokens
"""

import math
from itertools import pairwise
from os import PathLike
from pathlib import Path

from torch import Tensor

from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.data.schema import fingerprint
from nelbo.data.sources import Source
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, measuring, model_hash
from nelbo.diffusion.times import TimeDiscretization, times_of
from nelbo.evaluation.blocks import check_not_empty, described, measurement, scale_of
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.kept import keeping
from nelbo.evaluation.masks import check_masks, estimate_masks, exact_counts
from nelbo.evaluation.result import CurvePoint, Evaluation, Terms
from nelbo.evaluation.survey import Estimate
from nelbo.evaluation.time_estimator import CALLS, MANY, Pilots, estimate_times


def evaluate(
    model: Model,
    x: Source | Batch,
    *,
    steps: int | None = None,
    times: TimeDiscretization | None = None,
    calls: float | None = None,
    target_error: float | None = None,
    per_example: bool = False,
    known: Tensor | None = None,
    pilots: Pilots | None = None,
    variates: bool | None = None,
    surrogate: Model | None = None,
    masks: str | None = None,
    resume: str | PathLike[str] | None = None,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Evaluation:
    """Measure the mean bound on -log P(x|φ) over the examples x.

    All examples are measured equally often, or, if the calls or the target error allow few draws
    of each, a random sample: with fewer than two calls per example, or four where a draw is a pair
    of calls, or, after a kept pilot and with some hundred examples or more, fewer than eight.
    Their order makes no difference.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, (N, *model.shape), of any kind in
            `nelbo.data.coerce`; or a `Batch` of examples and conditions.
        steps: T, for the bound of T steps on the model's even grid; continuous time by default.
        times: TimeGrid(times) in place of these steps.
        calls: network calls per example, at most; 24 where left out. If not all examples are
            visited, the Monte Carlo error includes the variance of the sampling.
        target_error: in place of calls, the Monte Carlo standard error to reach, in the unit of
            the result.
        per_example: visit all examples, in more replicates of fewer draws, for a better standard
            error of each example.
        known: other examples of the same distribution, such as the training data, to which
            control variates are fitted. More of them reduce the variance; the result is the
            bound of x, and unbiased, whatever they are.
        pilots: returns the proposal of a pilot of this model, for the strata and the controls of
            `known`: `runs.pilot_cache`. Its calls are not counted.
        variates: use control variates; by default, where no pilot is kept, those that take at most
            1/32 of the run by counted operations (`price`); a note says what is left out.
        surrogate: a cheaper masked model of the same symbols, for a masked model in continuous
            time: it reads the same masks and many more, and the model is called only for
            the difference (`masks`). The result is unbiased for any surrogate; its calls are not
            counted.
        masks: for a masked model in continuous time: the estimator, plain, unigram, draws or
            two-levels, which needs a surrogate; by default a pilot chooses for texts of tokens.
        resume: a file for what was measured so far; with the file of an evaluation that was
            interrupted, it continues where that stood, with exactly the same result.
        seed: of everything random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: if the examples are not of the model, a model of P(x|c) lacks conditions, there
            are too few calls, or the target error is impossible.
    """
    seed = integer("seed", seed, 0)
    batch, times = batch_of(model, x), times_of(model, times, steps)
    check_not_empty(batch)
    check_budget(calls, target_error)
    named = surrogate is not None or masks is not None
    if named:
        check_masks(model, surrogate, times, masks)
    about: dict[str, object] = {
        "calls": calls,
        "target error": target_error,
        "per example": per_example,
    }
    about |= {"variates": variates, "masks": masks, "steps": described(times)}
    about["surrogate"] = None if surrogate is None else model_hash(surrogate)
    about["known examples"] = None if known is None else fingerprint(known)
    scale = scale_of(model, batch)
    target = target_error and target_error / scale
    path, spent = None if resume is None else Path(resume), 0.0
    found: Estimate | float = 0.0
    with measuring(model, batch), keeping(path, model, batch, seed, about) as kept:
        if named or _has_masks(model, times, calls):
            found = estimate_masks(
                model,
                batch,
                calls=CALLS if calls is None and target is None else calls,
                target=target,
                surrogate=surrogate,
                masks=masks,
                per_example=per_example,
                variates=variates is not False,
                kept=kept,
                seed=seed,
                track=track,
            )
        if not isinstance(found, Estimate):
            spent = found
            found = estimate_times(
                model,
                batch,
                times,
                calls=calls,
                target=target,
                per_example=per_example,
                known=known,
                pilots=pilots,
                variates=variates,
                kept=kept,
                seed=seed,
                track=track,
            )
    costs, called = found.costs, spent + found.calls
    record = measurement(
        model,
        batch,
        costs.mean(),
        costs.error(model.scored_counts(batch)),
        called,
        seed=seed,
        weights=weights,
        split=split,
    )
    columns = slice(0, 1), slice(1, 2), slice(2, None)
    return Evaluation(
        **vars(record),
        terms=Terms(*(scale * costs.mean(some) for some in columns)),
        visited=len(costs.rows),
        steps=times.steps,
        curve=_curve(found, scale),
        per_example=costs.bound,
        per_example_error=costs.error_of_each,
        by_token=found.by_token,
        notes=(*model.notes(batch), *found.notes),
    )


def check_budget(calls: float | None, target_error: float | None) -> None:
    """Raise a ValueError if no examples could be measured with these calls, or to this error."""
    if target_error is not None and not (target_error > 0 and math.isfinite(target_error)):
        raise ValueError(f"target_error must be positive; got {target_error}; try 0.005")
    if target_error is not None and calls is not None:
        raise ValueError("give calls or target_error, not both")
    if calls is not None and MANY < calls < math.inf:
        raise ValueError(f"calls must be at most {MANY:g} per example; got {calls:g}; try 24")
    if calls is not None and not calls > 0:
        raise ValueError(f"calls must be positive; got {calls:g}; try 24")


def _has_masks(model: Model, times: TimeDiscretization, calls: float | None) -> bool:
    """Return whether to draw masks with exact counts: for texts of tokens."""
    tokens = model.any_length or model.process.as_codes
    return tokens and (calls is None or calls >= 2) and exact_counts(model, times)


def _curve(found: Estimate, scale: float) -> list[CurvePoint]:
    """Return the diffusion term over time."""
    costs, edges = found.costs, found.edges.tolist()
    numbers = zip(costs.means[2:].tolist(), costs.stated_of_columns[2:].tolist(), strict=True)
    return [
        CurvePoint(*ends, scale * mean, scale * error)
        for ends, (mean, error) in zip(pairwise(edges), numbers, strict=True)
    ]
