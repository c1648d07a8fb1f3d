"""What pilots settled of a run, kept for this user: an evaluation after the first pays for none.

A pilot (`allocate`) asks the network on the validation split which times to draw and what to take
off. That is unbiased over all draws whatever it says, and can still be made to show any number
beside a small error: times with so little chance that no draw falls there, and a large coefficient
for each. So a pilot is a result of this user's own commands, in their cache under hashes of all
that it follows from, and never a part of a run, which may come from anyone.
"""

import json
import math
from collections.abc import Callable
from typing import cast

import torch

from nelbo._utils import cache
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.numerics import seeded
from nelbo._version import __version__
from nelbo.data import fingerprint
from nelbo.diffusion.model import measuring, model_hash
from nelbo.evaluation.allocation import EVEN, Proposal, Strata, pilot
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.runs.run import Run

KIND = "pilots"  # folder of the cache
ROWS = 256  # of each cell
EDITION = 7  # of what the numbers mean: to be raised with it, and pilots of others are made again


class Pilots:
    """The pilots of a run, for `nelbo.evaluate(.., pilots=Pilots(run))`.

    Args:
        run: with its own data. What is `known` to the evaluation shall be its training split.
        tell: is told what takes a while.
    """

    def __init__(self, run: Run, tell: Callable[[str], object] = lambda what: None) -> None:
        self.run, self.tell = run, tell

    def __call__(
        self, cells: Strata, controls: ControlVariates, draws: int, replicates: int
    ) -> Proposal:
        """What one settles for so many draws of each example in so many replicates.

        Raises:
            ValueError: it is not in the cache, and the data of the run are not there.
        """
        draws = 2 ** round(math.log2(draws))  # some draws more or less change little
        times = f"{cells.times.steps} steps {fingerprint(cells.edges)}"
        config, made_by = self.run.config, f"{__version__} {EDITION}"
        schema = json.dumps(config.schema.to_dict(), sort_keys=True)
        key = (
            f"{model_hash(self.run.model)}, {schema}, {sorted(config.hashes.items())}, {times},"
            f" {draws} x {replicates}, {ROWS} rows, {made_by}"
        )
        known = main_process_first(lambda: _allocation(cache.get(KIND, key), cells, controls))
        if known is not None:
            return known
        first = world()[0] == 0
        if first:
            self.tell(f"a pilot of {ROWS * cells.count} network calls on the validation split")
        made = self._made(cells, controls, draws, replicates)  # by all: none waits for another
        if first:
            self._keep(key, made)
        return main_process_first(lambda: made)

    def _made(
        self, cells: Strata, controls: ControlVariates, draws: int, replicates: int
    ) -> Proposal:
        batch, _ = self.run.batch(split="validation")
        with measuring(controls.model), seeded(0, 5):
            return pilot(cells, controls, batch, ROWS, draws, replicates)

    def _keep(self, key: str, made: Proposal) -> None:
        try:
            cache.put(KIND, key, {name: v.tolist() for name, v in vars(made).items()})
        except OSError as error:  # a cache that is read only
            self.tell(f"the pilot is not kept: {cache.reason(error)}")
        except ValueError:
            self.tell("the pilot is not kept: not all of its numbers are finite")
        else:
            self.tell(f"the pilot is kept in {cache.folder() / KIND}, for later evaluations")


def _allocation(numbers: object, cells: Strata, controls: ControlVariates) -> Proposal | None:
    """What a file says; None where that is nothing, or no allocation for these."""
    try:
        items = cast(dict, numbers).items()
        found = Proposal(**{k: torch.tensor(v, dtype=torch.float64) for k, v in items})
        shapes = [tuple(v.shape) for v in vars(found).values()]
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        return None
    count = cells.count
    variates = cells.variates(controls)
    fit = shapes == [(count,), (count, variates), (count, controls.features), (count,)]
    if not fit or not all(v.isfinite().all() for v in vars(found).values()):
        return None
    # every cell has its chance, and these are all there are
    p = found.probability
    fair = (p >= EVEN / count * (1 - 1e-9)).all() and abs(p.sum().item() - 1) < 1e-9
    return found if fair else None
