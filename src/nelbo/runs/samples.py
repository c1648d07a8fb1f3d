"""Draws from a run, and the form in which people hold them: a frame, an array or texts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.progress import Track
from nelbo.data.readers.text import decode
from nelbo.data.schema import Schema
from nelbo.data.sources import Source
from nelbo.data.tabular import encoding, frames
from nelbo.diffusion.batch import rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid
from nelbo.diffusion.unmasking import SURENESS, UnmaskingOrder, order_for, order_of_name
from nelbo.models.conditioning import guided, parse
from nelbo.runs.config import RunConfig
from nelbo.sampling import samplers
from nelbo.sampling.imputation import impute, within
from nelbo.sampling.unmasking import in_order

if TYPE_CHECKING:
    from polars import DataFrame

    from nelbo.data.tabular.tables import Frame
    from nelbo.runs.run import Run

#: a label, labels by name, or one of these for each sample
Condition: TypeAlias = str | float | Mapping[str, object] | Sequence[object] | np.ndarray | Tensor
#: a frame of a table, texts, or an array
Samples: TypeAlias = "Frame | list[str] | np.ndarray"
SAMPLE_STEPS = 32  # steps of samples by default
SAMPLERS = {"ancestral": samplers.ancestral, "flow": samplers.probability_flow}
#: draws a number of samples of a model, from a seed, a bar and conditions
Sampler: TypeAlias = Callable[[Model, int, int, Track, Tensor | None], Tensor]


def order_of(
    model: Model | None, sampler: str, tokens_per_step: int | None, steps: int | None
) -> UnmaskingOrder | None:
    """Return the order of unmasking that a sampler's name stands for; None for a grid of times.

    `model` is None if it is not known yet.

    Raises:
        ValueError: there is no such sampler, the model masks no symbols, or the options are not
            the sampler's.
    """
    if sampler in SAMPLERS:
        return order_of_name(None, tokens_per_step)
    if sampler not in SURENESS:
        known = ", ".join([*SAMPLERS, *SURENESS])
        raise ValueError(f"sampler must be one of {known}; got {sampler!r}")
    if steps is not None:
        raise ValueError(
            f"the sampler {sampler} takes as many steps as there are symbols to show; give"
            " tokens_per_step in place of steps"
        )
    if model is None:
        return order_of_name(sampler, tokens_per_step)
    return order_for(model, sampler, tokens_per_step)


def sampler_of(sampler: str, times: TimeGrid | UnmaskingOrder) -> Sampler:
    """Return the sampler of that name on a grid of times, or the one of an order."""
    if isinstance(times, UnmaskingOrder):
        return lambda model, count, *rest: in_order(model, count, times, *rest)
    return lambda model, count, *rest: SAMPLERS[sampler](model, count, times, *rest)


def draw(
    run: "Run",
    n: int,
    times: Callable[[], TimeGrid | UnmaskingOrder],
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    sampler: str = "ancestral",
    as_modelled: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    track: Track = iter,
) -> Tensor:
    """Draw new examples of a run, (n, *shape), in the space of the data.

    Args:
        run: with its model on the device on which it is to run.
        n: number of examples.
        times: returns the grid, or the order in which a masked model shows symbols; called after
            all checks, as a best grid takes long to find.
        labels: (n, len(schema.condition)) of a conditional run; by default those of random
            training examples.
        seed: of everything random.
        guidance: strength of the labels; only 1 draws from the model that is measured.
        sampler: on a grid, "ancestral", or "flow" for the probability flow.
        as_modelled: keep rows of a table outside the ranges of the training data.
        tell: called with a sentence on rows that were drawn again.
        track: wraps the steps, for a progress bar; in a table those of the first rows, since few
            are drawn again.

    Raises:
        ValueError: the number or the sampler is none, the run has no labels, or hardly any row
            lies within the training data.
    """
    schema = run.config.schema
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; got {n}")
    if as_modelled and not schema.columns:
        raise ValueError("--as-modelled is for tables; leave it out")
    if sampler == "flow":
        samplers.check_path(run.model)
    model = guided(run.model, guidance).to(run.model.device)
    given = run.conditions(n, labels, seed)
    sampled, tracks = sampler_of(sampler, times()), chain([track], repeat(iter))

    def some(rows: Tensor, seed: int) -> Tensor:
        return sampled(model, len(rows), seed, next(tracks), rows_of(given, rows))

    if schema.columns and not as_modelled:
        return within(some, n, schema, seed, tell)
    return some(torch.arange(n), seed)


def labels_for(condition: Condition | None, n: int, schema: Schema) -> Tensor | None:
    """Return labels (n, len(schema.condition)) for n samples; None if none are given.

    Raises:
        ValueError: a label is missing, unknown or out of range, or there are not n of them.
    """
    if condition is None:
        return None
    if isinstance(condition, np.ndarray | Tensor):
        condition = condition.tolist()
    if isinstance(condition, Sequence) and not isinstance(condition, str):
        if len(condition) != n:
            raise ValueError(f"give one condition, or one for each of {n}; got {len(condition)}")
        return torch.cat([parse(_texts(each), schema) for each in condition])
    return parse(_texts(condition), schema).expand(n, -1)


def _texts(condition: object) -> list[str]:
    """Return a label, or labels by name, as options of the command line."""
    if isinstance(condition, Mapping):
        return [f"{name}={_text(value)}" for name, value in condition.items()]
    return [_text(condition)]


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_table(schema: Schema) -> None:
    """Raise ValueError if a run is not of a table, before its best grid is found."""
    if not schema.columns:
        raise ValueError(
            f"impute is for tables, and the run is of {schema.kind}; of an image, nelbo sample"
            " --inpaint draws a part"
        )


def complete_table(
    run: "Run",
    data: Source,
    times: Callable[[], TimeGrid],
    *,
    particles: int | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = lambda line: None,
    track: Track = iter,
) -> "DataFrame":
    """Return a table with its missing cells drawn; see `Run.impute`."""
    check_table(run.config.schema)
    options = {} if particles is None else {"particles": particles}
    return impute(
        run.model,
        run.config.schema,
        data,
        times(),
        seed=seed,
        track=track,
        tell=tell,
        **options,
    )


def as_held(x: Tensor, config: RunConfig) -> "Samples":
    """Return examples as a frame, a list of texts, images (N, H, W, C) or (N, H, W), or an array.

    Args:
        x: (N, *shape).
        config: of the run, with the schema and the library of frames.
    """
    array, schema = x.cpu().numpy(), config.schema
    if schema.columns:
        frame = encoding.decode(array, schema.columns)
        return frames.to_pandas(frame, {}) if config.frames == "pandas" else frame
    if schema.text:
        return decode(array, schema.tokenizer or schema.alphabet or "")
    return array_of(x, schema)


def array_of(x: Tensor, schema: Schema) -> np.ndarray:
    """Return images (N, H, W, C) or (N, H, W), uint8 if they are of 256 levels, or an array.

    Args:
        x: (N, *shape).
        schema: of one example.
    """
    array: np.ndarray = x.cpu().numpy()
    if schema.levels is not None and schema.levels <= 256:
        array = array.astype(np.uint8)
    if len(schema.shape) != 3:
        return array
    return array[:, 0] if schema.shape[0] == 1 else np.moveaxis(array, 1, 3)


def like(frame: "DataFrame", given: object) -> "Frame":
    """Return a frame of polars as one of the library of another table, in its types."""
    dtypes = frames.dtypes_of(given)
    return frame if dtypes is None else frames.to_pandas(frame, dtypes)
