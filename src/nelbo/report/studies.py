"""Measurements of a report beside the bound: few steps, files, trajectories, single dimensions."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo._utils.batch_rng import BatchShard
from nelbo._utils.distributed import no_communication
from nelbo._utils.numerics import LOG_2, seeded
from nelbo._utils.progress import Track
from nelbo.codec.api import compress, decompress
from nelbo.codec.coding.codec import check_codable
from nelbo.codec.entropy.stack import constriction
from nelbo.codec.settings import Settings
from nelbo.diffusion.batch import Batch, rows_of
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.model import Model
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.blocks import scale_of
from nelbo.evaluation.per_dimension import by_dimension, own_step, steps_of
from nelbo.report.figures import StepCurve
from nelbo.report.other_codecs import Rival, rivals
from nelbo.sampling.samplers import descend

STEPS = (2, 4, 8, 16, 32, 64)
CODED_STEPS = (4, 16)
SAMPLE_STEPS = 32
EXAMPLES = 256  # of the test data, at most


def some(model: Model, x: Tensor, seed: int) -> Tensor:
    """Return random row numbers of x, sorted and distinct; fewer if each row takes more memory."""
    count = min(EXAMPLES, max(16, model.rows))
    with seeded(seed, 1):
        return torch.randperm(len(x))[:count].sort().values


def measure_steps(
    model: Model,
    batch: Batch,
    limit: Tensor,
    seed: int,
    track: Track = iter,
    best: Callable[[int], TimeGrid] | None = None,
) -> tuple[list[StepCurve], Tensor]:
    """Return the bound of each reverse kernel at T = 2, 4, ..., 64 and ∞, and costs per dimension.

    The costs (N, *shape) are those of the model's own kernel at T = 64 on the uniform grid. All
    are in the unit of the evaluation. The value at T = ∞ is common to all kernels: it is the mean
    of `limit`, the bounds of these examples in continuous time, shape (N,), nats. Grids are
    uniform; with `best`, the first curve is the model's own kernel on the grids that it returns,
    and the same kernel on uniform grids is drawn thin.
    """
    kinds = steps_of(model)
    scale = 1.0 if model.decoder.density else 1 / LOG_2

    def summary(nats: Tensor) -> tuple[float, float]:
        """Return the mean of the costs of examples, (N,), and its standard error."""
        each = nats * scale_of(model, batch)
        error = (each.var() / len(each)).sqrt().item() if len(each) > 1 else 0.0
        return each.mean().item(), error

    own = own_step(model)
    first = f"{own}, best grid"
    names = ([first] if best else []) + [own, *(name for name in kinds if name != own)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    cost = torch.empty(0)
    for i in track(range(len(STEPS))):
        grid = TimeGrid.uniform(STEPS[i])
        bounds = dict(
            zip(kinds, by_dimension(model, batch, grid, tuple(kinds.values()), seed), strict=True)
        )
        if best:
            (bounds[first],) = by_dimension(model, batch, best(STEPS[i]), (), seed)
        for name, bound in bounds.items():
            each = sum(bound, start=torch.zeros(()))
            if name == own:
                cost = scale * each
            found[name].append(summary(each.flatten(1).sum(1)))
    curves = []
    for name, points in found.items():
        values, errors = zip(*points, summary(limit), strict=True)
        thin = bool(best) and name == own
        shown = f"{name}, uniform grid" if thin else name
        curves.append(StepCurve(shown, STEPS, values, errors, thin))
    return curves, cost


@dataclass(frozen=True)
class Coded:
    """Sizes of examples coded by this run at several numbers of steps and by other codecs.

    Args:
        examples: number of examples.
        dims: dimensions of each.
        ours: one result for each number of steps.
        others: results of the installed codecs.
    """

    examples: int
    dims: int
    ours: tuple[Rival, ...]
    others: tuple[Rival, ...]


def measure_files(
    model: Model, x: Tensor, best: Callable[[int], TimeGrid], track: Track = iter
) -> Coded | None:
    """Compress and decompress examples x (N, *shape) by the model and by other codecs.

    Return None if there is no lossless code for the model or the examples, or constriction is not
    installed. A shorter text has no code as an example.
    """
    if model.process.absent is not None:
        x = x[model.scored_places(Batch(x)).all(1)]
    if not len(x):
        return None
    try:
        check_codable(model)
        constriction()
    except ValueError:
        return None
    ours = []
    for i in track(range(len(CODED_STEPS))):
        steps = CODED_STEPS[i]
        settings = Settings(tuple(best(steps).times.tolist()))
        start = time.perf_counter()
        data = compress(model, x, settings, verify=False)
        middle = time.perf_counter()
        assert torch.equal(decompress(data, model).x.long(), x.long())
        seconds = middle - start, time.perf_counter() - middle
        ours.append(Rival(f"nelbo, {steps} steps", len(data), seconds))
    small = x.max() < 256
    others = rivals(x.to(torch.uint8).numpy()) if small else []
    return Coded(len(x), model.dims, tuple(ours), tuple(others))


@dataclass(frozen=True)
class Trajectory:
    """Ancestral samples x, with z_t and the prediction ê(z_t) at some of the times."""

    x: Tensor
    times: list[float]
    z: list[Tensor]
    e_hat: list[Tensor]


def trajectory(
    model: Model,
    count: int,
    times: TimeGrid,
    seed: int,
    track: Track = iter,
    condition: Tensor | None = None,
) -> Trajectory:
    """Draw the samples of `samplers.ancestral` on a grid and record their trajectories."""
    shots = times.times[torch.linspace(len(times.times) - 1, 0, 8).round().long()].tolist()
    seen: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in shots}

    def predict(rows: Tensor, z: Tensor, t: Tensor) -> Prediction:
        found = model.predict(z, t, rows_of(condition, rows))
        if (at := t[0].item()) in seen:
            seen[at].append((z.cpu(), found.e_hat.cpu()))
        return found

    def step(rows: Tensor, z: Tensor, s: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        return draw(model.step(predict(rows, z, t), z, s, t, model.process), part)

    def decode(rows: Tensor, z: Tensor, t: Tensor, part: BatchShard) -> Tensor:
        return draw(model.decoder(predict(rows, z, t), z, t, model.process), part)

    with no_communication():  # this process records all rows
        x = descend(model, count, times, seed, step, decode, track=track)
    z, e_hat = (
        [torch.cat([pair[k] for pair in pairs]) for pairs in seen.values()] for k in (0, 1)
    )
    return Trajectory(x.cpu(), list(seen), z, e_hat)
