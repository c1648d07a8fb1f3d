r"""Coefficients of the estimate of a masked model, as functions of the hidden share l/L.

A pilot gives pairs of costs at the same count l of the same text, with their control variates. In
a pair the text and the count cancel, so that the differences show what the masks alone do:

    k       least squares of the differences, a penalised spline in l/L (Eilers & Marx 1996)
    sd      standard deviation of what is left, as σ(l/L)/√l: a mean over l tokens
    b       mean of what is left, which is smooth in l, so that strata need not be narrow

The residual of a hidden token, which is left after this, predicts how hard the token is in other
draws of the same text. If residuals have the mean square V, of which C is common to two masks,
N of them with the sum S predict S/(N + κ), κ = V/C - 1 (the best linear prediction; James & Stein
1961), times a slope that is fitted to the same pairs, each mask predicted from its partner.

Without a pilot k is 1 for the surrogate and 0 for the others, σ is constant and b is 0.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NODES = 0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0  # hidden shares between which all is linear
RIDGE, SMOOTH = 2.0, 8.0  # penalties on the size of k and its change between nodes, in pairs
LEAST = 0.1  # κ, at least
EVEN = 0.1  # share of the masks that is spread evenly over the counts, at least


def hats(share: Tensor) -> Tensor:
    """Return the weights of the nodes in a piecewise linear function at `share`, (..., K)."""
    nodes = torch.tensor(NODES, dtype=torch.float64)
    right = torch.searchsorted(nodes, share.contiguous()).clamp(1, len(nodes) - 1)
    part = (share - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
    one = torch.nn.functional.one_hot
    left = one(right - 1, len(nodes)).double() * (1 - part)[..., None]
    return left + one(right, len(nodes)).double() * part[..., None]


@dataclass(frozen=True)
class Coefficients:
    """Coefficients at the K nodes.

    Args:
        slopes: k of F control variates, (F, K).
        curve: b, (K,), nats per token.
        spread: σ of what is left, (K,), nats.
        of_surrogate: σ of k times the surrogate's cost, (K,); None without a surrogate.
        by_draws: slope of the prediction by other draws, (K,); None where they are not used.
        shrink: κ, see the head of this file.
    """

    slopes: Tensor
    curve: Tensor
    spread: Tensor
    of_surrogate: Tensor | None
    by_draws: Tensor | None = None
    shrink: float = 1.0

    def known(self, share: Tensor, v: Tensor) -> Tensor:
        """Return k·v + b at hidden shares, (...), for variates v, (..., F)."""
        basis = hats(share)
        return (v * (basis @ self.slopes.T)).sum(-1) + basis @ self.curve

    def deviations(self, length: int, surrogate: bool = False) -> np.ndarray:
        """Return the sd of one cost at l = 1..L; of k times the surrogate's, if asked; (L,)."""
        spread = self.of_surrogate if surrogate else self.spread
        assert spread is not None
        count = torch.arange(1, length + 1).double()
        sd = hats(count / length) @ spread / count.sqrt()
        mean = sd.mean() if sd.sum() > 0 else 1.0
        return ((1 - EVEN) * sd + EVEN * mean).numpy()


def usual(variates: int, surrogate: bool) -> Coefficients:
    """Return the coefficients without a pilot; the surrogate is the first of the variates."""
    ones = torch.ones(len(NODES), dtype=torch.float64)
    slopes = torch.zeros(variates, len(NODES), dtype=torch.float64)
    if surrogate:
        slopes[0] = 1.0
    return Coefficients(slopes, 0 * ones, ones, 2 * ones if surrogate else None)


def fit(share: Tensor, count: Tensor, cost: Tensor, v: Tensor, surrogate: bool) -> Coefficients:
    """Fit the coefficients to Q pairs.

    Args:
        share: l/L of each pair, (Q,).
        count: l, (Q,).
        cost: mean cost per hidden token, (Q, 2), nats.
        v: the control variates, (Q, 2, F).
        surrogate: whether the first variate is the cost of a surrogate.
    """
    before = usual(v.shape[-1], surrogate).slopes
    basis, root = hats(share), (count / 2).sqrt()[:, None]
    dv = root * (v[:, 0] - v[:, 1])
    design = (dv[..., None] * basis[:, None]).flatten(1)
    dy = root[:, 0] * (cost[:, 0] - cost[:, 1])
    change = torch.eye(len(NODES), dtype=torch.float64).diff(dim=0)
    roughness = RIDGE * torch.eye(len(NODES)).double() + SMOOTH * change.T @ change
    size = dv.square().mean(0).clamp(min=1e-12)
    penalty = torch.block_diag(*(s * roughness for s in size))
    inverse = torch.linalg.inv(design.T @ design + penalty)
    target = dy - design @ before.flatten()
    solution = inverse @ (design.T @ target)
    leverage = ((design @ inverse) * design).sum(1)
    left = (target - design @ solution) / (1 - leverage).clamp(min=0.1)
    slopes = before + solution.view_as(before)
    found = Coefficients(slopes, torch.zeros_like(slopes[0]), _spread(basis, left), None)
    rest = (cost - found.known(share[:, None].expand_as(cost), v)).mean(1)
    centred = rest - rest.mean()
    bend = torch.linalg.solve(basis.T @ basis + roughness / SMOOTH, basis.T @ centred)
    by_surrogate = None
    if surrogate:
        by_surrogate = _spread(basis, (basis @ slopes[0]) * dv[:, 0])
    return Coefficients(slopes, bend + rest.mean(), found.spread, by_surrogate)


def shrinkage(one: Tensor, other: Tensor, both: Tensor) -> float:
    """Return κ = V/C - 1 from what is left of tokens in the two masks of pairs; inf for C <= 0.

    Args:
        one: of the first mask, (Q, D).
        other: of the second.
        both: whether the token is hidden in both.
    """
    common = (one * other)[both].sum().item()
    square = (one.square() + other.square())[both].sum().item() / 2
    return max(LEAST, square / common - 1) if common > 0 else math.inf


def predicted(left: Tensor, hidden: Tensor, shrink: float) -> Tensor:
    """Return how much harder than expected tokens are, by masks that are summed already.

    Args:
        left: sums of what is left, (..., D).
        hidden: numbers of masks that hide each token, (..., D).
        shrink: κ.
    """
    return left / (hidden + shrink)


def _spread(basis: Tensor, left: Tensor) -> Tensor:
    """Return the root of the mean square of `left`, (Q,), around each node, (K,)."""
    square = left.square()
    return ((basis.T @ square + SMOOTH * square.mean()) / (basis.sum(0) + SMOOTH)).sqrt()
