"""Another library's model, from all that may stand for one.

"diffusers:FOLDER", ..    read by `integrations.load`
(model, tokenizer)        of transformers, likewise
Foreign                   as it returned
pipeline, (network, scheduler) of diffusers
Model                     bare, from `wrap`, `wrap_tokens` or of a run
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from nelbo import integrations
from nelbo.data.schema import Schema
from nelbo.diffusion.latent import LatentModel
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, grid_of
from nelbo.integrations import Foreign, memory
from nelbo.integrations.conditions import Condition, Given
from nelbo.integrations.external import check_in_memory, in_precision
from nelbo.integrations.texts import TextReader
from nelbo.integrations.tokens import TokenModel
from nelbo.runs.run import Run


def is_foreign(thing: object) -> bool:
    """Return whether something stands for another library's model or a bare one, not for a run."""
    if integrations.is_foreign(thing):
        return True
    if isinstance(thing, str | Run):
        return False
    return isinstance(thing, Foreign | Model | LatentModel) or memory.is_network(thing)


def is_of_tokens(thing: object) -> bool:
    """Return whether it is a model of tokens."""
    if integrations.is_foreign(thing):
        return integrations.is_text(thing)
    return isinstance(thing.model if isinstance(thing, Foreign) else thing, TokenModel)


def name_of(thing: object) -> str:
    """Return a name for it in a message: its source, or its class."""
    if isinstance(thing, Foreign):
        return thing.name
    if isinstance(thing, str) or integrations.is_pair(thing):
        return integrations.name_of(thing)
    return type(thing).__name__


def foreign_of(
    thing: object,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    first: Callable[[TextReader], object] | None = None,
) -> Foreign:
    """Return another library's model.

    Args:
        thing: what stands for it, see the module.
        steps: number of steps; by default its own.
        condition: c of the examples.
        trust_remote_code: as for `integrations.load`.
        precision: likewise.
        device_map: likewise.
        first: likewise.

    Raises:
        ValueError: an option that is not for this kind, or a network that does not say enough.
    """
    if isinstance(thing, str) or integrations.is_pair(thing):
        return integrations.load(
            thing,
            steps=steps,
            condition=condition,
            trust_remote_code=trust_remote_code,
            precision=precision,
            device_map=device_map,
            first=first,
        )
    check_in_memory(thing, name_of(thing), trust_remote_code, precision, device_map)
    if isinstance(thing, Foreign):
        if condition is not None:
            raise ValueError(
                f"{thing.name} is loaded: give the condition to integrations.load(...)"
            )
        return thing if steps is None else _of_steps(thing, steps)
    if isinstance(thing, Model | LatentModel):
        return _of_model(thing, steps, condition)
    if not memory.has_scheduler(thing):
        raise ValueError(
            "a network alone says neither its noise levels nor the shape of an example: give the"
            f" model of nelbo.wrap(network, shape, ...); got {name_of(thing)}"
        )
    found = memory.read(thing, cast(Any, ()), steps=steps, condition=condition, reading={})
    found = in_precision(found, precision)
    notes = found.model.diffusion.check_reading()  # at pure noise, as there are no examples
    return replace(found, notes=(*found.notes, *notes))


def _of_steps(found: Foreign, steps: int) -> Foreign:
    if found.of_steps is not None:
        return found.of_steps(steps)
    return replace(found, times=grid_of(found.model.diffusion, steps))


def _of_model(
    model: Model | LatentModel, steps: int | None, condition: Condition | None
) -> Foreign:
    """Return a bare model with steps of its own, if it has any."""
    own = model.diffusion.process.schedule.steps if steps is None else steps
    times: TimeDiscretization = ContinuousTime()
    if own is not None:
        times = grid_of(model.diffusion, own)
    given = None if condition is None else Given.of(condition)
    return Foreign(type(model).__name__, model, schema_of(model), times, "as given", (), given)


def schema_of(model: Model | LatentModel) -> Schema:
    """Return the schema of an example of a model."""
    levels = model.codes or None
    return Schema("levels" if levels else "real", model.shape, levels)
