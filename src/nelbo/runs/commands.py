"""The commands of the command line as functions: of a run, its path or its name on the hub.

Each is the method of `Run` of the same name. `evaluate`, `elbo`, `sample` and `score` take another
library's model too, and a bare one (`runs.foreign`).
"""

import inspect as python
from collections.abc import Callable
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from nelbo._utils import limits
from nelbo._utils.arguments import checked
from nelbo._utils.progress import Track, tracks
from nelbo._utils.text import shortened
from nelbo.codec import errors, files
from nelbo.data import inspection
from nelbo.data.inspection import Inspection
from nelbo.data.sources import Declaration, Source, Splits
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.latent import LatentModel
from nelbo.diffusion.model import Model, find_device
from nelbo.diffusion.times import TimeDiscretization, times_of
from nelbo.evaluation import example_bounds
from nelbo.evaluation.anomaly_scores import Scored
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.example_bounds import CALLS, ExampleBounds
from nelbo.integrations import Foreign
from nelbo.integrations.conditions import Condition
from nelbo.integrations.text_records import TextForm
from nelbo.runs.config import check_no_run
from nelbo.runs.foreign import is_foreign, is_of_tokens
from nelbo.runs.foreign_samples import sampler_of
from nelbo.runs.run import Run
from nelbo.runs.samples import Samples, array_of
from nelbo.runs.subjects import AnyRun, Asked, run_of, subject_of

P = ParamSpec("P")
R = TypeVar("R")


def _twin(method: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[AnyRun, P], R]:
    """Return a method of `Run` as a function that takes a path or a name too."""

    @wraps(method)
    def command(run: AnyRun, *args: P.args, **options: P.kwargs) -> R:
        left_out = needed[1 + len(args) :]
        if not options.keys() >= {*left_out}:  # before a file is loaded as the run
            given = ", ".join(shortened(repr(each)) for each in (run, *args))
            raise TypeError(f"call {method.__name__}({', '.join(needed)}); got ({given})")
        return method(run_of(run), *args, **options)

    signature = python.signature(method)
    own, *others = signature.parameters.values()
    first = own.replace(name="run", annotation=AnyRun, kind=own.POSITIONAL_OR_KEYWORD)
    needed = [each.name for each in (first, *others) if each.default is each.empty]
    command.__signature__ = signature.replace(parameters=[first, *others])  # type: ignore[attr-defined]
    return command


_of_runs = _twin(Run.sample)


@wraps(_of_runs)
def sample(run: AnyRun, *args: Any, **options: Any) -> Samples:  # noqa: ANN401
    """Draw from a run, or with fewer options from another library's model."""
    if not is_foreign(run):
        return _of_runs(run, *args, **options)
    return sample_foreign(run, *args, **options)


@checked
def sample_foreign(
    source: object,
    n: int = 64,
    steps: int | None = None,
    *,
    condition: Condition | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    sampler: str = "ancestral",
    tokens_per_step: int | None = None,
    length: int | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    device: str | None = None,
    progress: bool | None = None,
) -> Samples:
    """Draw from another library's model, or from a bare one.

    Args:
        source: "diffusers:FOLDER", "openai:FILE" or "hf:FOLDER", as for `integrations.load`, or
            what that returned; a pipeline; or a model, as of `nelbo.wrap` or `wrap_tokens`.
        n: number of examples.
        steps: number of steps; by default the model's own, of a model of tokens about 32.
        condition: c of all samples, or of each: a class, a prompt, embeddings; for `wrap_tokens`,
            ids of a prompt.
        seed: of everything random.
        guidance: how strongly c counts; only 1 draws from the model that is measured.
        sampler: "ancestral", or "flow" for the probability flow; of a masked model of tokens also
            left-to-right, greedy, margin or entropy, as for `Run.sample`.
        tokens_per_step: number of tokens that such an order shows in each step, by default 1.
        length: for a model of tokens, how many to draw for each sample, after its prompt; by
            default 128, or as many as there is room for.
        trust_remote_code: for "hf:FOLDER", run the code in the folder.
        precision: as for `integrations.load`.
        device_map: likewise.
        device: where to run the networks; by default they stay.
        progress: show bars on the error stream; by default if it is a terminal.

    Returns:
        Images, uint8 (N, H, W, C), or (N, H, W) if grey; of "hf:FOLDER" texts with their prompts;
        of `wrap_tokens` ids (N, L), -2 after the end of a text.

    Raises:
        ValueError: as for `foreign_samples.sampler_of`.
    """
    schema, draw, texts = sampler_of(
        source,
        steps=steps,
        condition=condition,
        guidance=guidance,
        sampler=sampler,
        tokens_per_step=tokens_per_step,
        length=length,
        trust_remote_code=trust_remote_code,
        precision=precision,
        device_map=device_map,
        device=None if device is None else find_device(device),
        count=n,
    )
    x = draw(n, seed, tracks(progress)("sample"))
    if texts is not None:
        return texts(x.cpu().numpy())
    return x.cpu().numpy() if is_of_tokens(source) else array_of(x, schema)


impute = _twin(Run.impute)
_score_of_runs = _twin(Run.score)


@wraps(_score_of_runs)
def score(run: AnyRun, *args: Any, **options: Any) -> Scored:  # noqa: ANN401
    """Return the score of each example under a run, or under another library's model."""
    if not is_foreign(run):
        return _score_of_runs(run, *args, **options)
    from nelbo.runs.foreign_scores import score_foreign  # here: it stands above `evaluation`

    return score_foreign(run, *args, **options)


compress = _twin(Run.compress)
decompress = _twin(Run.decompress)


@checked
def elbo(
    run: AnyRun | Model | Foreign | object,
    data: Source | Batch | None = None,
    *,
    steps: int | None = None,
    times: TimeDiscretization | int | None = None,
    calls: int = CALLS,
    seed: int = 0,
    track: Track = iter,
) -> ExampleBounds:
    """Return the lower bound on log P(x|φ) of each example, an average of draws with its error.

    One differentiable draw, to train with, is `nelbo.diffusion.times.elbo`.

    Args:
        run: a run, its folder or its name on the hub; another library's model, its source or a
            pipeline; or a bare model.
        data: examples of any kind in `nelbo.data.coerce`, or a `Batch` of examples and conditions;
            for a run, by default its test split.
        steps: T, for the bound of T steps: on the best grid for a run, on the uniform grid for a
            bare model; continuous time, or another library's own, by default.
        times: for a bare model: TimeGrid(times), or a number as for `steps`.
        calls: network calls per example, at most.
        seed: of everything random.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: the data are not of the model, a model of P(x|c) lacks conditions, there are
            too few calls for an error, or the model is one of latents.
    """
    if isinstance(run, Model):  # an argument is a model itself or stands for a run
        batch = batch_of(run, data)  # first: the times may depend on their shape
        times = times_of(run, times, steps)
        return example_bounds.elbo(run, batch, times=times, calls=calls, seed=seed, track=track)
    if times is not None:
        raise ValueError("times are for a bare model; give steps")
    if not is_foreign(run):
        return run_of(run).elbo(data, steps=steps, calls=calls, seed=seed)
    asked = Asked(data, None, None, TextForm(), str)
    subject, left = subject_of(run, data, steps=steps, reading={}, ahead=[asked])
    if isinstance(subject.model, LatentModel):
        raise ValueError(
            "elbo takes models of the data themselves; nelbo.evaluate(..., per_example=True) has"
            " the bound of each image by a model of latents"
        )
    batch, _ = subject.examples(asked, subject.read(asked))
    found = subject.times(left, None, track)
    return example_bounds.elbo(
        subject.model, batch, times=found, calls=calls, seed=seed, track=track
    )


@checked
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
        its header, bits per dimension or symbol, bound and blocks.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it cannot be read.
    """
    if isinstance(data, str | PathLike) and str(data).endswith(".nlb"):
        limits.regular(Path(data))
        with errors.naming(Path(data)):
            return files.report(Path(data).read_bytes())
    check_no_run(data)
    return inspection.inspect(data, levels=levels, size=size, schema=schema, splits=splits)
