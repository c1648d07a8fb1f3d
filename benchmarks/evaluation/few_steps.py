"""The bound in T steps: grids uniform and best, Gaussian and mixture steps, fine-tuned or not.

    python benchmarks/evaluation/few_steps.py RUN [--tuned RUN-8steps RUN-4steps] [--steps 1 2 4 8]
                                       [--split test] [--examples 447] [--json out.json]

RUN is a run on levels with the default head (`nelbo train digits --out RUN`); the fine-tuned runs
come from `nelbo train --resume RUN --steps-of-bound 8`. T steps are T network calls. Best grids
are found on training data; the ± is the Monte Carlo part of the standard error.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from nelbo.diffusion.model import Model
from nelbo.diffusion.reverse import Beta, Mixture, Optimal, Posterior, ReverseKernel
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.grid_search import best_grid, measure_errors
from nelbo.runs import own_data
from nelbo.runs.loading import load

STEPS = (1, 2, 4, 8, 16, 32, 64)


def steps_of(model: Model, train: torch.Tensor) -> dict[str, ReverseKernel]:
    """The reverse steps to compare; the best variance is measured on training data."""
    optimal = Optimal().to(model.device)
    own, model.step = model.step, optimal
    measure_errors(model, train)
    model.step = own
    return {
        "Gaussian, σ² = β": Beta(),
        "Gaussian, σ² = β̃": Posterior(),
        "Gaussian, best σ²": optimal,
        "mixture": Mixture(model.head.values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tuned", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--examples", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = load(options.run)
    model, train = run.model, own_data.load(run.config).splits["train"]
    x = run.examples(split=options.split)[: options.examples]
    result = evaluate(model, x, times=ContinuousTime(model.process.schedule.start), calls=64)
    limit = result.bits_per_dim
    print(f"continuous time: {limit:.4f} ± {result.standard_error.monte_carlo:.4f} bits/dim")
    print(f"{'step':20} {'grid':16} {'T':>3} {'bits/dim':>9} {'±':>7} {'over ∞':>7}")
    rows = []

    def tell(step: str, grid: str, times: TimeGrid, of: Model) -> None:
        result = evaluate(of, x, times=times, calls=max(4 * times.steps, 8))
        value, error = result.bits_per_dim, result.standard_error.monte_carlo
        over = value / limit - 1
        name = f"{step:20} {grid:16} {times.steps:3}"
        print(f"{name} {value:9.4f} {error:7.4f} {100 * over:6.1f}%", flush=True)
        row = {"step": step, "grid": grid, "T": times.steps, "bits_per_dim": value}
        rows.append(row | {"monte_carlo": error, "over": over, "times": times.times.tolist()})

    own = model.step
    for name, step in steps_of(model, train).items():
        model.step = step
        for steps in options.steps:
            tell(name, "uniform", TimeGrid.uniform(steps), model)
            started = time.perf_counter()
            grid = run.grid(steps) if type(step) is type(own) else None
            grid = grid or best_grid(model, train, steps)
            seconds = time.perf_counter() - started
            tell(name, "best", grid, model)
            rows[-1]["seconds"] = seconds
    for path in options.tuned:
        tuned = load(path)
        tell("mixture", "best, fine-tuned", tuned.grid(len(tuned.config.train.grid)), tuned.model)
    if options.json:
        document = {"run": run.path.name, "split": options.split, "examples": len(x)}
        document |= {"continuous": limit, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
