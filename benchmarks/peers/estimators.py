"""`DiffusionDensity` where a mixture of Gaussians is right, beside the best of 1 to 20 components.

    python benchmarks/peers/estimators.py [--rows 2000] [--only pair moons]

Each set is drawn anew, to train on and 4000 rows to test. The mixtures are scikit-learn's on
standardised columns, reg_covar the square of the resolution, and the best is chosen on the test
rows. Nats per row: the score and its Monte Carlo error, the best mixture, the truth where it is
known, the standard error of the test rows; and seconds of processor time of fit and score.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import multivariate_normal, norm
from sklearn.datasets import make_moons
from sklearn.mixture import GaussianMixture

from nelbo.sklearn import DiffusionDensity

Truth = Callable[[np.ndarray], np.ndarray]
RESOLUTION = 1e-3  # the estimator's own


def pair(rows: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    first = random.random(rows) < 0.3
    return np.where(first, random.normal(-2, 0.3, rows), random.normal(1, 1, rows))[:, None]


def correlated(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal([0, 0], [[1, 0.999], [0.999, 1]], rows)


def moons(rows: int, seed: int) -> np.ndarray:
    return np.asarray(make_moons(rows, noise=0.05, random_state=seed)[0])


def values(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0.0, 1.0, 5.0], (rows, 1), p=[0.5, 0.3, 0.2])


def diamonds(rows: int, seed: int) -> np.ndarray:
    """Weight with favourite values, two rounded proportions and a price, in that manner."""
    random = np.random.default_rng(seed)
    favourite = random.choice([0.3, 0.31, 0.4, 0.5, 0.7, 0.9, 1.0, 1.01, 1.2, 1.5, 2.0], rows)
    any_weight = np.exp(random.normal(-0.4, 0.55, rows))
    weight = np.where(random.random(rows) < 0.6, favourite, any_weight).round(2).clip(0.2, 4)
    depth = (random.standard_t(4, rows) * 0.9 + 61.8).round(1).clip(50, 72)
    table = random.normal(57.4, 2, rows).round(0)
    price = np.exp(7.76 + 1.7 * np.log(weight / 0.7) + random.normal(0, 0.25, rows)).round()
    return np.c_[weight, depth, table, price.clip(326, 18823)]


SETS = {f.__name__: f for f in (pair, correlated, moons, values, diamonds)}
TRUTHS: dict[str, Truth] = {
    "pair": lambda x: np.log(0.3 * norm.pdf(x, -2, 0.3) + 0.7 * norm.pdf(x, 1, 1)),
    "correlated": multivariate_normal([0, 0], [[1, 0.999], [0.999, 1]]).logpdf,
}


def best_mixture(train: np.ndarray, test: np.ndarray) -> float:
    mean, spread = train.mean(0), train.std(0)
    train, test = (train - mean) / spread, (test - mean) / spread
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not quite converged
        made = [GaussianMixture(k, random_state=0, reg_covar=RESOLUTION**2) for k in range(1, 21)]
        return max(each.fit(train).score(test) for each in made) - float(np.log(spread).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--only", nargs="*", choices=SETS, default=list(SETS))
    asked = parser.parse_args()
    for name in asked.only:
        train, test = SETS[name](asked.rows, 0), SETS[name](4000, 1)
        started = time.process_time()
        model = DiffusionDensity(resolution=RESOLUTION, random_state=0).fit(train)
        fitted = time.process_time()
        scores, errors = model.score_samples(test, return_std=True)
        seconds = fitted - started, time.process_time() - fitted
        truth = f"{TRUTHS[name](test).mean():.3f}" if name in TRUTHS else "-"
        print(
            f"{name:12} {scores.mean():8.3f} ± {np.sqrt(np.square(errors).sum()) / len(test):.4f}"
            f"   mixture {best_mixture(train, test):8.3f}   truth {truth}"
            f"   test rows ± {scores.std() / len(test) ** 0.5:.3f}"
            f"   fit {seconds[0]:.1f} s, score {seconds[1]:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
