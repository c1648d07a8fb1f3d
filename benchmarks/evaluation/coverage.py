"""Share of the stated intervals that hold the truth, at few calls and at many.

    python benchmarks/evaluation/coverage.py [--seeds 400] [--examples 24]
        [--kinds image text table lengths] [--calls 2 4 8 24 200] [--steps T] [--json out.json]

The models are small ones of images, text and tables, whose bound is known exactly for each example
(`tests/support/known_models.py`), measured in continuous time or in T steps, without a pilot that
is kept and with one; `lengths` are texts of 4, 7, 12 and 48 tokens in turn, by masks. Each seed is
one `nelbo.evaluate` with `per_example=True` (rows) and one without (the mean). A stated 95 %
interval is 1.96 errors to either side.

For the rows and for the mean: the share of the intervals that were stated; of these the share that
held the truth, in per cent; z, the root mean square of (value - truth)/error; and the mean of the
bias in its own errors. `least` is the coverage of the row that has the least. Binomial errors are
those of the seeds: a cell fails, and the command ends with 1, where a coverage is further than two
of them from 93 to 97 %.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.known_models import LARGER, Known, lengths

from nelbo._utils.numerics import seeded
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import measuring
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid
from nelbo.evaluation.allocation import Proposal, Strata, pilot
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.result import Evaluation

ROWS = 256  # of each stratum of a pilot that is kept
OTHERS = 500  # examples that it is made on
LOW, HIGH = 0.93, 0.97
ROUNDED = 1e-9  # relative error of an exact value
CALLS = (2, 4, 8, 24, 200)
KINDS = LARGER | {"lengths": lengths}


@dataclass(frozen=True)
class Coverage:
    """Intervals of one kind: shares, root mean square z, the bias in its own errors."""

    stated: float
    covered: float
    binomial: float
    z: float
    bias: float
    least: float

    @property
    def right(self) -> bool:
        """Return whether the stated intervals hold the truth as often as they claim."""
        return (
            self.stated == 0 or LOW - 2 * self.binomial <= self.covered <= HIGH + 2 * self.binomial
        )


def coverage(values: Tensor, errors: Tensor, truth: Tensor) -> Coverage:
    """Return the coverage of intervals (seeds, rows) about the truth (rows,)."""
    stated = errors.isfinite()
    if not stated.any():
        return Coverage(0.0, *[math.nan] * 5)
    off = values - truth
    off = torch.where(off.abs() < ROUNDED * truth.abs(), 0.0, off)
    z = torch.where(off == 0, 0.0, off / errors)  # an exact value has the error 0
    hit = (z.abs() <= 1.96) & stated
    share = hit.sum() / stated.sum()
    # rows of a seed are not independent
    binomial = math.sqrt(0.95 * 0.05 * len(values)) / max(1, stated.any(1).sum().item())
    off = values.mean(1) - truth.mean()
    return Coverage(
        stated.double().mean().item(),
        share.item(),
        binomial,
        z[stated].square().mean().sqrt().item(),
        (off.mean() / off.std() * math.sqrt(len(off))).item(),
        (hit.sum(0) / stated.sum(0)).nan_to_num(1.0).min().item(),
    )


def kept_pilots(known: Known, others: Tensor) -> Callable[..., Proposal]:
    """As those of a run: made once, of examples that are not measured."""
    made: dict[int, Proposal] = {}

    def pilots(strata: Strata, controls: ControlVariates) -> Proposal:
        if controls.calls not in made:
            with measuring(known.model), seeded(52):
                made[controls.calls] = pilot(strata, controls, Batch(others), ROWS)
        return made[controls.calls]

    return pilots


def covered(
    name: str, times: TimeDiscretization, calls: int, kept: bool, examples: int, seeds: int
) -> tuple[Coverage, Coverage]:
    """Return the coverage of the rows and of the mean, in one cell of the table."""
    known = KINDS[name]()
    whole = known.examples(examples + OTHERS)
    x, others = whole[:examples], whole[examples:]
    truth = known.bound(x, times).sum(1)
    more = {"pilots": kept_pilots(known, others), "known": others} if kept else {}

    def found(seed: int, per_example: bool) -> Evaluation:
        return evaluate(
            known.model, x, times=times, calls=calls, seed=seed, per_example=per_example, **more
        )

    rows = [found(seed, True).to_arrays() for seed in range(seeds)]
    means = [found(seed, False) for seed in range(seeds)]
    of_rows = (torch.stack([torch.tensor(r[k]) for r in rows]) for k in ("nats", "standard_error"))
    units = (1.0 if r.bits_per_dim is None else r.nats / r.bits_per_dim for r in means)
    of_means = torch.tensor(
        [(r.nats, r.standard_error.monte_carlo * u) for r, u in zip(means, units, strict=True)]
    )
    values, errors = of_means.double()[..., None].unbind(1)
    return coverage(*of_rows, truth), coverage(values, errors, truth.mean(0, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument("--pilots", nargs="+", choices=("none", "kept"), default=["none", "kept"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times = ContinuousTime() if options.steps is None else TimeGrid.uniform(options.steps)
    head = f"{'kind':6} {'calls':>5} {'pilot':5} {'of':4} {'stated':>6} {'covered':>8}"
    print(f"{head} {'±':>4} {'z':>6} {'bias':>5} {'least':>5}")
    rows, wrong = [], 0
    for name in options.kinds:
        for calls in options.calls:
            for how in options.pilots:
                kept = how == "kept"
                both = covered(name, times, calls, kept, options.examples, options.seeds)
                for of, found in zip(("rows", "mean"), both, strict=True):
                    cell = {"kind": name, "calls": calls, "kept": kept, "of": of}
                    rows.append(cell | asdict(found))
                    wrong += not found.right
                    print(
                        f"{name:6} {calls:5} {how:5} {of:4} {found.stated:6.0%}"
                        f" {found.covered:8.1%} {found.binomial:4.1%} {found.z:6.2f}"
                        f" {found.bias:5.1f} {found.least:5.0%}{'' if found.right else '  WRONG'}",
                        flush=True,
                    )
    print(f"{wrong} of {len(rows)} coverages are not 93 to 97 %, within two binomial errors")
    if options.json:
        document = {"seeds": options.seeds, "examples": options.examples, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
