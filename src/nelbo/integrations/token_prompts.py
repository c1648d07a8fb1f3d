"""Texts to draw: a prompt of ids that shows, and after it places of tokens that do not."""

from collections.abc import Sequence
from itertools import count

import torch

from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.integrations.token_rows import TokenRules

DRAWN = 128  # tokens of a sample where no number is given, like a chunk of nelbo's own texts


def places_to_draw(
    rules: TokenRules,
    prompts: Sequence[Sequence[int]],
    length: int | None = None,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
) -> Batch:
    """Return texts of which the prompts and special tokens show, and `length` tokens do not.

    Args:
        rules: of the model.
        prompts: ids of each text's, none for no prompt.
        length: number of tokens to draw for each; where left out DRAWN, or as many as there is
            room for beside the longest prompt.
        before: special tokens before each prompt.
        after: those after the tokens that are drawn.

    Raises:
        ValueError: `length` is below 1, or there is no room for as many tokens.
    """
    added, longest = len(before) + len(after), max(map(len, prompts))
    room = None if rules.length is None else rules.length - added - longest
    if length is not None:
        length = integer("length", length, 1)
    if room is not None and room < max(1, length or 1):
        raise ValueError(
            f"the model takes {rules.length} tokens: beside {added} special ones and a prompt of"
            f" {longest} there is room for {max(0, room)}, and {length or 1} must be drawn; give a"
            " shorter prompt or a smaller length"
        )
    size = length or min(DRAWN, DRAWN if room is None else room)
    any_id = next(i for i in count() if i not in rules.never and i != rules.mask_id)
    rows = [[*before, *each, *[any_id] * size, *after] for each in prompts]
    shown = torch.ones(len(rows), max(map(len, rows)), dtype=torch.bool)
    for row, each in zip(shown, prompts, strict=True):
        first = len(before) + len(each)
        row[first : first + size] = False
    return rules.batch(rows, shown)
