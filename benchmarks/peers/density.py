"""Test log-likelihood of tables: nelbo, a neural spline flow and a Gaussian mixture in one run.

    python benchmarks/peers/density.py DATA [--only wine-quality-red nltcs] [--seconds 120]
        [--alone] [--as-recorded] [--json out.json]

DATA holds uci_regression/NAME.npz (x, y, test_idx; published split 0, y appended as a column) and
debd/NAME.npz (train, valid, test; binary). Each model has `--seconds` of one processor for a set,
and keeps its best state on a tenth of the training rows (debd: its valid split). nelbo's settings
are those of `nelbo train`, with as many steps as the time allows. Higher is better.

UCI, nats per row. The values are recorded to a precision Δ (`infer_columns` finds it), so the
density of a recorded value has no upper limit: a model may put a spike on each. What can be
compared is P of the cell of width Δ around each value, over its width: log P - Σ log Δ, nelbo's
own statement. The flow and the mixture are trained on values with uniform noise of width Δ added,
and their log P of a test row is the logarithm of the mean density at DRAWS points of its cell,
at least as high as the usual dequantisation bound, the mean of the logarithm. Real columns have
Δ = 0. --as-recorded adds both trained and measured at the values as they are.

debd, nats per row: nelbo alone, with `--process absorbing`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from nelbo.data import Dataset, Schema
from nelbo.data.columns import log_cells
from nelbo.data.tabular import encoding
from nelbo.data.tabular.inference import infer_columns
from nelbo.evaluation.evaluate import evaluate
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

UCI = ("concrete", "energy", "power-plant", "wine-quality-red", "protein-tertiary-structure")
DEBD = ("nltcs", "plants", "jester", "dna", "accidents", "mushrooms")
DRAWS = 32  # points of a test row's cell
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
MEASUREMENTS = 10  # on validation while training

Rows = dict[str, np.ndarray]  # by split, (N, D)
LogDensity = Callable[[np.ndarray], np.ndarray]  # of rows (N, D): (N,), nats


def ours(
    dataset: Dataset, seconds: float, **options: str
) -> tuple[float, float, dict[str, float]]:
    """Test bound and its standard error in nats per row, and how it came about."""
    model, config = configure(dataset.schema, len(dataset.splits["train"]), **options)
    probe, tries = Trainer(model, config, dataset), 10
    probe.step()
    started = time.process_time()
    for _ in range(tries):
        probe.step()
    each = (time.process_time() - started) / tries
    steps = max(100, int(0.8 * seconds / each))  # the rest is for validation, and to begin with
    config = replace(config, steps=steps, evaluate_every=max(1, steps // MEASUREMENTS))
    started = time.process_time()
    learner = Trainer(model, config, dataset)
    best = learner.fit(patience=MEASUREMENTS)
    took = time.process_time() - started
    found = evaluate(best, dataset.splits["test"])
    error = found.standard_error.total
    if found.bits_per_dim:
        error *= found.nats / found.bits_per_dim
    about = {"steps": steps, "best": learner.at.best_step, "seconds": round(took)}
    return -found.nats, error, about


def mixture(train: np.ndarray, validation: np.ndarray, seconds: float) -> LogDensity:
    """The Gaussian mixture whose number of components is best on validation."""
    best, until = (-np.inf, None), time.process_time() + seconds
    for components in COMPONENTS:
        if components * 4 > len(train) or time.process_time() > until:
            break
        fitted = GaussianMixture(components, n_init=2, reg_covar=1e-6, random_state=0).fit(train)
        best = max(best, (fitted.score(validation), fitted), key=lambda pair: pair[0])
    return best[1].score_samples


def flow(batches: Iterator[np.ndarray], validation: np.ndarray, seconds: float) -> LogDensity:
    """zuko's neural spline flow, trained as nelbo is: AdamW, cosine decay over the time there is,
    the best on validation kept; it stops early where a quarter of the time brings nothing."""
    import zuko

    torch.manual_seed(0)
    made = zuko.flows.NSF(validation.shape[1], transforms=3, hidden_features=(128, 128))
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=1e-4)

    def log_density(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = torch.as_tensor(rows, dtype=torch.float32).split(4096)
            return torch.cat([made().log_prob(part) for part in parts]).double().numpy()

    best, kept, since, started, measured = -np.inf, made.state_dict(), 0.0, time.process_time(), 0
    while (share := (time.process_time() - started) / seconds) < 1 and share - since < 0.25:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + np.cos(np.pi * share))
        loss = -made().log_prob(torch.as_tensor(next(batches), dtype=torch.float32)).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(made.parameters(), 5.0)
        optimizer.step()
        if share * 2 * MEASUREMENTS > measured:
            measured += 1
            if (value := log_density(validation).mean()) > best:
                best, since = value, share
                kept = {k: v.clone() for k, v in made.state_dict().items()}
    made.load_state_dict(kept)
    return log_density


def baselines(parts: Rows, width: np.ndarray, seconds: float) -> dict[str, float]:
    """Mean test log-density in the units of the columns, of values that noise of `width` blurs."""
    random = np.random.default_rng(1)
    mean, spread = parts["train"].mean(0), parts["train"].std(0)

    def seen(rows: np.ndarray) -> np.ndarray:
        return (rows + width * (random.random(rows.shape) - 0.5) - mean) / spread

    def batches() -> Iterator[np.ndarray]:
        while True:
            yield seen(parts["train"][random.integers(0, len(parts["train"]), 256)])

    validation = seen(np.concatenate([parts["validation"]] * 4))
    models = {
        "flow": flow(batches(), validation, seconds),
        "mixture": mixture(seen(parts["train"]), validation, seconds),
    }
    found = {}
    for name, log_density in models.items():
        each = [log_density(seen(parts["test"])) for _ in range(DRAWS if width.any() else 1)]
        of_cells = logsumexp(each, 0) - np.log(len(each))
        found[name] = float(of_cells.mean() - np.log(spread).sum())
    return found


def uci(path: Path) -> tuple[Rows, Schema]:
    """Rows by split, and the schema of all of them."""
    with np.load(path) as file:
        rows, test = np.c_[file["x"], file["y"]], file["test_idx"][0]
    train = np.setdiff1d(np.arange(len(rows)), test)
    train = np.random.default_rng(0).permutation(train)
    cut = len(train) // 10
    columns, _ = infer_columns(pl.DataFrame({f"c{i}": c for i, c in enumerate(rows.T)}))
    parts = {"train": train[cut:], "validation": train[:cut], "test": test}
    return {k: rows[v] for k, v in parts.items()}, Schema.of_table(columns)


def encode(rows: np.ndarray, schema: Schema) -> Tensor:
    frame = pl.DataFrame({c.name: v for c, v in zip(schema.columns, rows.T, strict=True)})
    return torch.from_numpy(encoding.encode(frame, schema.columns, "rows", rounding=True)[0])


def compare(path: Path, seconds: float, alone: bool, recorded: bool) -> dict[str, float]:
    """All models on one UCI set."""
    parts, schema = uci(path)
    dataset = Dataset(path.stem, schema, {k: encode(v, schema) for k, v in parts.items()})
    value, error, about = ours(dataset, seconds)
    found = {"nelbo": value - log_cells(schema.columns), "error": error, **about}
    if alone:
        return found
    width = np.array([column.precision or 0.0 for column in schema.columns])
    found |= baselines(parts, width, seconds)
    if recorded:
        of_values = baselines(parts, 0 * width, seconds)
        found |= {f"{name}, as recorded": value for name, value in of_values.items()}
    return found


def binary(path: Path, seconds: float) -> dict[str, float]:
    """nelbo on one debd set."""
    names = {"train": "train", "valid": "validation", "test": "test"}
    with np.load(path) as file:
        splits = {name: torch.from_numpy(file[key]) for key, name in names.items()}
    schema = Schema("levels", tuple(splits["train"].shape[1:]), 2)
    dataset = Dataset(path.stem, schema, splits)
    value, error, about = ours(dataset, seconds, process="absorbing")
    return {"nelbo": value, "error": error, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", choices=UCI + DEBD, default=UCI + DEBD)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--alone", action="store_true", help="without the flow and the mixture")
    parser.add_argument("--as-recorded", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in asked.only:
        if name in UCI:
            path = asked.data / "uci_regression" / f"{name}.npz"
            results[name] = compare(path, asked.seconds, asked.alone, asked.as_recorded)
        else:
            results[name] = binary(asked.data / "debd" / f"{name}.npz", asked.seconds)
        print(f"{name}:", ", ".join(f"{k} {v:.5g}" for k, v in results[name].items()), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
