"""Proposals fitted by pilots, cached per user so that only the first evaluation pays for them.

A pilot (`evaluation.allocation.pilot`) evaluates the network on the validation split and decides
how to distribute the draws over time and which control-variate coefficients to use. The estimate
is unbiased whatever the pilot decides, but a malicious proposal could still show any number beside
a small error: strata with so little probability that no draw falls there, each with a large
coefficient. So a proposal is stored in the cache of the user whose command made it, under hashes
of everything it depends on, and never in a run, which may come from an untrusted source.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from nelbo._utils import cache
from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.numerics import seeded
from nelbo._version import __version__
from nelbo.data.schema import fingerprint
from nelbo.diffusion.model import measuring, model_hash
from nelbo.evaluation.allocation import EVEN, Proposal, Strata, pilot
from nelbo.evaluation.control_variates import ControlVariates

if TYPE_CHECKING:
    from nelbo.runs.run import Run

KIND = "pilots"  # folder of the cache
ROWS = 256  # draws per stratum
EDITION = 18  # of the numbers' meaning; raise it to invalidate cached pilots when that changes


class Pilots:
    """The pilots of a run, for `nelbo.evaluate(.., pilots=Pilots(run))`.

    Args:
        run: a run whose own data are available. The `known` examples of the evaluation should be
            its training split.
        tell: called with messages about slow work.
    """

    def __init__(self, run: "Run", tell: Callable[[str], object] = lambda what: None) -> None:
        self.run, self.tell = run, tell

    def __call__(self, strata: Strata, controls: ControlVariates) -> Proposal:
        """Return the proposal for these strata and control variates.

        Raises:
            ValueError: it is not in the cache, and the data of the run are not available.
        """
        times = f"{strata.times.steps} steps {fingerprint(strata.edges)}"
        config, made_by = self.run.config, f"{__version__} {EDITION}"
        schema = json.dumps(config.schema.to_dict(), sort_keys=True)
        key = (
            f"{model_hash(self.run.model)}, {schema}, {sorted(config.hashes.items())}, {times},"
            f" draws of {controls.calls}, {ROWS} rows, {made_by}"
        )
        known = main_process_first(lambda: _proposal(cache.get(KIND, key), strata, controls))
        if known is not None:
            return known
        first = world()[0] == 0
        if first:
            self.tell(f"a pilot of {ROWS * strata.count} network calls on the validation split")
        made = self._made(strata, controls)  # on all processes: none waits
        if first:
            self._keep(key, made)
        return main_process_first(lambda: made)

    def _made(self, strata: Strata, controls: ControlVariates) -> Proposal:
        batch, _ = self.run.batch(split="validation")
        with measuring(controls.model), seeded(0, 5):
            return pilot(strata, controls, batch, ROWS)

    def _keep(self, key: str, made: Proposal) -> None:
        try:
            cache.put(KIND, key, {name: v.tolist() for name, v in vars(made).items()})
        except OSError as error:  # a read-only cache
            self.tell(f"the pilot is not kept: {cache.reason(error)}")
        except ValueError:
            self.tell("the pilot is not kept: not all of its numbers are finite")
        else:
            self.tell(f"the pilot is kept in {cache.folder() / KIND}, for later evaluations")


def _proposal(numbers: object, strata: Strata, controls: ControlVariates) -> Proposal | None:
    """Return the proposal in cached numbers; None if they are invalid or of other strata."""
    try:
        items = cast(dict, numbers).items()
        found = Proposal(**{k: torch.tensor(v, dtype=torch.float64) for k, v in items})
        shapes = [tuple(v.shape) for v in vars(found).values()]
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError):
        return None
    count = strata.count
    variates = controls.columns + 1
    fit = shapes == [(count,), (count, variates), (count, controls.features), (count,), (), ()]
    if not fit or not all(v.isfinite().all() for v in vars(found).values()):
        return None
    # each stratum has at least its minimal probability, and they sum to one
    p = found.probability
    least = min(1.0, EVEN * controls.calls / ROWS) / count
    fair = (p >= least * (1 - 1e-9)).all() and abs(p.sum().item() - 1) < 1e-9
    return found if fair else None
