"""Validation bound against steps and seconds: nelbo's recipe, the classic one, and VDM's.

    python benchmarks/training/train_progress.py [--steps 4000] [--threads 1]
        [--only default classic] [--runs FOLDER] [--json out.json] [--plot out.png]

The same convolutional network on scikit-learn's digits, AdamW, batch, dropout, augmentation,
moving average and cosine decay of the learning rate; validation by `nelbo.evaluate`, in continuous
time.

    default   what `nelbo train digits` does
    classic   Ho et al. 2020: noise prediction, β linear from 1e-4 to 0.02 in 1000 steps, uniform
              independent t, loss ‖ε - ε̂‖², discretised Gaussian decoder
    vdm       Kingma et al. 2021: noise prediction, γ and its ends learned, stratified t, the bound

Two more are the default with stratified times in place of importance-sampled ones, and these with
a learned γ.

All take the learning rate of nelbo's recipe; `--try classic lr=1e-3` trains 1000 steps of a recipe
with another. Classic takes 4000 steps, vdm 2000, the others the 1800 of nelbo's recipe; --steps
is the most any takes. Runs in FOLDER are not trained again; those that were stopped go on.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nelbo.runs import config as run_config
from nelbo.runs.train import resume, train
from nelbo.training.config import TrainConfig

Options = dict[str, str | int | float]
Curve = list[tuple[int, float, float]]  # step, seconds, bits/dim

RECIPES: dict[str, Options] = {
    "default": {},
    "default, stratified": {"times": "stratified"},
    "default, learned γ": {"times": "stratified", "schedule": "learned"},
    "classic": {
        "steps": 4000,
        "head": "noise",
        "schedule": "betas",
        "times": "iid",
        "objective": "simple",
        "decoder": "discretised-gaussian",
    },
    "vdm": {
        "steps": 2000,
        "head": "noise",
        "schedule": "learned-ends",
        "times": "stratified",
        "gamma_min": -9.0,
    },
}
COLUMNS = (100, 200, 400, 1000, 1800, 4000)


def options_of(name: str, steps: int) -> Options:
    """The recipe's options for runs of that many steps at most."""
    own = int(RECIPES[name].get("steps", TrainConfig.steps))
    return {**RECIPES[name], "steps": min(own, steps)}


def curve_of(options: Options, out: Path) -> Curve:
    """Train, or read a finished run; the validation bound after each 100 steps."""
    run = resume(out) if run_config.is_run(out) else train("digits", out, **options)
    return [(e["step"], e["seconds"], e["validation"]) for e in run.metrics]


def best(curve: Curve) -> float:
    return min(bound for _, _, bound in curve)


def first_below(curve: Curve, target: float) -> tuple[int, float] | None:
    """Steps and seconds until the bound is at most the target."""
    return next(((n, s) for n, s, bound in curve if bound <= target), None)


def table(curves: dict[str, Curve]) -> str:
    target = best(curves["classic"]) if "classic" in curves else None
    head = "".join(f"{n:>8}" for n in COLUMNS)
    lines = [f"{'validation bits/dim at step':28}{head}{'best':>8}   to classic's best"]
    for name, curve in curves.items():
        at = {n: bound for n, _, bound in curve}
        row = "".join(f"{at[n]:8.3f}" if n in at else f"{'':8}" for n in COLUMNS)
        reached = None if target is None else first_below(curve, target)
        told = "never" if reached is None else f"{reached[0]} steps, {reached[1]:.0f} s"
        lines.append(f"{name:28}{row}{best(curve):8.3f}   {told}")
    return "\n".join(lines)


def plot(curves: dict[str, Curve], path: Path) -> None:
    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, label in ((left, 0, "steps"), (right, 1, "seconds, validation included")):
        for name, curve in curves.items():
            axes.plot([p[column] for p in curve], [p[2] for p in curve], label=name)
        axes.set(xscale="log", xlabel=label)
        axes.grid(alpha=0.3)
        if "classic" in curves:
            axes.axhline(best(curves["classic"]), color="grey", linestyle=":")
    lowest = min(best(curve) for curve in curves.values())
    left.set(ylabel="validation bound, bits/dim", ylim=(lowest - 0.05, lowest + 1.5))
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--try", nargs="+", dest="trial", metavar=("RECIPE", "OPTION=VALUE"))
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    recipes = {name: options_of(name, options.steps) for name in options.only}
    if options.trial:
        name, *changes = options.trial
        changed = {k: float(v) for k, v in (change.split("=") for change in changes)}
        recipes = {" ".join(options.trial): {**options_of(name, 1000), **changed}}
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        curves = {}
        for name, own in recipes.items():
            curves[name] = curve_of(own, runs / name)
            print(f"{name}: best {best(curves[name]):.4f}", flush=True)
    print(table(curves))
    if options.json:
        result = {name: {"options": recipes[name], "curve": curves[name]} for name in curves}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(curves, options.plot)


if __name__ == "__main__":
    main()
