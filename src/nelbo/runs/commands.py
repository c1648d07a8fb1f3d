"""The commands of the command line as functions: of a run, its path or its name on the hub.

Each is the method of `Run` of the same name; `evaluate` and `elbo` take a bare model too, and
another library's model, "diffusers:FOLDER" or "openai:FILE".
"""

import inspect as python
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, Unpack, cast

import numpy as np
from torch import Tensor

from nelbo import integrations
from nelbo._utils import limits
from nelbo._utils.progress import Track, tracks
from nelbo.codec import files
from nelbo.data import inspection
from nelbo.data.inspection import Inspection
from nelbo.data.sources import Declaration, Source, Splits
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.latent import LatentModel
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization, times_of
from nelbo.evaluation import evaluate as evaluation
from nelbo.evaluation import example_bounds
from nelbo.evaluation.alternatives import Alternative, Dequantise
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.example_bounds import CALLS, ExampleBounds
from nelbo.evaluation.latent_bound import evaluate_latent
from nelbo.evaluation.result import BoundEstimate, Evaluation, rated
from nelbo.evaluation.unmasking_order import beside, order_for
from nelbo.integrations import Foreign, memory
from nelbo.integrations.conditions import Condition
from nelbo.integrations.memory import Reading
from nelbo.integrations.probe import probe
from nelbo.runs.foreign_samples import sampler_of
from nelbo.runs.loading import load
from nelbo.runs.run import M, Run
from nelbo.runs.samples import Samples, array_of

P = ParamSpec("P")
R = TypeVar("R")
#: a run, its folder, or its name on the hub
AnyRun: TypeAlias = Run | str | PathLike[str]


def run_of(run: object) -> Run:
    """Return a run as it is, or load it.

    Raises:
        ValueError: it is neither a run nor a path or name.
    """
    if isinstance(run, str | PathLike):
        return load(run if isinstance(run, str) else Path(run))
    if not isinstance(run, Run):
        raise ValueError(
            f"give a run, from nelbo.train or nelbo.load, or its folder; got {type(run).__name__}"
        )
    return run


def _twin(method: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[AnyRun, P], R]:
    """Return a method of `Run` as a function that takes a path or a name too."""

    @wraps(method)
    def command(run: AnyRun, /, *args: P.args, **options: P.kwargs) -> R:
        return method(run_of(run), *args, **options)

    signature = python.signature(method)
    own, *others = signature.parameters.values()
    first = own.replace(name="run", annotation=AnyRun)
    command.__signature__ = signature.replace(parameters=[first, *others])  # type: ignore[attr-defined]
    return command


_of_runs = _twin(Run.sample)


@wraps(_of_runs)
def sample(run: AnyRun, /, *args: Any, **options: Any) -> Samples:  # noqa: ANN401
    """Draw from a run, or with fewer options from another library's model."""
    if not isinstance(run, str) or not integrations.is_foreign(run):
        return _of_runs(run, *args, **options)
    return sample_foreign(run, *args, **options)


def sample_foreign(
    source: str,
    n: int = 64,
    steps: int | None = None,
    *,
    condition: Condition | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    sampler: str = "ancestral",
    progress: bool | None = None,
) -> np.ndarray:
    """Draw from another library's model, "diffusers:FOLDER" or "openai:FILE".

    Args:
        source: as for `integrations.load`.
        n: number of examples.
        steps: number of steps; by default the model's own.
        condition: c of all samples, or of each: a class, a prompt, embeddings.
        seed: of everything random.
        guidance: how strongly c counts; only 1 draws from the model that is measured.
        sampler: "ancestral", or "flow" for the probability flow.
        progress: show bars on the error stream; by default if it is a terminal.

    Returns:
        Images, uint8 (N, H, W, C), or (N, H, W) if grey.

    Raises:
        ValueError: as for `foreign_samples.sampler_of`.
    """
    options = {"condition": condition, "guidance": guidance, "sampler": sampler}
    schema, draw = sampler_of(source, steps=steps, **options)  # type: ignore[arg-type]
    return array_of(draw(n, seed, tracks(progress)("sample")), schema)


impute = _twin(Run.impute)
score = _twin(Run.score)
compress = _twin(Run.compress)
decompress = _twin(Run.decompress)


def model_of(run: AnyRun | Model | Foreign, trust_remote_code: bool = False) -> Model:
    """Return the model of a run or of another library, and a bare model as it is."""
    if isinstance(run, str) and integrations.is_foreign(run):
        run = integrations.load(run, trust_remote_code=trust_remote_code)
    if isinstance(run, Foreign):
        if isinstance(run.model, LatentModel):
            raise ValueError(f"{run.name} is a model of latents; give one of the data themselves")
        return run.model
    return run if isinstance(run, Model) else run_of(run).model


def evaluate(
    run: AnyRun | Model | Foreign | object,
    data: Source | Batch | None = None,
    split: str | None = None,
    *,
    condition: Condition | None = None,
    splits: Splits | None = None,
    steps: int | None = None,
    times: TimeDiscretization | None = None,
    calls: float | None = None,
    target_error: float | None = None,
    per_example: bool = False,
    variates: bool = True,
    sampler: str | None = None,
    tokens_per_step: int | None = None,
    known: Source | None = None,
    surrogate: AnyRun | Model | Foreign | None = None,
    importance_samples: int | None = None,
    ode: bool = False,
    dequantise: Dequantise | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **reading: Unpack[Reading],
) -> Evaluation | BoundEstimate:
    """Measure the mean bound on -log P(x|φ) over examples, with its error and its price.

    Args:
        run: a run, its folder or its name on the hub; another library's model, "diffusers:FOLDER"
            or "openai:FILE" or as loaded; a bare model; or a network in memory: a pipeline of
            diffusers, a pair of a network and its scheduler, or a module or function that is
            called as network(y, time), see `integrations.wrap`.
        data: examples of any kind in `nelbo.data.coerce`, or a `Batch` of examples and conditions;
            for a run, by default its own data.
        split: "test" by default for the run's own data, and all of other data.
        condition: for another library's model, c of each example, in their order, for the bound on
            P(x|c): classes or embeddings, or such by the network's names; one for all as well.
        splits: splits of other data, as for `nelbo.data.load`.
        steps: T, for the bound of T steps: on the best grid of a run, on the even grid of a bare
            model; continuous time by default.
        times: of a bare model: TimeGrid(times) in place of these steps.
        calls: network calls per example, at most; 24 by default.
        target_error: in place of calls, the Monte Carlo standard error to reach, in the unit of
            the result.
        per_example: for a better standard error of each example.
        variates: use control variates.
        sampler: of a masked model, left-to-right, greedy, margin, entropy or, for at most 16
            symbols, random: measure beside the bound, as `result.in_order`, the exact -log P(x) of
            the sampler that shows symbols in this order, see `nelbo.diffusion.unmasking`.
        tokens_per_step: number of symbols that this sampler shows in each step, by default 1.
        known: for a bare model: other examples of the same distribution, such as the training
            data, to which control variates are fitted.
        surrogate: for a masked model in continuous time: a cheaper one of the same symbols, given
            as `run` is, which reads the same masks and many more (`evaluation.masks`). The result
            is unbiased, whatever it is; its calls are not counted.
        importance_samples: K, for the tighter bound of K importance-weighted samples at T steps,
            at K T calls each; a `BoundEstimate`, as the next.
        ode: measure by the probability-flow ODE instead, to two tolerances.
        dequantise: how it passes from the data to the first latent; by default "encoder".
        tolerance: absolute and relative, of its solver, per example; 1e-4 by default.
        seed: of everything random.
        progress: show bars on the error stream; by default if it is a terminal.
        reading: of a network in memory: what it predicts, its noise levels (betas, alphas, sigmas
            or schedule), its scaling, variance, clip, shape, .., as for `integrations.wrap`.

    Raises:
        ValueError: the data are not of the model, a model of P(x|c) lacks conditions, there are
            too few calls, the target error is impossible, or a network is read wrongly.
    """
    track = tracks(progress)("evaluate")
    tighter = Alternative(importance_samples, ode, dequantise, tolerance)
    tighter.check(
        steps=times if steps is None else steps,
        calls=calls,
        target_error=target_error,
        sampler=sampler,
        surrogate=surrogate,
    )
    options: dict[str, Any] = {
        "calls": calls,
        "target_error": target_error,
        "per_example": per_example,
        "variates": variates,
        "surrogate": None if surrogate is None else model_of(surrogate),
        "seed": seed,
    }
    notes: list[str] = []
    if not isinstance(run, Run) and memory.is_network(run):
        if data is None:
            raise ValueError("a network brings no data; give examples, as in evaluate(network, x)")
        run = memory.read(run, data, steps=steps, condition=condition, reading=reading)
        steps = None
    elif reading:
        raise ValueError(f"{', '.join(sorted(reading))} say how a network is read; leave them out")
    elif isinstance(run, str) and integrations.is_foreign(run):
        run = integrations.load(run, steps=steps, condition=condition)
        steps = None
    elif condition is not None:
        raise ValueError("condition is for another library's network; give Batch(x, condition)")
    foreign = run if isinstance(run, Foreign) else None
    if foreign is not None:
        run = foreign.model
        notes += foreign.notes
        if isinstance(data, Batch) and foreign.fit is not None:
            raise ValueError(
                "a part of the model is fitted to examples that are left out: give the examples,"
                " and their conditions as condition=, not a Batch; or give that part"
            )
        if not isinstance(data, Batch) and data is not None:
            data, split = foreign.examples(data, split, splits, notes.append)
        times = foreign.times if times is None and steps is None else times
        options["weights"] = foreign.weights
    if isinstance(run, Model | LatentModel) and data is None:
        raise ValueError("a model brings no data; give examples, as in evaluate(model, x)")
    if isinstance(run, LatentModel):
        if tighter.wanted or not target_error is known is surrogate is sampler is None:
            raise ValueError(
                "target_error, known, surrogate, sampler, importance_samples and ode are for"
                " models of the data themselves; a model of their latents takes calls"
            )
        if times is None:
            raise ValueError("give the times of a model of latents: steps, or times")
        data = data if isinstance(data, Batch) else Batch(cast(Tensor, data))
        notes += [] if foreign is None else foreign.check(data)
        of_latents = evaluate_latent(
            run,
            data,
            times=times,
            calls=calls,
            seed=seed,
            weights=options.get("weights", "as given"),
            split=split or "as given",
            track=track,
        )
        return replace(of_latents, notes=(*notes, *of_latents.notes))
    if isinstance(run, Model):
        batch = batch_of(run, data)
        order = order_for(run, batch, sampler, tokens_per_step)
        notes += probe(run, batch)
        grid = times_of(run, times, steps)
        if find := tighter.measure(run, grid):
            record = {"weights": options.get("weights", "as given"), "split": split or "as given"}
            other = find(batch, seed=seed, track=track, **record)
            return other if foreign is None else _rated(other, foreign, batch)
        found = evaluation.evaluate(
            run,
            batch,
            times=grid,
            known=None if known is None else batch_of(run, known).x,
            split=split or "as given",
            track=track,
            **options,
        )
        found = replace(found, notes=(*notes, *found.notes))
        found = beside(found, run, batch, order, track)
        return found if foreign is None else _rated(found, foreign, batch)
    if times is not None or known is not None:
        raise ValueError("times and known are for a bare model; a run knows its own; give steps")
    options |= {"sampler": sampler, "tokens_per_step": tokens_per_step, "progress": progress}
    options |= vars(tighter)
    return run_of(run).evaluate(data, split, splits=splits, steps=steps, **options)


def _rated(found: M, foreign: Foreign, batch: Batch) -> M:
    """Return the bound of another library's model with its rates, if it is one of text."""
    return rated(found, lambda of: foreign.rates(of.nats, batch))


def elbo(
    run: AnyRun | Model,
    data: Source | Batch | None = None,
    *,
    steps: int | None = None,
    times: TimeDiscretization | None = None,
    calls: int = CALLS,
    seed: int = 0,
    track: Track = iter,
) -> ExampleBounds:
    """Return the lower bound on log P(x|φ) of each example, an average of draws with its error.

    One differentiable draw, to train with, is `nelbo.diffusion.times.elbo`.

    Args:
        run: a run, its folder or its name on the hub; or a bare model.
        data: examples of any kind in `nelbo.data.coerce`, or a `Batch` of examples and conditions;
            for a run, by default its test split.
        steps: T, for the bound of T steps: on the best grid of a run, on the even grid of a bare
            model; continuous time by default.
        times: of a bare model: TimeGrid(times) in place of these steps.
        calls: network calls per example, at most.
        seed: of everything random.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: the data are not of the model, a model of P(x|c) lacks conditions, or there are
            too few calls for an error.
    """
    if isinstance(run, Model):
        return example_bounds.elbo(
            run, data, steps=steps, times=times, calls=calls, seed=seed, track=track
        )
    if times is not None:
        raise ValueError("times are for a bare model; a run has a best grid; give steps")
    return run_of(run).elbo(data, steps=steps, calls=calls, seed=seed)


def inspect(
    data: Source,
    *,
    levels: int | None = None,
    size: int | None = None,
    schema: Declaration = None,
    splits: Splits | None = None,
) -> Inspection | files.Report:
    """Describe data before training, or a compressed file; arguments as for `nelbo.data.load`.

    Returns:
        The columns of a table, and anything that makes its likelihood meaningless; of a .nlb file,
        its header, bits/dim, bound and blocks.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it cannot be read.
    """
    if isinstance(data, str | PathLike) and str(data).endswith(".nlb"):
        limits.regular(Path(data))
        return files.report(Path(data).read_bytes())
    return inspection.inspect(data, levels=levels, size=size, schema=schema, splits=splits)
