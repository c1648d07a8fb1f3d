"""Test log-likelihood of tables: nelbo, a neural spline flow and a Gaussian mixture in one run.

    python benchmarks/density.py --data DATA [--only wine-quality-red nltcs] [--seconds 120]
        [--json out.json] [--try width=128 lr=2e-3]

DATA holds uci_regression/NAME.npz (x, y, test_idx; published split 0, y appended as a column) and
debd/NAME.npz (train, valid, test; binary). Each model has `--seconds` of one processor for a set.

UCI, nats per row, higher is better. The values are recorded to a precision Δ, found by
`infer_columns`. nelbo states P of the recorded values; spread evenly over their cells that is a
density, log P - Σ log Δ. The flow and the mixture are densities of values with uniform noise of
width Δ added ("cells": fitted and measured so; the mean over the noise is a bound on the same
quantity), and of the values as they are ("as recorded"), which has no upper limit where values
repeat. Gaussian mixture: components 1..64 by validation.

debd, nats per row: nelbo's absorbing process.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from nelbo.config import TrainConfig, configure
from nelbo.data import Dataset, Schema, tables
from nelbo.data.inference import infer_columns
from nelbo.data.layout import log_cells
from nelbo.evaluate import evaluate
from nelbo.learner import Learner

UCI = (
    "concrete",
    "energy",
    "power-plant",
    "wine-quality-red",
    "protein-tertiary-structure",
)
DEBD = ("nltcs", "plants", "jester", "dna", "accidents", "mushrooms")
DRAWS = 16  # of the noise, per test row
Options = dict[str, str | int | float]


def uci(path: Path) -> tuple[dict[str, np.ndarray], Schema, np.ndarray]:
    """Rows by split, the schema of all of them, and the width of each column's cell (0: none)."""
    with np.load(path) as file:
        rows, test = np.c_[file["x"], file["y"]], file["test_idx"][0]
    train = np.setdiff1d(np.arange(len(rows)), test)
    train = np.random.default_rng(0).permutation(train)
    cut = len(train) // 10
    parts = {"train": train[cut:], "validation": train[:cut], "test": test}
    frame = pl.DataFrame({f"c{i}": column for i, column in enumerate(rows.T)})
    columns, notes = infer_columns(frame)
    for note in notes:
        print("  ", note)
    width = np.array([column.precision or 0.0 for column in columns])
    return {k: rows[v] for k, v in parts.items()}, Schema.of_table(columns), width


def encode(rows: np.ndarray, schema: Schema) -> Tensor:
    frame = pl.DataFrame({c.name: v for c, v in zip(schema.columns, rows.T, strict=True)})
    return torch.from_numpy(tables.encode(frame, schema.columns, "rows", rounding=True)[0])


def ours(dataset: Dataset, seconds: float, options: Options) -> tuple[float, float, dict]:
    """Test bound, its error in nats, and how it came about."""
    model, config = configure(dataset.schema, len(dataset.splits["train"]), **options)
    probe = Learner(model, config, dataset)
    probe.step()
    started = time.process_time()
    for _ in range(10):
        probe.step()
    each = (time.process_time() - started) / 10
    steps = max(100, int(0.85 * seconds / each))
    every = max(50, steps // 20)
    config = replace(config, steps=steps, evaluate_every=every)
    learner, best = Learner(model, config, dataset), {}
    started = time.process_time()
    while learner.at.step < steps:
        learner.step()
        if learner.at.step % every == 0 or learner.at.step == steps:
            if learner.measure()[1]:
                state = learner.average.state_dict()
                best = {k: v.clone() for k, v in state.items()}
            if time.process_time() - started > seconds:
                break
    took = time.process_time() - started
    learner.average.load_state_dict(best)
    found = evaluate(learner.average, dataset.splits["test"], calls=64, seed=0)
    error = found.standard_error.total * (
        found.nats / found.bits_per_dim if found.bits_per_dim else 1
    )
    about = {"steps": learner.at.step, "best": learner.at.best_step, "seconds": round(took)}
    return found.nats, error, about


def mixture(parts: dict[str, np.ndarray], noisy: Callable, seconds: float) -> float:
    """Mean test log-density of the mixture whose components are best on validation."""
    started, best = time.process_time(), (-np.inf, None)
    train, validation = noisy(parts["train"]), noisy(parts["validation"])
    for components in (1, 2, 4, 8, 16, 32, 64):
        if components * 4 > len(train) or time.process_time() - started > seconds:
            break
        fitted = GaussianMixture(components, n_init=2, reg_covar=1e-6, random_state=0).fit(train)
        best = max(best, (fitted.score(validation), fitted), key=lambda pair: pair[0])
    return float(np.mean([best[1].score(noisy(parts["test"])) for _ in range(DRAWS)]))


def flow(parts: dict[str, np.ndarray], noisy: Callable, seconds: float) -> float:
    """Mean test log-density of zuko's neural spline flow at its best on validation."""
    import zuko

    torch.manual_seed(0)
    as_tensor = lambda rows: torch.as_tensor(noisy(rows), dtype=torch.float32)  # noqa: E731
    made = zuko.flows.NSF(parts["train"].shape[1], transforms=3, hidden_features=(128, 128))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=1e-4)
    started, step, best, since, state = time.process_time(), 0, -np.inf, 0, None
    while time.process_time() - started < seconds and since < 20:
        rows = parts["train"][np.random.default_rng(step).integers(0, len(parts["train"]), 256)]
        loss = -made().log_prob(as_tensor(rows)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            with torch.no_grad():
                each = [made().log_prob(as_tensor(parts["validation"])).mean() for _ in range(4)]
            value, since = torch.stack(each).mean().item(), since + 1
            if value > best:
                best, since = value, 0
                state = {k: v.clone() for k, v in made.state_dict().items()}
    made.load_state_dict(state or made.state_dict())
    with torch.no_grad():
        each = [made().log_prob(as_tensor(parts["test"])).mean() for _ in range(DRAWS)]
    return torch.stack(each).mean().item()


def compare(path: Path, seconds: float, options: Options, baselines: bool) -> dict:
    """All models on one UCI set: test log-density per row, nats, in the units of the columns."""
    parts, schema, width = uci(path)
    dataset = Dataset(path.stem, schema, {k: encode(v, schema) for k, v in parts.items()})
    nats, error, about = ours(dataset, seconds, options)
    found = {"nelbo": -nats - log_cells(schema.columns), "error": error, **about}
    if baselines:
        mean, spread = parts["train"].mean(0), parts["train"].std(0)
        for name, cell in (("cells", width), ("as recorded", 0 * width)):
            rng = np.random.default_rng(1)

            def noisy(rows: np.ndarray, cell: np.ndarray = cell, rng: object = rng) -> np.ndarray:
                return (rows + cell * (rng.random(rows.shape) - 0.5) - mean) / spread

            units = -np.log(spread).sum()
            found[f"flow, {name}"] = flow(parts, noisy, seconds) + units
            found[f"mixture, {name}"] = mixture(parts, noisy, seconds) + units
    return found


def binary(path: Path, seconds: float, options: Options) -> dict:
    """nelbo on one debd set: test log-probability per row, nats."""
    with np.load(path) as file:
        names = {"train": "train", "valid": "validation", "test": "test"}
        splits = {names[k]: torch.from_numpy(file[k]) for k in names}
    schema = Schema("levels", tuple(splits["train"].shape[1:]), 2)
    dataset = Dataset(path.stem, schema, splits)
    nats, error, about = ours(dataset, seconds, {"process": "absorbing", **options})
    return {"nelbo": -nats, "error": error, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[*UCI, *DEBD])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--try", dest="options", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {
        f.name: type(v) for f in TrainConfig.__dataclass_fields__.values() for v in [f.default]
    }
    options: Options = {}
    for each in asked.options:
        name, _, value = each.partition("=")
        kind = kinds.get(name, int if value.isdecimal() else str)
        options[name] = (
            kind(value)
            if not value.replace(".", "").replace("-", "").isdecimal()
            else (int(value) if value.lstrip("-").isdecimal() else float(value))
        )
    results = {}
    for name in asked.only:
        folder = asked.data / ("uci_regression" if name in UCI else "debd")
        path = folder / f"{name}.npz"
        results[name] = (
            compare(path, asked.seconds, options, asked.baselines)
            if name in UCI
            else binary(path, asked.seconds, options)
        )
        line = ", ".join(
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
            for k, v in results[name].items()
        )
        print(f"{name}: {line}", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
