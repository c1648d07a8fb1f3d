"""Outliers in fifteen sets of ADBench, one-class: ours with one setting against four classics.

    python benchmarks/peers/anomaly.py FOLDER [--seeds 5] [--only glass wine] [--rows 1000]
        [--json out.json]

FOLDER holds the sets as .npz with X and y (1 = anomaly). Half of the normal rows are trained on,
the others and all anomalies are scored; columns are standardised by the training rows for all
methods. Ours is `DiffusionOutlierDetector()` as it comes, and its network alone (memory=0).
GaussianMixture takes 1, 2, 4 or 8 components by BIC, the others have scikit-learn's defaults.
The value is the AUROC, mean over the seeds; the last row is seconds of one processor.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from nelbo.sklearn import DiffusionOutlierDetector

Score = Callable[[np.ndarray], np.ndarray]


def nearest(x: np.ndarray, seed: int) -> Score:
    """Distance to the fifth neighbour."""
    neighbours = NearestNeighbors(n_neighbors=5).fit(x)
    return lambda test: neighbours.kneighbors(test)[0][:, -1]


def mixture(x: np.ndarray, seed: int) -> Score:
    """-log density of the mixture that BIC prefers."""
    fitted = [GaussianMixture(k, random_state=seed).fit(x) for k in (1, 2, 4, 8) if 2 * k < len(x)]
    best = min(fitted, key=lambda model: model.bic(x))
    return lambda test: -best.score_samples(test)


def forest(x: np.ndarray, seed: int) -> Score:
    model = IsolationForest(random_state=seed).fit(x)
    return lambda test: -model.score_samples(test)


def support(x: np.ndarray, seed: int) -> Score:
    model = OneClassSVM().fit(x)
    return lambda test: -model.decision_function(test)


def ours(x: np.ndarray, seed: int) -> Score:
    model = DiffusionOutlierDetector(random_state=seed).fit(x)
    return lambda test: -model.score_samples(test)


def network(x: np.ndarray, seed: int) -> Score:
    model = DiffusionOutlierDetector(random_state=seed, memory=0).fit(x)
    return lambda test: -model.score_samples(test)


METHODS: dict[str, Callable[[np.ndarray, int], Score]] = {
    "nelbo": ours,
    "network alone": network,
    "5 neighbours": nearest,
    "isolation forest": forest,
    "mixture": mixture,
    "one-class SVM": support,
}


def split(
    x: np.ndarray, y: np.ndarray, seed: int, rows: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised training rows, test rows, and which of these are anomalies."""
    random = np.random.default_rng(seed)
    normal, odd = random.permutation(np.flatnonzero(y == 0)), np.flatnonzero(y == 1)
    half = len(normal) // 2
    train, rest = normal[:half][:rows], normal[half:][:rows]
    odd = random.permutation(odd)[:rows]
    scaler = StandardScaler().fit(x[train])
    test = np.concatenate([rest, odd])
    return scaler.transform(x[train]), scaler.transform(x[test]), y[test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rows", type=int, help="at most, of each kind; all where left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = [
        p for p in sorted(options.folder.glob("*.npz")) if any(o in p.stem for o in options.only)
    ]
    width = max(12, *(len(name) for name in options.methods))
    print(f"{'AUROC':18}" + "".join(f"{name:>{width + 2}}" for name in options.methods))
    found: dict[str, dict[str, list[float]]] = {}
    seconds = dict.fromkeys(options.methods, 0.0)
    for path in paths:
        with np.load(path) as file:
            x, y = file["X"].astype(float), file["y"]
        each = found[path.stem] = {name: [] for name in options.methods}
        for seed in range(options.seeds):
            train, test, odd = split(x, y, seed, options.rows)
            for name in options.methods:
                started = time.process_time()
                score = METHODS[name](train, seed)(test)
                seconds[name] += time.process_time() - started
                each[name].append(float(roc_auc_score(odd, score)))
        row = "".join(f"{np.mean(v):{width + 2}.4f}" for v in each.values())
        print(f"{path.stem:18}{row}", flush=True)
        if options.json:
            document = {"seeds": options.seeds, "rows": options.rows, "auroc": found}
            options.json.write_text(json.dumps(document | {"seconds": seconds}, indent=1) + "\n")
    mean = {n: np.mean([np.mean(each[n]) for each in found.values()]) for n in options.methods}
    print(f"{'mean':18}" + "".join(f"{value:{width + 2}.4f}" for value in mean.values()))
    print(f"{'seconds':18}" + "".join(f"{value:{width + 2}.0f}" for value in seconds.values()))


if __name__ == "__main__":
    main()
