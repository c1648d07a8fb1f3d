"""No number depends on the order of the examples, but for the rounding of sums."""

import pytest
import torch
from evaluation.test_masks import MASK, tiny
from support import known_models
from torch import nn

import nelbo
from nelbo import Batch, TimeGrid
from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.gaussian import GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits
from nelbo.diffusion.reverse import Mixture
from nelbo.diffusion.schedules import Linear
from nelbo.evaluation.both_sides import both_sides
from nelbo.evaluation.grid_search import _some, measure
from nelbo.evaluation.per_dimension import by_dimension

GRID = TimeGrid.uniform(4)


class Tilted(nn.Module):
    """Logits of images that lean with z and with the condition."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, z, level, condition):
        lean = 0.05 * level + 0.3 * condition.sum(1)
        return (z[..., None] + lean[:, None, None, None, None]) * self.weight


def images(examples=150):
    """A model of small images with conditions, and some, of which two are equal."""
    levels = Levels(4)
    process, head = GaussianDiffusion(Linear(-6.0, 5.0), levels), LevelLogits(levels.values)
    parts = process, head, Mixture(levels.values), LevelDecoder()
    model = Model(Tilted(), *parts, (1, 3, 5), conditioned_on="class")
    with seeded(1):
        x, c = torch.randint(0, 4, (examples, 1, 3, 5)), torch.randn(examples, 2)
    x[1], c[1] = x[0], c[0]
    return model, Batch(x.to(torch.uint8), c)


def known(name, examples=200):
    made = getattr(known_models, name)()
    return made.model, Batch(made.examples(examples))


def texts(examples):
    """Texts of unequal lengths, of which the first token shows."""
    model = tiny(4)
    with seeded(2):
        ids = torch.randint(0, MASK, (examples, 7)).tolist()
    rows = [row[: 3 + i % 5] for i, row in enumerate(ids)]
    return model, model.batch(rows, torch.arange(7) == 0)


def permutation(batch):
    """An order of the examples in which equal ones keep theirs."""
    parts = [v.flatten(1).double() for v in (batch.x, batch.condition) if v is not None]
    _, kind = torch.cat(parts, 1).unique(dim=0, return_inverse=True)
    with seeded(3):
        order = torch.randperm(len(batch))
    order[kind[order].argsort(stable=True)] = kind.argsort(stable=True)
    return order


def flat(row):
    return row if isinstance(row, tuple) else [float(row)]


def of_evaluation(found):
    arrays = {name: torch.from_numpy(array) for name, array in found.to_arrays().items()}
    curve = [(point.value, point.standard_error) for point in found.curve]
    error = found.standard_error
    return arrays, [found.nats, error.total, error.monte_carlo, found.calls_per_example, *curve]


def bound(**options):
    return lambda model, batch: of_evaluation(nelbo.evaluate(model, batch, **options))


def another(**options):
    def find(model, batch):
        found = nelbo.evaluate(model, batch, **options)
        return {"nats": found.per_example}, [found.nats, found.standard_error.monte_carlo]

    return find


def from_both_sides(model, batch):
    found = both_sides(model, len(batch), times=GRID, samples=2, condition=batch.condition)
    return {"x": found.x, "lower": found.lower, "upper": found.upper}, [found.nats, found.gap]


def of_each(model, batch):
    return vars(nelbo.elbo(model, batch, calls=16)), []


def of_dimensions(model, batch):
    (found,) = by_dimension(model, batch, GRID)
    return found._asdict(), []


def steps(model, batch):
    table = measure(model, batch[_some(model, batch, 0)], GRID.times, 4)
    return {}, table.decode


CASES = {
    "images, a pilot": (images, bound(calls=24)),
    "images, a sample": (images, bound(calls=1.5)),
    "images, a target error": (images, bound(target_error=0.02)),
    "real numbers": (lambda: known("gaussian"), bound(calls=12, per_example=True)),
    "masks, steps": (lambda: texts(200), bound(calls=8, steps=5)),
    "masks, exact counts": (lambda: texts(530), bound(calls=6, per_example=True)),
    "uniform": (lambda: known("replaced"), bound(calls=6)),
    "importance": (lambda: known("symbols"), another(steps=4, importance_samples=2)),
    "probability flow": (lambda: known("gaussian"), another(ode=True, tolerance=1e-3)),
    "both sides": (images, from_both_sides),
    "each": (images, of_each),
    "dimensions": (images, of_dimensions),
    "costs of steps": (images, steps),
}


@pytest.mark.parametrize("case", CASES)
def test_permuted_examples_have_permuted_numbers(case):
    """The same draws for each example, so all numbers agree to rounding: those of the mean, and
    those of each example, also which are visited."""
    make, find = CASES[case]
    model, batch = make()
    order = permutation(batch)
    each, of_all = find(model, batch)
    other, of_all_again = find(model, batch[order])
    for name, numbers in each.items():
        torch.testing.assert_close(
            other[name], numbers[order], rtol=1e-10, atol=1e-10, equal_nan=True, msg=name
        )
    torch.testing.assert_close(
        torch.tensor([v for row in of_all_again for v in flat(row)]),
        torch.tensor([v for row in of_all for v in flat(row)]),
        rtol=1e-10,
        atol=1e-10,
        equal_nan=True,
    )


KINDS = {"masked": {}, "uniform": {"mask_id": None, "process": "uniform"}, "blocks": {"block": 2}}
DRAWS = {
    "counts": {"calls": 5},
    "steps": {"calls": 5, "steps": 6},
    "importance": {"importance_samples": 2, "steps": 6},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", DRAWS)
def test_padding_changes_nothing(kind, draws):
    """On either side, as ids and as conditions: neither draws of noise, nor the order of texts."""
    model = tiny(4, pad_id=3, **KINDS[kind])
    with seeded(2):
        rows = [row[: 3 + i % 4] for i, row in enumerate(torch.randint(0, 3, (80, 6)))]

    def padded(left, right):
        """Ids of which each is at another place, the longest after `left` and before `right`."""
        free = [6 - len(row) for row in rows]
        before = [left + i % (some + 1) for i, some in enumerate(free)]
        sizes = zip(rows, before, strict=True)
        width = left + 6 + right
        pad = nn.functional.pad
        return torch.stack([pad(r, (b, width - b - len(r)), value=3) for r, b in sizes])

    ids = padded(3, 2)
    there = ids != 3
    given = Batch(torch.where(there, ids, 0), torch.where(there, -1, -2))
    find = another(**DRAWS[draws])
    nats, of_all = find(model, rows)
    for batch in (padded(0, 0), padded(0, 4), ids, given):
        other, of_all_again = find(model, batch)
        assert of_all_again[0] == of_all[0] and torch.equal(*map(_nats, (other, nats)))


def _nats(arrays):
    (nats,) = arrays.values()
    return nats if isinstance(nats, torch.Tensor) else nats.elbo
