"""Samples of other libraries' models, with classifier-free guidance where it is asked for.

Guidance has no likelihood (`integrations.memory.GUIDANCE`); here is its effect on samples. The
network is called with c and without, and the output f(z, none) + g (f(z, c) - f(z, none)) takes
the place of f(z, c); a learned variance stays that of f(z, c), as in DiT.

Of a model of tokens, c is a prompt, which shows before the tokens that are drawn: a text where the
model has a tokenizer, else ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from nelbo import integrations
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo._utils.text import shortened
from nelbo.data.schema import Schema
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid, grid_of
from nelbo.diffusion.unmasking import UnmaskingOrder
from nelbo.integrations import Foreign
from nelbo.integrations.conditions import Condition
from nelbo.integrations.huggingface import ForeignText
from nelbo.integrations.prompts import is_prompts
from nelbo.integrations.texts import TextReader
from nelbo.integrations.token_prompts import places_to_draw
from nelbo.integrations.token_rows import ABSENT, SCORED
from nelbo.integrations.tokens import TokenModel
from nelbo.models.conditioning import guided
from nelbo.runs.foreign import foreign_of, is_of_tokens, name_of
from nelbo.runs.samples import SAMPLE_STEPS, SAMPLERS, order_of
from nelbo.runs.samples import sampler_of as sampler_on
from nelbo.sampling.samplers import check_path

#: draws a number of samples in the space of the data, from a seed, on a bar
Sampler: TypeAlias = Callable[[int, int, Track], Tensor]


class ForeignSampler(NamedTuple):
    """Samples of another library's model.

    Attributes:
        schema: of one example.
        draw: draws them; of texts, ids (N, L) with special tokens, and ABSENT beyond their end.
        texts: returns the texts of ids, without special tokens at the ends; None of other data.
    """

    schema: Schema
    draw: Sampler
    texts: Callable[[np.ndarray], list[str]] | None = None


def sampler_of(
    source: object,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    guidance: float = 1.0,
    sampler: str = "ancestral",
    tokens_per_step: int | None = None,
    length: int | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    device: torch.device | None = None,
    count: int | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> ForeignSampler:
    """Return a sampler of another library's model.

    Args:
        source: what stands for it, see `runs.foreign`.
        steps: number of steps; by default the model's own, of a model of tokens about 32.
        condition: c of all samples, or of each: a class, a prompt, embeddings; of a bare model of
            tokens, ids of a prompt.
        guidance: g; only 1 draws from the model that is measured.
        sampler: "ancestral", or "flow" for the probability flow; or of a model of tokens an order
            of `UnmaskingOrder`.
        tokens_per_step: k of such an order.
        length: of a model of tokens, how many to draw for each sample, see `texts.to_draw`.
        trust_remote_code: as for `integrations.load`.
        precision: likewise.
        device_map: likewise.
        device: where to run the networks; by default they stay.
        count: the number of samples, if it is known, to check it before weights are read.
        tell: called with a sentence for each choice that determines the samples.

    Raises:
        ValueError: a model without steps of its own, an unknown sampler, guidance of a model
            without conditions, or without one that stands for none, or an option that is not for
            this kind of model.
    """
    of_tokens = is_of_tokens(source)
    if count is not None:
        count = integer("the number of samples", count, 1)
    if not of_tokens:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        if tokens_per_step is not None or length is not None:
            raise ValueError(
                "tokens_per_step and length are for a model of tokens, such as hf:FOLDER; got"
                f" {name_of(source)}: leave them out"
            )
    else:
        order_of(None, sampler, tokens_per_step, steps)
        if guidance != 1:
            raise ValueError(
                "guidance needs a condition that means none, and of a model of tokens the"
                f" condition is what shows; got guidance {guidance:g}: leave it out"
            )
    first: Callable[[TextReader], object] | None = None
    if of_tokens and integrations.is_foreign(source):
        prompts = prompts_in(condition)
        if count is not None:
            _check_prompts(len(prompts), count)
        first = lambda reader: reader.to_draw(prompts, length)  # noqa: E731
    found = foreign_of(
        source,
        steps=None if of_tokens else steps,
        condition=None if of_tokens else condition,
        trust_remote_code=trust_remote_code,
        precision=precision,
        device_map=device_map,
        first=first,
    )
    if found.placed and device is not None:
        raise ValueError(f"device_map places the weights; leave the device {device} out")
    if of_tokens:
        found.model.to(device or found.model.diffusion.device)
        return _of_tokens(found, condition, length, steps, sampler, tokens_per_step, tell)
    if found.times.steps is None:
        raise ValueError(f"{found.name} has no steps of its own; give a number, --steps 50")
    model = found.model.diffusion
    if guidance != 1:
        model = guided(model, guidance, _nothing(found))
        tell(
            f"guidance {guidance:g}: these samples are not draws from the model that evaluate"
            " measures"
        )
    for note in found.notes:
        tell(note)
    if found.model is not found.model.diffusion:
        tell("the images are decoded latents, without noise from the distribution of pixels")
    found.model.to(device or model.device)
    model.to(device or model.device)
    return ForeignSampler(found.schema, drawer(found, model, sampler))


def prompts_in(condition: Condition | None) -> list[str]:
    """Return prompts, one for all samples or one for each; "" where there is none.

    Raises:
        ValueError: the condition is no text.
    """
    if condition is None:
        return [""]
    if not is_prompts(condition):
        raise ValueError(
            f"the condition of a model of tokens is a prompt, a text, or one for each sample; got"
            f" {shortened(repr(condition))}"
        )
    return [condition] if isinstance(condition, str) else list(cast(Sequence[str], condition))


def _check_prompts(prompts: int, count: int) -> None:
    if prompts not in (1, count):
        raise ValueError(f"give one prompt, or one for each of {count} samples; got {prompts}")


def _ids_in(condition: Condition | None) -> list[list[int]]:
    """Return prompts of ids, one for all samples or one for each; empty where there is none.

    Raises:
        ValueError: the condition is no row of ids.
    """
    if condition is None:
        return [[]]
    if isinstance(condition, Tensor | np.ndarray):
        condition = condition.tolist()
    rows = condition if isinstance(condition, list | tuple) else None
    if rows and all(isinstance(i, int) for i in rows):
        rows = [rows]
    if not rows or not all(
        isinstance(row, list | tuple) and all(isinstance(i, int) for i in row) for row in rows
    ):
        raise ValueError(
            "the condition of a model of tokens without a tokenizer is a prompt, a row of ids, or"
            f" one for each sample; got {shortened(repr(condition))}"
        )
    return [[*cast(Sequence[int], row)] for row in rows]


def _of_tokens(
    found: Foreign,
    condition: Condition | None,
    length: int | None,
    steps: int | None,
    sampler: str,
    tokens_per_step: int | None,
    tell: Callable[[str], object],
) -> ForeignSampler:
    """Return a sampler of texts, or of rows of ids, after prompts; see `sampler_of`."""
    model = cast(TokenModel, found.model)
    order = order_of(model, sampler, tokens_per_step, steps)
    if sampler == "flow":
        check_path(model)
    if isinstance(found, ForeignText):
        batch = found.to_draw(prompts_in(condition), length)
    else:
        batch = model.batch(places_to_draw(model.rules, _ids_in(condition), length))
    given = batch.condition
    assert given is not None
    blocks = model.process.blocks(model.shape)
    about = -(-SAMPLE_STEPS // blocks) * blocks
    times = order or grid_of(model, about if steps is None else steps)
    for note in found.notes:
        tell(note)
    tell(_how(int((given[0] == SCORED).sum()), times))

    def draw(count: int, seed: int, track: Track) -> Tensor:
        _check_prompts(len(given), integer("the number of samples", count, 1))
        rows = given.expand(count, -1).to(model.device)
        x = sampler_on(sampler, times)(model, count, seed, track, rows)
        return torch.where(rows == ABSENT, ABSENT, x.to(rows.device))

    texts = found.drawn if isinstance(found, ForeignText) else None
    return ForeignSampler(replace(found.schema, shape=model.shape), draw, texts)


def _how(length: int, times: TimeGrid | UnmaskingOrder) -> str:
    """Return a sentence on how many tokens are drawn, and in what order."""
    if isinstance(times, UnmaskingOrder):
        way = f"{times.name}, {times.tokens_per_step} at a time"
    else:
        way = f"in {times.steps} steps"
    return f"each sample has {length} tokens after what shows (--length, length=), drawn {way}"


def drawer(found: Foreign, model: Model | None = None, sampler: str = "ancestral") -> Sampler:
    """Return a function that draws from a model that is loaded, with steps of its own.

    Args:
        found: the model.
        model: in place of its model, or of the prior of its latents, one with guidance.
        sampler: "ancestral", or "flow" for the probability flow.
    """
    own = model or found.model.diffusion
    assert found.times.steps is not None
    times = TimeGrid.uniform(found.times.steps)

    def draw(count: int, seed: int, track: Track) -> Tensor:
        integer("the number of samples", count, 1)
        given = None if found.condition is None else found.condition.rows(count).to(own.device)
        return found.model.examples_of(SAMPLERS[sampler](own, count, times, seed, track, given))

    return draw


def _nothing(found: Foreign) -> Tensor:
    """Return the row (F,) of the condition that stands for none."""
    if found.condition is None:
        raise ValueError(
            f"guidance is for models of P(x|c), and {found.name} has no condition; give one, such"
            " as --condition 3 or --condition 'a cat', or leave guidance out"
        )
    if found.nothing is None:
        raise ValueError(
            f"guidance needs a condition that means none, which {found.name} lacks: a"
            " DiT has a class for it, and the text encoders of a pipeline have the empty prompt"
        )
    return found.nothing().rows(1)[0]
