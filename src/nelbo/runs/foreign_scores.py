"""Scores of single examples under another library's model or a bare one.

The bound of each example has the error of its own draws. Rank and percentile need examples of the
usual kind, which such a model does not bring (`against`). Both are measured as one set, by draws
that one pilot allots, so that noise has the same distribution for all and the rank of a new
example of the usual kind is uniform.
"""

from functools import partial
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from nelbo._utils.arguments import checked
from nelbo._utils.numerics import LOG_2
from nelbo._utils.progress import tracks
from nelbo.data.sources import Source, Splits
from nelbo.diffusion.batch import Batch
from nelbo.evaluation.alternatives import Alternative
from nelbo.evaluation.anomaly_scores import SCORES, Scored
from nelbo.evaluation.result import Evaluation
from nelbo.integrations.conditions import Condition
from nelbo.integrations.memory import Reading
from nelbo.integrations.text_records import TextForm
from nelbo.integrations.token_rows import ABSENT
from nelbo.runs.evaluation import Measuring
from nelbo.runs.foreign import schema_of
from nelbo.runs.subjects import Asked, OfForeign, Tell, check_enough, subject_of


@checked
def score_foreign(
    run: object,
    data: Source | Batch | None = None,
    split: str | None = None,
    *,
    splits: Splits | None = None,
    score: str = "bound",
    against: Source | Batch | None = None,
    calls: float | None = None,
    steps: int | None = None,
    condition: Condition | None = None,
    lines: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    tell: Tell | None = None,
    **reading: Unpack[Reading],
) -> Scored:
    """Return the score of each example, its error, and its rank among others if they are given.

    Args:
        run: another library's model or a bare one, as for `nelbo.evaluate`, which has the
            arguments that are not described here too.
        data: the examples.
        split: which of them.
        splits: which names in the data belong to which split.
        score: "bound", "complexity" or "typicality", see `evaluation.anomaly_scores`.
        against: examples of the usual kind, to which rank and percentile refer.
        calls: network calls per example, at most; 24 by default.
        steps: number of steps of the model; its own, or continuous time, by default.
        condition: c of each example.
        lines: of a text file, each line is an example.
        prompt_field: name of the text that shows.
        answer_field: name of the text that is scored.
        trust_remote_code: run the code in the folder of "hf:FOLDER".
        precision: of the weights.
        device_map: where to put the weights.
        device: "cpu" or "cuda".
        seed: of everything random.
        progress: show bars on the error stream.
        tell: called with each note as it arises.
        reading: of a network in memory.

    Raises:
        ValueError: as for `nelbo.evaluate`; or the score is not defined for such data.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    if score == "typicality" and against is None:
        raise ValueError(
            "typicality is the distance of the bound from its usual value: give examples of the"
            " usual kind with --against"
        )
    form = TextForm(lines, prompt_field, answer_field)
    ahead = [Asked(data, split, splits, form, str)]
    if against is not None:
        ahead.append(Asked(against, None, splits, form, str))
    subject, left = subject_of(
        run,
        data,
        steps=steps,
        condition=condition,
        trust_remote_code=trust_remote_code,
        precision=precision,
        device_map=device_map,
        reading=reading,
        ahead=ahead,
        check=partial(check_enough, calls, True),
    )
    if isinstance(subject, OfForeign) and subject.foreign.fit is not None:
        raise ValueError(
            "a part of the model would be fitted to some of the examples, which then have no score"
            " of their own: give that part, such as the distribution of pixels law=laplace:0.05"
        )
    schema = schema_of(subject.model)
    if score == "complexity" and subject.model.any_length:
        raise ValueError(
            "complexity compares the bound with the length of a lossless code, which ids of tokens"
            " do not have; leave --score out"
        )
    options = {"calls": calls, "per_example": True, "variates": None}
    measuring = Measuring(subject, Alternative(), options, seed, tracks(progress), tell)

    def examples(source: Source | Batch | None, part: str | None) -> tuple[Batch, str]:
        asked = Asked(source, part, splits, form, measuring.note)
        return subject.examples(asked, subject.read(asked))

    batch, name = examples(data, split)
    sizes = subject.sizes(batch)
    SCORES[score](torch.zeros(1), batch.x[:1], schema, 0.0)  # raises before the work
    count, whole = len(batch), batch
    if against is not None:
        usual, _ = examples(against, None)
        whole = _joined(batch, usual)
        subject.model.batch(whole)  # a model of tokens takes their length as its own
    if device is not None:
        subject.to(device)
    times = subject.times(left, None, measuring.tracks("best times"))
    found = cast(Evaluation, measuring(whole, name, False, times, None))
    nats = -found.per_example.elbo
    mean = nats[count:].mean().item()
    every = SCORES[score](nats, whole.x, schema, mean)
    bits = None if found.bits_per_dim is None else 1 / (found.dims * LOG_2)
    return Scored(
        every[:count],
        nats[:count],
        found.per_example_error[:count],
        None if against is None else every[count:],
        None if sizes else bits,
        sizes=sizes,
        notes=found.notes,
    )


def _joined(one: Batch, other: Batch) -> Batch:
    """Return the examples of two batches as one; shorter texts end with absent tokens.

    Raises:
        ValueError: they are of other shapes, or conditions of one of them are missing.
    """
    if (one.condition is None) != (other.condition is None):
        raise ValueError("the examples of --against need conditions where those of the data do")
    parts: list[Any] = [one, other]
    x = [torch.as_tensor(each.x[:]) for each in parts]
    conditions = [each.condition for each in parts if each.condition is not None]
    if x[0].ndim == 2 and conditions and conditions[0].shape == x[0].shape:
        size = max(each.shape[1] for each in x)
        x = [_longer(each, size, 0) for each in x]
        conditions = [_longer(each, size, ABSENT) for each in conditions]
    if x[0].shape[1:] != x[1].shape[1:]:
        raise ValueError(
            f"the examples of --against must have the shape {tuple(x[0].shape[1:])} of the data;"
            f" got {tuple(x[1].shape[1:])}"
        )
    return Batch(torch.cat(x), torch.cat(conditions) if conditions else None, one.given)


def _longer(x: Tensor, size: int, value: int) -> Tensor:
    return pad(x, (0, size - x.shape[1]), value=value)
