"""The best time grids of a run, each found once and kept in its folder."""

import contextlib
from typing import TYPE_CHECKING, Any, cast

from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.files import keep, kept
from nelbo._utils.progress import Track
from nelbo.diffusion.model import model_hash
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.grid_search import best_grid
from nelbo.runs.config import GRIDS

if TYPE_CHECKING:
    from nelbo.runs.run import Run


def best(run: "Run", steps: int, track: Track = iter) -> TimeGrid:
    """Return the best grid of `steps` times; see `Run.grid`."""
    run.model.even_times(steps)  # raises for an invalid number
    if len(run.config.train.grid) == steps:
        return TimeGrid(run.config.train.grid)
    path, key = run.path / GRIDS, f"{model_hash(run.model)}, {steps} steps"
    start = run.model.process.schedule.start
    times = main_process_first(
        lambda: _times(kept(path).get(key), steps, start)
    )  # the same answer on all processes
    if times is None:
        try:
            batch, _ = run.batch(split="train")
        except (ValueError, OSError) as error:
            raise ValueError(
                f"the best grid is found on the training data: {error}; or use the uniform"
                " grid with --grid uniform"
            ) from None
        times = best_grid(run.model, batch, steps, track=track).times.tolist()
        if world()[0] == 0:
            with contextlib.suppress(OSError):  # a read-only folder
                keep(path, key, times)
    return TimeGrid(times)


def _times(found: object, steps: int, start: float) -> list[float] | None:
    """Return the times stored in a file; None if they are no grid of `steps` from `start` on."""
    try:
        times = TimeGrid(cast(Any, found)).times
    except (TypeError, ValueError, OverflowError):
        return None
    return times.tolist() if len(times) == steps and times[0] >= start else None
