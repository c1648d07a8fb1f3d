"""A batch in parts is the same batch: the same loss and gradient, whatever is random in them."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributions import Laplace, Normal

from nelbo._utils.batch_rng import BatchShard, current, drawn_by_rows, rand, randn, row_streams
from nelbo._utils.numerics import seeded
from nelbo.data import Dataset, Label, Schema
from nelbo.diffusion.distributions import (
    Discrete,
    DiscretisedNormal,
    Joint,
    LevelMixture,
    draw,
    kl_noise,
)
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.process import per_example
from nelbo.nn.dropout import Dropout
from nelbo.training.parallel import blocks
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

IMAGES = Schema("levels", (1, 4, 5), 4)
CONV = {"network": "conv", "width": 8, "depth": 1, "dropout": 0.3}
CASES = {
    "levels": (IMAGES, CONV | {"augment": 0.5}),
    "ensemble": (IMAGES, CONV | {"members": 3, "augment": 0.0}),
    "learned": (IMAGES, CONV | {"schedule": "learned-ends", "augment": 0.0}),
    "min-snr": (IMAGES, CONV | {"objective": "min-snr", "augment": 0.0}),
    "unet": (IMAGES, {"network": "unet", "width": 8, "dropout": 0.3, "augment": 0.0}),
    "grid": (IMAGES, CONV | {"grid": (0.1, 0.4, 1.0), "augment": 0.0}),
    "symbols": (Schema("levels", (6,), 5), {"process": "absorbing", "width": 16}),
    "text": (
        Schema("levels", (6,), 5),
        {"network": "transformer", "process": "absorbing", "width": 32, "dropout": 0.3},
    ),
    "real": (Schema("real", (3,), None), {"dropout": 0.3, "width": 16}),
    "labels": (
        Schema("levels", (1, 4, 5), 4, condition=(Label("class", classes=("a", "b")),)),
        CONV | {"augment": 0.5, "label_dropout": 0.4},
    ),
}


def learner_of(name, **options):
    """In float64, and with weights that are not at their first zeros."""
    schema, given = CASES[name]
    with seeded(1):
        shape = (30, *schema.shape)
        x = torch.randn(shape).double() if schema.levels is None else torch.randint(0, 4, shape)
        labels = {k: torch.randint(0, 2, (30, 1)).double() for k in ("train", "validation")}
    splits = {"train": x, "validation": x}
    dataset = Dataset("memory", schema, splits, labels=labels if schema.condition else {})
    config = configure(schema, 30, batch=11, steps=9, warmup=0, **given, **options)
    made = Trainer(*config, dataset, affine=None if schema.levels else Affine())
    with seeded(2), torch.no_grad():
        for p in made.model.network.parameters():
            p += 0.05 * torch.randn_like(p)
    for model in (made.model, made.average):
        model.double().dtype = torch.float64
    return made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulate", [2, 3, 11])
def test_the_gradient_of_a_batch_is_the_sum_of_its_parts(name, accumulate):
    """11 examples in 2, 3 and 11 parts, of one of which no reconstruction is drawn: dropout,
    augmentation, noise, times and members are those of the batch in one part."""
    found = []
    for parts in (1, accumulate):
        learner = learner_of(name, accumulate=parts)
        for step in range(3):  # the times follow from what was found before
            learner.optimizer.zero_grad()
            u, loss = learner._gradient(step)
            learner.law.learn(u, loss.each)
        gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
        found.append([u, *loss, *gradients])
    largest = max(g.abs().max().item() for g in gradients)
    assert largest > 0
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-9, atol=1e-11 * largest)


@pytest.mark.parametrize("name", ["levels", "ensemble", "grid"])
def test_every_part_calls_the_network_equally_often(name):
    """Once, whatever it draws: processes that share out its weights would wait for each other."""
    learner, calls = learner_of(name, accumulate=11), []
    learner.model.network.register_forward_hook(lambda *_: calls.append(1))
    learner._gradient(0)
    assert len(calls) == 11


@contextmanager
def counting():
    """The tensors that are kept for a gradient."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


@pytest.mark.parametrize("name", ["levels", "ensemble", "text", "real"])
def test_activations_that_are_computed_again_give_the_same_gradient(name):
    """To the bit: the same masks of dropout, also of parts."""
    found = []
    for again in (False, True):
        learner = learner_of(name, accumulate=2, checkpoint_activations=again)
        assert blocks(learner.model.network)
        with counting() as kept:
            _, loss = learner._gradient(0)
        gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
        found.append((len(kept), [loss.loss, loss.each, *gradients]))
    (many, plain), (few, same) = found
    assert few < 0.7 * many
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_random_numbers_of_a_part_are_its_rows_of_the_whole(last):
    h = torch.rand(7, 4, 3, 5)
    h = h.to(memory_format=torch.channels_last) if last else h
    values = torch.linspace(0, 1, 4)
    kinds = [
        lambda x: Normal(x, 1 + x),
        lambda x: DiscretisedNormal(x, torch.tensor(0.3), values),
        lambda x: Discrete(x.log_softmax(-1)),
        lambda x: LevelMixture(x.log_softmax(-1), x, 1 + x),
        lambda x: per_example(
            Joint([Normal(x, 1 + x), Discrete(x[..., None].expand(*x.shape, 3))])
        ),
    ]
    ways = [lambda x, shard, kind=kind: draw(kind(x), shard) for kind in kinds]
    ways.append(lambda x, shard: kl_noise(Normal(x[..., 0], 1.0), kinds[3](x), shard))
    ways.append(lambda x, shard: Dropout(0.4)(x))
    for way in ways:
        with seeded(3):
            whole = way(h, None)
        for rows in ([0, 3, 6], [1, 2], [5]):
            rows = torch.tensor(rows)
            with seeded(3), BatchShard(rows, 7) as shard:
                assert torch.equal(way(h[rows], shard), whole[rows])
                after = torch.rand(())
            with seeded(3):
                way(h, None)
                assert torch.rand(()) == after  # the next draw begins at the same place


def test_a_row_with_a_stream_of_its_own_has_the_same_numbers_anywhere():
    """Also with several numbers for a row: theirs stand one after the other."""
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 2.0], [-0.0, 3.0]])
    both = []
    for rows in ([0, 1, 2, 3], [1, 0]):
        with drawn_by_rows(row_streams(x[rows], 7)):
            uniform = rand((2 * len(rows), 500), dtype=torch.float64)
            normal = randn((len(rows), 3, 500), None, x)
        both.append((uniform.unflatten(0, (len(rows), 2)), normal))
    for all_rows, two in zip(*both, strict=True):
        assert torch.equal(all_rows[[1, 0]], two)
        assert torch.equal(all_rows[:2], all_rows[2:]) and (all_rows[0] != all_rows[1]).all()
    (uniform, normal), _ = both
    assert uniform.dtype == torch.float64 and normal.dtype == torch.float32
    assert abs(uniform.mean() - 1 / 2) < 0.03 and abs(uniform.var() - 1 / 12) < 0.01
    assert abs(normal[:2].mean()) < 0.08 and abs(normal[:2].var() - 1) < 0.1
    with drawn_by_rows(row_streams(x, 7)), pytest.raises(RuntimeError, match="among 4 examples"):
        rand((6,))
    with seeded(1), drawn_by_rows(None):
        same = rand((3,))
    with seeded(1):
        assert torch.equal(same, torch.rand(3))


def test_an_example_can_have_several_rows():
    shard = BatchShard(torch.tensor([0, 2]), 4)
    with seeded(3):
        whole = rand((12, 5))
    with seeded(3):
        assert torch.equal(rand((6, 5), shard), whole[[0, 1, 2, 6, 7, 8]])
    with pytest.raises(RuntimeError, match="among 2 ex"):
        rand((3,), shard)
    assert len(current(5)) == 5


def test_another_kind_of_distribution_is_not_drawn():
    with pytest.raises(TypeError, match="draw a Laplace is unknown"):
        draw(Laplace(torch.zeros(2), torch.ones(2)))


def test_parts_of_parts():
    part = BatchShard(torch.tensor([1, 4, 7]), 9)
    own, within = part.between(4, 9)
    assert (own, within.rows.tolist(), within.batch) == (slice(1, 3), [0, 3], 5)
    chosen = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1]).bool()
    among = part.among(chosen)
    assert (among.rows.tolist(), among.batch) == ([0, 3], 5)
    assert part.of(torch.arange(9)).tolist() == [1, 4, 7]


def test_a_part_needs_an_example():
    with pytest.raises(ValueError, match=r"batch must be at least 12, one .* 1 process; got 11"):
        learner_of("real", accumulate=12)


def test_all_dropout_of_the_networks_is_that_of_parts():
    for name in CASES:
        for module in learner_of(name).model.modules():
            assert not isinstance(module, nn.Dropout) or isinstance(module, Dropout)
