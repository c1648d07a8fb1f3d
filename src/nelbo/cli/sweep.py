"""`nelbo evaluate --steps 10,50,200`: the bounds of several numbers of steps, side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nelbo._utils.scalars import integer
from nelbo.cli.common import json_text, say

if TYPE_CHECKING:
    import torch


def numbers(steps: str | None) -> list[int]:
    """Return the numbers of steps of an option such as 50 or 10,50,200, from the fewest.

    Raises:
        ValueError: they are not whole numbers from 1, or one occurs twice.
    """
    if steps is None:
        return []
    try:
        found = sorted(int(each) for each in steps.split(","))
    except ValueError:
        raise ValueError(
            f"--steps is a number, or several as in 10,50,200; got {steps!r}"
        ) from None
    for each in found:
        integer("steps", each, 1)
    if len({*found}) < len(found):
        raise ValueError(f"--steps has a number twice; got {steps!r}")
    return found


def sweep(
    run: str,
    counts: Sequence[int],
    place: "torch.device",
    options: Mapping[str, Any],
    *,
    tell: bool,
    json: bool,
) -> None:
    """Print the bound of each number of steps, and where it is spent: a table, or one JSON object.

    Args:
        run: a run folder, or another library's model.
        counts: the numbers of steps.
        place: the device.
        options: of `nelbo.evaluate`, other than steps.
        tell: whether this process prints.
        json: print one object with the list `sweep`.
    """
    from nelbo import integrations
    from nelbo.cli import display
    from nelbo.evaluation.result import Evaluation
    from nelbo.runs.commands import evaluate
    from nelbo.runs.loading import load

    found: list[Evaluation] = []
    said: set[str] = set()
    loaded = None
    if not integrations.is_foreign(run):
        loaded = load(run)
        loaded.model.to(place)
    for count in counts:
        if loaded is not None:
            result = evaluate(loaded, steps=count, **options)
        else:
            foreign = integrations.load(run, steps=count)
            foreign.model.to(place)
            result = evaluate(foreign, **options)
        assert isinstance(result, Evaluation)
        found.append(result)
        for note in result.notes if tell else ():
            if note not in said:
                say(f"note: {note}")
            said.add(note)
    if not tell:
        return
    if json:
        print(json_text({"sweep": [each.to_dict() for each in found]}))
        return
    display.sweep(found)
