r"""The best grid of T times for a given model, by dynamic programming.

The bound of T steps is a sum over neighbours on the grid, and its prior term does not change:

    −ELBO(t_1 .. t_T = 1) = prior + R(t_1) + Σ_{i=2..T} D(t_{i-1}, t_i),
    R(t) = E[ −log P(x|z_t) ],   D(s, t) = E KL( q(z_s|z_t,x) ‖ P(z_s|z_t) ).

On a table of R and D over candidate times, the best grid is a shortest path of T nodes,

    B_1(t) = R(t),   B_k(t) = min_{s<t} B_{k-1}(s) + D(s, t),   with the result B_T(1),

and a column of the table, all D(s, t) with one t, takes one network call per example, as the
prediction at z_t serves every s (Watson et al. 2021, for σ² = β̃ and a fixed t_1). All times use
the same noise, so that comparisons are paired, and several processes can share the columns.
Nothing here depends on the process, reverse kernel or decoder.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nelbo._utils.distributed import map_across_processes
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import Noise, draw, kl, kl_noise
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.schedules import even_times
from nelbo.diffusion.times import TimeGrid

EXAMPLES = 192  # examples on which a table is measured, at most
NUMBERS = 2**26  # numbers in the arithmetic of all pairs of a table, about
TOGETHER = 2**19  # numbers of the pairs that are computed together, about


@dataclass(frozen=True)
class Table:
    """Costs between candidate times, of which bounds on grids are sums, in nats per example.

    Attributes:
        times: the M candidate times, increasing, the last 1.
        decode: R(t), shape (M,).
        step: D(s, t) at [s, t], shape (M, M); inf where it is not measured.
    """

    times: Tensor
    decode: Tensor
    step: Tensor

    def bound(self, times: Tensor) -> float:
        """Return R(t_1) + Σ D(t_{i-1}, t_i) for times among the candidates."""
        at = torch.searchsorted(self.times, times - 1e-12)
        return (self.decode[at[0]] + self.step[at[:-1], at[1:]].sum()).item()

    def best(self, steps: int) -> Tensor:
        """Return the `steps` times of the least bound, the last of them 1."""
        least, before = self.decode, []
        for _ in range(steps - 1):
            least, s = (least[:, None] + self.step).min(0)
            before.append(s)
        path = [len(self.times) - 1]
        for s in reversed(before):
            path.append(int(s[path[-1]]))
        return self.times[path[::-1]]


def best_grid(
    model: Model,
    x: Tensor | Batch,
    steps: int,
    *,
    candidates: Tensor | None = None,
    seed: int = 0,
    track: Track = iter,
) -> TimeGrid:
    """Return the grid of `steps` times with the least bound of the model on examples x.

    Args:
        model: the model, with its reverse kernel.
        x: examples to measure on, such as training data, or a `Batch`; a few of them are drawn.
        steps: T.
        candidates: times to choose from, increasing, the last 1; evenly spaced where left out.
        seed: of everything random.
        track: wraps the candidates, for a progress bar.

    Raises:
        ValueError: if `steps` is below 1, or above the number of candidates.
    """
    batch = model.batch(x)
    model.check_condition(batch.condition, len(batch))
    if candidates is None:
        candidates = even_times(model.process.schedule, steps, 16 + 2 * steps)
    if not 1 <= steps <= len(candidates):
        raise ValueError(f"steps must be 1 to {len(candidates)}, the number of times; got {steps}")
    if steps == len(candidates) or steps == 1:
        return TimeGrid(candidates[-steps:])
    # No step of a good grid is much longer than the mean step.
    longest = math.ceil(4 * len(candidates) / steps)
    few = batch[_some(model, batch, seed)]
    table = measure(model, few, candidates, longest, seed, track)
    return TimeGrid(table.best(steps))


def measure(
    model: Model,
    x: Tensor | Batch,
    times: Tensor,
    longest: int,
    seed: int = 0,
    track: Track = iter,
) -> Table:
    """Measure R and D over candidate times, as means over examples; one network call per time.

    Args:
        model: the model.
        x: examples, shape (N, *model.shape), or a `Batch`.
        times: the M candidates, increasing.
        longest: the number of candidates that a step may span; longer ones are not measured.
        seed: of everything random.
        track: wraps the candidates, for a progress bar.
    """
    batch, count = model.batch(x), len(times)
    numbers = len(batch) * count * min(longest, count) * model.head.numbers
    dims = max(1, min(model.dims, NUMBERS // numbers)) if model.process.alike else model.dims
    decode = torch.zeros(count, dtype=torch.float64)
    step = torch.full((count, count), math.inf, dtype=torch.float64)

    def column(j: int) -> tuple[Tensor, Tensor]:
        before = times[max(0, j - longest) : j]
        decoded, steps = torch.zeros((), dtype=torch.float64), torch.zeros_like(before)
        for g, rows in enumerate(torch.arange(len(batch)).split(model.rows)):
            with seeded(seed, 2, g):
                r, d = _column(model, batch[rows].to(model.device), before, times[j], dims)
            decoded += r / len(batch)
            steps += d / len(batch)
        return decoded, steps

    with measuring(model, batch):
        for j, (decoded, steps) in enumerate(map_across_processes(count, column, track)):
            decode[j], step[j - len(steps) : j, j] = decoded, steps
    return Table(times, decode, step)


def _column(
    model: Model, batch: Batch, before: Tensor, at: Tensor, dims: int
) -> tuple[Tensor, Tensor]:
    """Return sums over examples of R(t), and of D(s, t) for each s in `before`; one network call.

    D is measured on `dims` dimensions of each example and scaled up, which is unbiased: the pairs,
    not the calls, take most of the time of a table. float32 is enough for the choice of a grid.
    """
    x, process = batch.x, model.process
    e = model.embed(x)
    t = at.to(x.device).expand(len(x))
    z = draw(process.marginal(e, t))
    prediction = model.predict(z, t, batch.condition)
    decoded = -model.decoder(prediction, z, t, process).log_prob(x).sum().cpu()

    # in turn, so that each dimension is measured equally often over the examples
    turn = torch.arange(len(x) * dims).reshape(len(x), dims) % model.dims
    chosen = torch.randperm(model.dims)[turn].to(x.device)

    def some(v: Tensor) -> Tensor:
        v = v.float() if v.is_floating_point() else v
        if dims == model.dims:
            return v
        v = v.flatten(1, len(model.shape))
        return v[torch.arange(len(v), device=v.device)[:, None], chosen]

    z, e, prediction = some(z), some(e), prediction.map(some)
    noise: Noise = None
    found = torch.zeros(len(before), dtype=torch.float64)
    count = max(1, TOGETHER // (len(x) * dims * model.head.numbers))
    # the first s alone, with the noise of all
    for i in [0, *range(1, len(before), count)][: len(before)]:
        part = before[i : i + count] if i else before[:1]
        again = partial(_repeated, count=len(part))
        s, own = part.to(x.device).repeat_interleave(len(x)), again(z)
        q = process.posterior(own, again(e), s, again(t))
        p = model.step(prediction.map(again), own, s, again(t), process)
        noise = noise if i else kl_noise(q, p)
        cost = kl(q, p, _noise_again(noise, len(part)))
        found[i : i + len(part)] = cost.double().view(len(part), -1).sum(1).cpu()
    return decoded, found * (model.dims / dims)


def _repeated(v: Tensor, count: int) -> Tensor:
    """Return the examples of a tensor (B, ...) again and again, (count B, ...)."""
    return v.expand(count, *v.shape).flatten(0, 1)


def _noise_again(noise: Noise, count: int) -> Noise:
    if isinstance(noise, tuple):
        return tuple(_noise_again(part, count) for part in noise)
    return None if noise is None else _repeated(noise, count)


def measure_errors(model: Model, x: Tensor | Batch, seed: int = 0) -> None:
    """Measure v(t) = E‖e − ê‖²/D on examples x and set it in the model, if its kernel needs it."""
    times = model.step.error_times().clamp(model.process.schedule.start)
    if not len(times):
        return
    batch = model.batch(x)
    some = _some(model, batch, seed)

    def error(i: int) -> float:
        total = 0.0
        for g, rows in enumerate(some.split(model.rows)):
            with seeded(seed, 2, g):
                own = batch[rows].to(model.device)
                e = model.embed(own.x)
                at = times[i].to(e.device).expand(len(e))
                z = draw(model.process.marginal(e, at))
                e_hat = model.predict(z, at, own.condition).e_hat
            total += (e - e_hat).square().sum().item()
        return total / (len(some) * model.dims)

    with measuring(model, batch):
        errors = map_across_processes(len(times), error)
    model.step.set_errors(torch.tensor(errors, dtype=torch.float64))


def _some(model: Model, batch: Batch, seed: int) -> Tensor:
    """Draw the rows of a batch to measure on, fewer of large examples."""
    with seeded(seed, 1):
        order = torch.randperm(len(batch))
    return batch.order[order[: max(16, min(EXAMPLES, 2**15 // model.dims))]]
