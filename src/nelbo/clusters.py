r"""Mixtures of Gaussians as the law of the data, and what some dimensions say of another.

    p(e) = Σ_c w_c N(e; μ_c, S_c),    z = √α e + σ ε,  σ² = 1-α,    p(z|c) = N(√α μ_c, Q_c⁻¹)

Of one dimension given all others of z, for d = z - √α μ_c and r = (Q_c d)_i / Q_ii:

    p(e_i|z_j, j≠i) = Σ_c w_ci N( (z_i - r)/√α, (1/Q_ii - σ²)/α ),
    log w_ci = log w_c + ½ log|Q_c| - ½ d'Q_c d - log N(r; 0, 1/Q_ii) + const.

z_i cancels from all of it: whatever is made of this law for dimension i is independent of ε_i, for
any symmetric Q. S_c is free in the first principal components of the data and one number beyond.
`latent_class` has the same law with S_c free in all directions, which few columns allow.

Few components say little and many are fitted to few examples each, so mixtures of several sizes
are asked and what they say is averaged: of digits that follows a network better than any of them.
"""

import math
import warnings

import torch
from torch import Tensor

RANK = 64  # principal components in which the covariances are free
SIZES = (1, 4, 10)  # components, at most; each needs as many examples as principal components, ..
FEWEST = 32  # .. and no less than so many
FLOOR = 0.05  # of the mean variance of a component, in every direction
NOISES = (-4.0, -1.0, 2.0)  # γ at which `features` look


class Clusters:
    """Mixtures of several sizes that fit embedded examples.

    Args:
        e: embedded examples, flat, shape (N, D), D at most a thousand or so.
    """

    def __init__(self, e: Tensor) -> None:
        most = max(1, len(e) // max(FEWEST, min(RANK, e.shape[1])))
        principal = Principal(e)
        sizes = sorted({min(most, n) for n in SIZES})
        self.mixtures = [Mixture(principal, size) for size in sizes]

    def odds(self, z: Tensor, alpha: Tensor, values: Tensor) -> Tensor:
        """The mean of the mixtures' `odds`; (B, D, K)."""
        parts = [mixture.odds(z, alpha, values) for mixture in self.mixtures]
        return torch.stack(parts).mean(0)

    def features(self, e: Tensor) -> Tensor:
        """The mean of the mixtures' `features`; (B, 2 len(NOISES))."""
        return torch.stack([mixture.features(e) for mixture in self.mixtures]).mean(0)


class Principal:
    """The first principal components of embedded examples e, (N, D), and what is beyond them."""

    def __init__(self, e: Tensor) -> None:
        #: (D,), and (D, R)
        self.mean, centred = e.mean(0), e - e.mean(0)
        spread, axes = torch.linalg.eigh(centred.T @ centred / len(e))
        rank = min(RANK, e.shape[1])
        self.axes, beyond = axes[:, -rank:], spread[:-rank].clamp(min=0)
        #: of the examples, (N, R)
        self.coordinates = centred @ self.axes
        #: the least variance of a component, and the one in all directions beyond
        self.floor = FLOOR * spread.clamp(min=0).mean() + 1e-12
        mean_beyond = beyond.mean() if len(beyond) else torch.zeros_like(self.floor)
        self.beyond = mean_beyond.maximum(self.floor)


class Mixture:
    """The mixture of so many components that fits embedded examples, by scikit-learn's EM.

    Args:
        principal: of the examples.
        components: C.
    """

    def __init__(self, principal: Principal, components: int) -> None:
        fitted = _fit(principal.coordinates, components, principal.floor.item())
        #: w_c (C,), μ_c (C, D), and S_c as orthonormal vectors (C, D, R) with variances (C, R), ..
        self.log_weight, means, covariances = fitted
        self.variance, vectors = torch.linalg.eigh(covariances)
        self.mean = principal.mean + means @ principal.axes.T
        self.vectors = principal.axes @ vectors
        #: .. and one variance in the directions beyond
        self.beyond = principal.beyond

    def _precision(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Those of p(z|c) along the vectors, (B, C, R), and beyond, (B, 1, 1)."""
        alpha = alpha[:, None, None]
        noise = 1 - alpha
        return 1 / (alpha * self.variance + noise), 1 / (alpha * self.beyond + noise)

    def _given_others(self, z: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p(z), (B,), and log w_ci, mean and variance of e_i given the others, (B, C, D)."""
        along, beyond = self._precision(alpha)
        root = alpha.sqrt()[:, None, None]
        d = z[:, None] - root * self.mean
        part = (torch.einsum("bcd,cdr->bcr", d, self.vectors)) * (along - beyond)
        q_d = torch.einsum("bcr,cdr->bcd", part, self.vectors) + beyond * d
        squares = self.vectors.square()
        q_ii = torch.einsum("bcr,cdr->bcd", along - beyond, squares) + beyond
        # (1/Q_ii - σ²)/α without the difference, for α S_c = Q_c⁻¹ - σ²
        s_q, s_q_beyond = self.variance * along, self.beyond * beyond
        variance = torch.einsum("bcr,cdr->bcd", s_q - s_q_beyond, squares) + s_q_beyond
        rest = d.shape[-1] - along.shape[-1]
        log_det = along.log().sum(-1) + rest * beyond.log()[..., 0]
        log_p = self.log_weight + (log_det - (q_d * d).sum(-1)) / 2
        r = q_d / q_ii
        log_w = log_p[..., None] + (r.square() * q_ii - q_ii.log()) / 2
        constant = d.shape[-1] / 2 * math.log(2 * math.pi)
        return (
            log_p.logsumexp(-1) - constant,
            log_w.log_softmax(1),
            (z[:, None] - r) / root,
            variance / q_ii,
        )

    def odds(self, z: Tensor, alpha: Tensor, values: Tensor) -> Tensor:
        """log p(e_i = v_k|z_j, j≠i) - log p(e_i = v_k), how the others change it; (B, D, K).

        Args:
            z: shape (B, D).
            alpha: shape (B,).
            values: v_1..v_K, shape (K,).
        """
        _, log_w, mean, variance = self._given_others(z, alpha)
        own = torch.einsum("cdr,cr->cd", self.vectors.square(), self.variance - self.beyond)
        alone = _mixed(self.log_weight[:, None], self.mean, own + self.beyond, values)
        return _mixed(log_w, mean, variance, values) - alone

    def features(self, e: Tensor) -> Tensor:
        """-log p(z) and -Σ_i log p(e_i|z_j, j≠i) at z = √α e for a few α; (B, 2 len(NOISES))."""
        columns = []
        for gamma in NOISES:
            alpha = torch.full_like(e[:, 0], -gamma).sigmoid()
            log_p, log_w, mean, variance = self._given_others(alpha.sqrt()[:, None] * e, alpha)
            each = log_w - ((e[:, None] - mean).square() / variance + variance.log()) / 2
            columns += [-log_p, -each.logsumexp(1).sum(1)]
        return torch.stack(columns, 1)


def _mixed(log_w: Tensor, mean: Tensor, variance: Tensor, values: Tensor) -> Tensor:
    """log Σ_c w_c N(v_k; mean, variance), (.., D, K), of numbers (.., C, D); up to a constant."""
    error = (values - mean[..., None]).square() / variance[..., None]
    return ((log_w - variance.log() / 2)[..., None] - error / 2).logsumexp(-3)


def _fit(e: Tensor, components: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """log w_c, means (C, R) and covariances (C, R, R)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(components, reg_covar=floor, max_iter=50, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any mixture will do
        mixture.fit(e.cpu().numpy())
    found = mixture.weights_, mixture.means_, mixture.covariances_
    weights, means, covariances = (torch.as_tensor(v).to(e) for v in found)
    return weights.log(), means, covariances
