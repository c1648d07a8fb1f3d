"""Samples of other libraries' models, with classifier-free guidance where it is asked for.

Guidance has no likelihood (`integrations.memory.GUIDANCE`); here is its effect on samples. The
network is called with c and without, and the output f(z, none) + g (f(z, c) - f(z, none)) takes
the place of f(z, c); a learned variance stays that of f(z, c), as in DiT.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from nelbo import integrations
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.data.schema import Schema
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid
from nelbo.integrations import Foreign
from nelbo.integrations.conditions import Condition
from nelbo.models.conditioning import guided
from nelbo.runs.samples import SAMPLERS

#: draws a number of samples in the space of the data, from a seed, on a bar
Sampler: TypeAlias = Callable[[int, int, Track], Tensor]


def sampler_of(
    source: str,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    guidance: float = 1.0,
    sampler: str = "ancestral",
    device: torch.device | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[Schema, Sampler]:
    """Return the schema of another library's model, and a function that draws from it.

    Args:
        source: as for `integrations.load`.
        steps: number of steps; by default the model's own.
        condition: c of all samples, or of each: a class, a prompt, embeddings.
        guidance: g; only 1 draws from the model that is measured.
        sampler: "ancestral", or "flow" for the probability flow.
        device: where to run the networks.
        tell: called with a sentence for each choice that determines the samples.

    Raises:
        ValueError: a model of tokens, one without steps of its own, an unknown sampler, or
            guidance of a model without conditions, or without one that stands for none.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    if source.startswith("hf:"):
        raise ValueError(
            "a model of tokens is sampled in Python: nelbo.sampling.unmasking.in_order(model, ..)"
        )
    found = integrations.load(source, steps=steps, condition=condition)
    if found.times.steps is None:
        raise ValueError(f"{source} has no steps of its own; give a number, --steps 50")
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
    return found.schema, drawer(found, model, sampler)


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
