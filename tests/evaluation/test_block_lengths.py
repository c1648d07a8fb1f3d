"""Block diffusion over T steps: one number of blocks for all texts, those of the longest."""

import pytest
import torch
from evaluation.test_masks import MASK, tiny

import nelbo
from nelbo import TimeGrid
from nelbo.diffusion.model import Model
from nelbo.evaluation import both_sides as sides
from nelbo.evaluation import replicates

SHORT = [[3, 1], [1, 0], [2, 2], [0, 3]] * 9
TEXTS = [*SHORT, [1, 2, 0, 3, 3, 1]]


def in_one_step(model):
    """log P of each short text, both of whose tokens show in the one step of their block."""
    logits = model.network.module(torch.full((1, 2), MASK))[0].clone()
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(1)[[0, 1], torch.tensor(SHORT)].sum(1)


@pytest.mark.parametrize(
    "find",
    [
        lambda model: nelbo.elbo(model, TEXTS, steps=3, calls=32).elbo,
        lambda model: nelbo.evaluate(model, TEXTS, steps=3, importance_samples=2).per_example,
    ],
    ids=["each", "importance"],
)
def test_steps_are_divided_among_the_blocks_of_the_longest(find, monkeypatch):
    """Also where texts are measured together with short ones alone."""
    monkeypatch.setattr(replicates, "BLOCK", 4)
    monkeypatch.setattr(Model, "rows", 4)
    model = tiny(4, block=2)
    wanted = in_one_step(model)
    torch.testing.assert_close(find(model)[: len(SHORT)], wanted, rtol=1e-10, atol=1e-10)


def test_one_path_from_both_sides(monkeypatch):
    """With one step for each block the path of a text is certain, and both ends are log P."""
    monkeypatch.setattr(sides, "BLOCK", 4)
    model = tiny(4, block=2)
    condition = model.batch(TEXTS).condition
    found = sides.both_sides(
        model, len(TEXTS), times=TimeGrid(model.even_times(3)), samples=2, condition=condition
    )
    torch.testing.assert_close(found.lower, found.upper, rtol=1e-10, atol=1e-10)
