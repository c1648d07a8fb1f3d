"""Independent closed forms and exact expectations, which the tests hold the library against.

None of it is the library's: joint Gaussians by linear algebra, mask chains by enumeration,
integrals by quadrature. All float64.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


class Formula(nn.Module):
    """A network that is a formula of z_t and the noise level."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.dtype = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor, level: Tensor) -> Tensor:
        return self.formula(z, level)


# ---- joint Gaussians


def normal_log_prob(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """log N(x; mean, cov) of one vector."""
    error = x - mean
    quadratic = error @ torch.linalg.solve(cov, error)
    return -0.5 * (quadratic + torch.logdet(cov) + len(x) * math.log(2 * math.pi))


def normal_kl(mean_q: Tensor, cov_q: Tensor, mean_p: Tensor, cov_p: Tensor) -> Tensor:
    """KL[ N(mean_q, cov_q) ‖ N(mean_p, cov_p) ]."""
    error = mean_p - mean_q
    trace = torch.linalg.solve(cov_p, cov_q).trace()
    quadratic = error @ torch.linalg.solve(cov_p, error)
    logs = torch.logdet(cov_p) - torch.logdet(cov_q)
    return 0.5 * (trace + quadratic - len(error) + logs)


def chain(
    mean: Tensor, cov: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (v_0, v_1, ...) with v_{n+1} = A_n v_n + c_n + N(0, R_n)."""
    for matrix, offset, noise in steps:
        wide = torch.zeros(len(offset), len(mean), dtype=torch.float64)
        wide[:, -matrix.shape[1] :] = matrix
        cross = wide @ cov
        corner = wide @ cov @ wide.T + noise
        mean = torch.cat([mean, wide @ mean + offset])
        cov = torch.cat([torch.cat([cov, cross.T], 1), torch.cat([cross, corner], 1)])
    return mean, cov


def condition(
    mean: Tensor, cov: Tensor, known: slice, wanted: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Bayes' rule: wanted | known = v has mean G v + g and covariance C; returns G, g, C."""
    gain = torch.linalg.solve(cov[known, known], cov[known, wanted]).T
    offset = mean[wanted] - gain @ mean[known]
    return gain, offset, cov[wanted, wanted] - gain @ cov[known, wanted]


def sigma_points(mean: Tensor, cov: Tensor) -> Tensor:
    """2n equally weighted points: their mean of a quadratic is its expectation, exactly."""
    root = torch.linalg.cholesky(cov) * math.sqrt(len(mean))
    return torch.cat([mean + root.T, mean - root.T])


# ---- quadrature


def normal_nodes(n: int = 241, width: float = 9.0) -> tuple[Tensor, Tensor]:
    """ε and weights: Σ w f(ε) = E f(ε) for ε ~ N(0, 1); the trapezoid rule, whose error is
    exponentially small for a smooth integrand, and the tail beyond `width` is below 1e-18."""
    e = torch.linspace(-width, width, n, dtype=torch.float64)
    weights = torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi) * (e[1] - e[0])
    return e, weights


def legendre_nodes(low: float, high: float, n: int = 80) -> tuple[Tensor, Tensor]:
    """t and weights: Σ w f(t) = ∫ f(t) dt over [low, high], Gauss-Legendre."""
    t, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(n))
    return low + (high - low) * (t + 1) / 2, weights * (high - low) / 2


# ---- the mask chain, enumerated


def states(count: int, dims: int) -> np.ndarray:
    """All (count+1)^dims latents, first dimension slowest; the symbol `count` is the mask."""
    return np.array(list(itertools.product(range(count + 1), repeat=dims)))


class MaskChain:
    """q and P of D dimensions with K symbols and a mask, as arrays over all states.

    Args:
        alphas: α_1..α_T.
        shown: P(x_i = k|z) for each state z, shape (S, D, K).
    """

    def __init__(self, alphas: list[float], shown: np.ndarray) -> None:
        self.alphas = alphas
        _, self.dims, self.count = shown.shape
        self.shown, self.states = shown, states(self.count, self.dims)

    def _product(self, rows: list[np.ndarray]) -> np.ndarray:
        """Probabilities over the states from one row per dimension."""
        out = np.ones(1)
        for row in rows:
            out = np.kron(out, row)
        return out

    def log_terms(self, x: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """P(x, z_T..z_1) and q(z_T..z_1|x), each over all paths, shape (S,) * T."""
        k, mask = self.count, self.count
        symbol = np.eye(k + 1)
        first, last = self.alphas[0], self.alphas[-1]
        p = self._product([np.r_[np.full(k, last / k), 1 - last]] * self.dims)
        for s, t in zip(self.alphas[-2::-1], self.alphas[:0:-1], strict=True):
            reveal, stay = (s - t) / (1 - t), (1 - s) / (1 - t)
            step = [
                self._product(
                    [
                        np.r_[reveal * row, stay] if z == mask else symbol[z]
                        for z, row in zip(state, rows, strict=True)
                    ]
                )
                for state, rows in zip(self.states, self.shown, strict=True)
            ]
            p = p[..., None] * np.array(step)
        decoder = [
            np.prod(
                [
                    row[xi] if z == mask else float(z == xi)
                    for z, row, xi in zip(state, rows, x, strict=True)
                ]
            )
            for state, rows in zip(self.states, self.shown, strict=True)
        ]
        p = p * np.array(decoder)

        q = self._product([first * symbol[xi] + (1 - first) * symbol[mask] for xi in x])
        for s, t in itertools.pairwise(self.alphas):
            one = (t / s) * np.eye(k + 1)
            one[:, mask] += 1 - t / s
            step = np.ones((1, 1))
            for _ in range(self.dims):
                step = np.kron(step, one)
            q = q[..., None] * step
        return p, q.transpose()

    def bound(self, x: tuple[int, ...]) -> tuple[float, float, float]:
        """log P(x), ELBO and KL[ q(z|x) ‖ P(z|x) ], sums over all paths."""
        p, q = self.log_terms(x)
        evidence = p.sum()
        paths = q > 0
        elbo = (q[paths] * np.log(p[paths] / q[paths])).sum()
        kl = (q[paths] * np.log(q[paths] / (p[paths] / evidence))).sum()
        return float(np.log(evidence)), float(elbo), float(kl)
