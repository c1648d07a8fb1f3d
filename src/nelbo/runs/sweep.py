"""The bounds of several numbers of steps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Unpack, cast

from nelbo._utils.arguments import checked
from nelbo._utils.progress import tracks
from nelbo._utils.scalars import integer
from nelbo.data.sources import Source, Splits
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.evaluation.alternatives import Alternative
from nelbo.evaluation.result import Evaluation
from nelbo.integrations import Foreign
from nelbo.integrations.conditions import Condition
from nelbo.integrations.memory import Reading
from nelbo.integrations.text_records import TextForm
from nelbo.runs.evaluation import Measuring
from nelbo.runs.subjects import AnyRun, Asked, OfForeign, Subject, Tell, check_enough, subject_of


@checked
def sweep(
    run: AnyRun | Foreign | Model | object,
    steps: Sequence[int],
    data: Source | Batch | None = None,
    split: str | None = None,
    *,
    splits: Splits | None = None,
    condition: Condition | None = None,
    lines: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    calls: float | None = None,
    target_error: float | None = None,
    variates: bool | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    tell: Tell | None = None,
    **reading: Unpack[Reading],
) -> list[Evaluation]:
    """Measure the bound of each of several numbers of steps; the data are read once.

    Args:
        run: as for `evaluate`.
        steps: the numbers of steps.
        data: as for `evaluate`, like all others.
        split: which examples.
        splits: which names belong to which split.
        condition: c of the examples.
        lines: of a text file, each line is an example.
        prompt_field: name of the text that shows.
        answer_field: name of the text that is scored.
        calls: network calls per example, at most.
        target_error: in place of calls, the Monte Carlo standard error to reach.
        variates: use control variates, as for `evaluate`.
        trust_remote_code: run the code in the folder of "hf:FOLDER".
        precision: of the weights.
        device_map: where to put the weights.
        device: "cpu" or "cuda".
        seed: of everything random.
        progress: show bars on the error stream.
        tell: called with each note as it arises.
        reading: of a network in memory.

    Raises:
        ValueError: as for `evaluate`, or no number of steps is given.
    """
    if not steps:
        raise ValueError("give at least one number of steps")
    options = {"calls": calls, "target_error": target_error, "variates": variates}
    found: list[Evaluation] = []
    read, on_data = None, list[str]()
    counts = [integer("steps", count, 1) for count in steps]
    form = TextForm(lines, prompt_field, answer_field)
    make = partial(
        subject_of,
        run,
        data,
        condition=condition,
        trust_remote_code=trust_remote_code,
        precision=precision,
        device_map=device_map,
        reading=reading,
        ahead=[Asked(data, split, splits, form, str)],
        check=partial(check_enough, calls, False),
    )
    for subject, left in _of_each(make, counts):
        if device is not None:
            subject.to(device)
        measuring = Measuring(subject, Alternative(), options, seed, tracks(progress), tell)
        asked = Asked(data, split, splits, form, measuring.note)
        if read is None:
            before = len(measuring.notes)
            read = subject.read(asked)
            on_data = measuring.notes[before:]
        else:
            measuring.notes += on_data
        batch, name = subject.examples(asked, read)
        times = subject.times(left, None, measuring.tracks("best times"))
        found.append(cast(Evaluation, measuring(batch, name, data is None, times, None)))
    return found


def _of_each(
    make: Callable[..., tuple[Subject, int | None]], counts: Sequence[int]
) -> list[tuple[Subject, int | None]]:
    """Return what is measured for each number of steps, of one network, before any is measured."""
    first, left = make(steps=counts[0])
    if left is not None:
        return [(first, count) for count in counts]
    if isinstance(first, OfForeign) and first.foreign.of_steps is not None:
        others = map(first.foreign.of_steps, counts[1:])
        return [(first, None), *((OfForeign(foreign=each), None) for each in others)]
    return [(first, None), *(make(steps=count) for count in counts[1:])]
