"""Bias, coverage and price of a mean measured to a target error.

    python benchmarks/evaluation/target_error.py [--kinds gaussian symbols table] [--examples 300]
                                      [--targets 1 0.3] [--steps 4] [--seeds 200]

The models are small ones whose bound is known exactly (`tests/support/known_models.py`). Rounds of
draws end when the stated error is below the target, in the unit of the result. For each target:
the bias of the mean and the mean of the stated error, both in targets; the largest stated error;
the share of the intervals that hold the truth; network calls per example and examples visited. The
command ends with 1 where a stated error is above its target, or a bias beyond a tenth of it by
more than two of its own errors.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.known_models import LARGER, MODELS

from nelbo._utils.numerics import LOG_2
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation.evaluate import evaluate

KINDS = MODELS | LARGER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["gaussian", "symbols"])
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--targets", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--steps", type=int, help="continuous time where left out")
    parser.add_argument("--seeds", type=int, default=200)
    options = parser.parse_args()
    times = ContinuousTime() if options.steps is None else TimeGrid.uniform(options.steps)
    wrong = 0
    print(
        f"{'kind':9} {'target':>7} {'bias':>7} {'±':>5} {'stated':>6} {'most':>5} {'covered':>7}"
    )
    for name in options.kinds:
        known = KINDS[name]()
        x = known.examples(options.examples)
        unit = 1.0 if known.model.decoder.density else 1 / (known.model.dims * LOG_2)
        truth = unit * known.bound(x, times).sum(1).mean().item()
        for target in options.targets:
            found = [
                evaluate(known.model, x, times=times, target_error=target, seed=seed)
                for seed in range(options.seeds)
            ]
            off = torch.tensor([unit * r.nats - truth for r in found]).double()
            stated = torch.tensor([r.standard_error.monte_carlo for r in found]).double()
            bias, error = off.mean() / target, off.std() / target / math.sqrt(len(off))
            wrong += bool(abs(bias) - 2 * error > 0.1 or stated.max() > target)
            covered = (off.abs() <= 1.96 * stated).double().mean()
            print(
                f"{name:9} {target:7} {bias:+7.3f} {error:5.3f} {stated.mean() / target:6.2f}"
                f" {stated.max() / target:5.2f} {covered:7.1%}"
                f"  {sum(r.calls_per_example for r in found) / len(found):.2f} calls,"
                f" {sum(r.visited for r in found) / len(found):.0f} visited",
                flush=True,
            )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
