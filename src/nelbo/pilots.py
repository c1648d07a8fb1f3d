"""What pilots settled of a run, kept in its folder: an evaluation after the first pays for none.

A pilot (`allocate`) asks the network on the validation split which times to draw and what to take
off. What is estimated with its help is unbiased whatever it says, as long as all times have their
chance; that is checked where a file is read.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

import nelbo
from nelbo import _limits
from nelbo._files import write
from nelbo._numerics import seeded
from nelbo._processes import at_first
from nelbo.allocate import EVEN, Allocation, Cells, pilot
from nelbo.checkpoint import Run
from nelbo.control import Controls
from nelbo.data import fingerprint
from nelbo.model import measuring, model_hash

FILE = "pilots.json"
ROWS = 256  # of each cell


class Pilots:
    """The pilots of a run, for `nelbo.evaluate(.., pilots=Pilots(run))`.

    Args:
        run: with its own data. What is `known` to the evaluation shall be its training split.
        tell: is told what takes a while.
    """

    def __init__(self, run: Run, tell: Callable[[str], None] = lambda what: None) -> None:
        self.run, self.tell, self.path = run, tell, run.path / FILE

    def __call__(
        self, cells: Cells, controls: Controls, draws: int, replicates: int
    ) -> Allocation:
        """What one settles for so many draws of each example in so many replicates.

        Raises:
            ValueError: it is not in the folder, and the data of the run are not there.
        """
        draws = 2 ** round(math.log2(draws))  # some draws more or less change little
        return at_first(lambda: self._found(cells, controls, draws, replicates))

    def _found(self, cells: Cells, controls: Controls, draws: int, replicates: int) -> Allocation:
        times = f"{cells.times.steps} steps {fingerprint(cells.edges)}"
        key = f"{model_hash(self.run.model)}, {times}, {draws} x {replicates}, {nelbo.__version__}"
        if (known := _allocation(_read(self.path).get(key), cells, controls)) is not None:
            return known
        model, x, _ = self.run.law(split="validation")
        self.tell(f"a pilot of {ROWS * cells.count} network calls on the validation split")
        own = copy.copy(controls)
        own.model = model
        with measuring(model), seeded(0, 5):
            found = pilot(cells, own, x, ROWS, draws, replicates)
        document = _read(self.path) | {key: {k: v.tolist() for k, v in vars(found).items()}}
        try:
            write(self.path, (json.dumps(document) + "\n").encode())
            self.tell(f"the pilot is kept in {self.path}, for later evaluations")
        except OSError as error:  # a folder that is read only
            self.tell(f"the pilot is not kept: {error.filename}: {error.strerror}")
        return found


def _read(path: Path) -> dict[str, Any]:
    """What is kept; nothing where the file is missing or damaged."""
    try:
        document = _limits.read_json(_limits.contained(path, path.parent))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _allocation(kept: object, cells: Cells, controls: Controls) -> Allocation | None:
    """What a file says; None where that is nothing, or no allocation for these."""
    try:
        numbers = {k: torch.tensor(v, dtype=torch.float64) for k, v in cast(dict, kept).items()}
        found = Allocation(**numbers)
        shapes = [tuple(v.shape) for v in vars(found).values()]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
    count = cells.count
    fit = shapes == [(count,), (count, controls.variates), (count, controls.features), (count,)]
    if not fit or not all(v.isfinite().all() for v in vars(found).values()):
        return None
    # every cell has its chance, and these are all there are
    p = found.probability
    fair = (p >= EVEN / count * (1 - 1e-9)).all() and abs(p.sum().item() - 1) < 1e-9
    return found if fair else None
