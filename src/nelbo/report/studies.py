"""What a report measures beside the bound: few steps, the path of samples, single dimensions."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.distributed import no_communication
from nelbo._utils.numerics import LOG_2, draw, seeded
from nelbo._utils.progress import Track
from nelbo.codec.api import compress, decompress
from nelbo.codec.coding.codec import check_codable
from nelbo.codec.entropy.stack import constriction
from nelbo.codec.settings import Settings
from nelbo.data import Schema
from nelbo.diffusion.batch import Batch, rows_of
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import Prediction
from nelbo.diffusion.reverse import Mixture, Posterior, ReverseKernel
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.per_dimension import by_dimension
from nelbo.report.figures import StepCurve
from nelbo.report.other_codecs import Rival, rivals
from nelbo.sampling.samplers import descend

STEPS = (2, 4, 8, 16, 32, 64)
CODED_STEPS = (4, 8, 16, 64)
SAMPLE_STEPS = 32
EXAMPLES = 256  # at most, of the test data


def is_image(schema: Schema) -> bool:
    """Grey, RGB or RGBA images that are worth showing as such."""
    return len(schema.shape) == 3 and schema.shape[0] in (1, 3, 4) and min(schema.shape[1:]) >= 4


def some(model: Model, x: Tensor, seed: int) -> Tensor:
    """Rows of x drawn without replacement, in their order; fewer where each takes more memory."""
    count = min(EXAMPLES, max(16, model.rows))
    with seeded(seed, 1):
        return torch.randperm(len(x))[:count].sort().values


def steps_of(model: Model) -> dict[str, ReverseKernel]:
    """The reverse steps this model can take, by name, its own included."""
    values = model.head.level_values
    mixture = [] if values is None else [Mixture(values)]
    # the model's own is last, and so the one that its name stands for
    steps: list[ReverseKernel] = [*mixture, Posterior(), model.step]
    return {step.name(model.process): step for step in steps}


def own_step(model: Model) -> str:
    """The name of the model's own step."""
    return model.step.name(model.process)


def measure_steps(
    model: Model,
    batch: Batch,
    seed: int,
    track: Track = iter,
    best: Callable[[int], TimeGrid] | None = None,
) -> tuple[list[StepCurve], Tensor]:
    """Each reverse step at T = 2, 4, ..., 64, and ∞, which they share; and the costs of each
    dimension (N, *shape) with the model's own step at 64. In the unit of the evaluation.

    All on uniform grids; with `best`, first the model's own step on the grids it gives, and the
    same on uniform ones thin behind it.
    """
    kinds = steps_of(model)
    limit = evaluate(model, batch, calls=64, seed=seed, track=track)
    scale = 1.0 if limit.bits_per_dim is None else 1 / LOG_2
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
            each = scale * sum(bound, start=torch.zeros(()))
            if name == own:
                cost = each
            total = each.flatten(1).sum(1) / (1 if scale == 1 else model.dims)
            error = (
                (total.var(correction=1) / len(batch)).sqrt()
                if len(batch) > 1
                else torch.zeros(())
            )
            found[name].append((total.mean().item(), error.item()))
    value = limit.nats if limit.bits_per_dim is None else limit.bits_per_dim
    last = value, float(np.nan_to_num(limit.standard_error.total))
    curves = []
    for name, points in found.items():
        values, errors = zip(*points, last, strict=True)
        curves.append(StepCurve(name, STEPS, values, errors, bool(best) and name == own))
    return curves, cost


@dataclass(frozen=True)
class Coded:
    """Files of the same examples, by this run at several numbers of steps and by other codecs.

    Args:
        examples: how many.
        dims: of each.
        ours: one for each number of steps.
        others: that are installed.
    """

    examples: int
    dims: int
    ours: tuple[Rival, ...]
    others: tuple[Rival, ...]


def measure_files(
    model: Model, x: Tensor, best: Callable[[int], TimeGrid], track: Track = iter
) -> Coded | None:
    """The bytes that examples x (N, *shape) take; None where there is no lossless code of them,
    or constriction is not installed."""
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
    """Ancestral samples x, and at some of the times z_t and the prediction ê at z_t."""

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
    """The samples of `sample.ancestral` on a grid, with what happened on the way."""
    shots = times.times[torch.linspace(len(times.times) - 1, 0, 8).round().long()].tolist()
    seen: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in shots}

    def predict(rows: Tensor, z: Tensor, t: Tensor) -> Prediction:
        found = model.predict(z, t, rows_of(condition, rows))
        if (at := t[0].item()) in seen:
            seen[at].append((z.cpu(), found.e_hat.cpu()))
        return found

    def step(rows: Tensor, z: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return draw(model.step(predict(rows, z, t), z, s, t, model.process))

    def decode(rows: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return model.decoder(predict(rows, z, t), z, t, model.process).sample()

    with no_communication():  # what is seen is of all rows
        x = descend(model, count, times, seed, step, decode, track=track)
    z, e_hat = (
        [torch.cat([pair[k] for pair in pairs]) for pairs in seen.values()] for k in (0, 1)
    )
    return Trajectory(x.cpu(), list(seen), z, e_hat)
