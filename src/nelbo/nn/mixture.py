r"""A network without weights, the exact denoiser of a mixture of Gaussians; and its correction.

    P(e) = Σ_k π_k N(e; μ_k, U_k S_k U_k'),    E[e|z] = Σ_k P(k|z) ( μ_k + √α U_k S_k/T_k a_k )

with T_k = α S_k + 1-α and a_k = U_k'(z - √α μ_k). The velocity is v = (√α z - E[e|z])/√(1-α).
Simplified by hand, so that no difference of near-equal numbers is taken, it is

    v = √(1-α) Σ_k P(k|z) ( -μ_k + √α U_k (1-S_k)/T_k a_k ).

A network that learns a correction adds to it, so training starts from the mixture.
"""

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

ENTRIES = 2**22  # numbers of the table rows x components held in memory at a time


class MixtureDenoiser(nn.Module):
    """Exact denoiser of a mixture of Gaussians, in the parametrization `VPrediction`.

    Args:
        weight: π, shape (K,).
        mean: μ, shape (K, D).
        variance: the diagonals of S, shape (K, D), positive.
        axes: U, shape (K, D, D); the coordinate axes of e where left out.
    """

    log_weight: Tensor
    mean: Tensor
    variance: Tensor
    axes: Tensor | None

    def __init__(
        self, weight: Tensor, mean: Tensor, variance: Tensor, axes: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("log_weight", weight.log())
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.register_buffer("axes", axes)

    @staticmethod
    def standard(dims: int) -> "MixtureDenoiser":
        """Return the denoiser of N(0, I) in `dims` dimensions."""
        zeros = torch.zeros(1, dims, dtype=torch.float64)
        return MixtureDenoiser(torch.ones(1, dtype=torch.float64), zeros, torch.ones_like(zeros))

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return v at z = features, (B, *shape), and γ = level, (B,)."""
        return self.describe(features, level)[0]

    def describe(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return v, (B, *shape), and log P(z), (B,), at z, (B, *shape), and γ, (B,)."""
        rows = max(1, ENTRIES // self.mean.numel())
        each = [self._some(*some) for some in zip(z.split(rows), gamma.split(rows), strict=True)]
        return torch.cat([v for v, _ in each]).reshape(z.shape), torch.cat([p for _, p in each])

    def _some(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        gamma = gamma[:, None, None]
        alpha, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        y = z.flatten(1)[:, None] - alpha.sqrt() * self.mean
        along = y if self.axes is None else torch.einsum("bkd,kde->bke", y, self.axes)
        total = alpha * self.variance + noise
        costs = (total.log() + along.square() / total).sum(2)
        log_joint = self.log_weight - (costs + y.shape[2] * math.log(2 * math.pi)) / 2
        pulled = (1 - self.variance) / total * along
        if self.axes is not None:
            pulled = torch.einsum("bke,kde->bkd", pulled, self.axes)
        each = alpha.sqrt() * pulled - self.mean
        v = torch.einsum("bk,bkd->bd", log_joint.softmax(1), each)
        return noise[:, 0].sqrt() * v, log_joint.logsumexp(1)


class Corrected(nn.Module):
    """The output of a known denoiser plus a learned correction.

    Args:
        known: denoiser that is not trained.
        network: correction, zero at the start of training.
    """

    def __init__(self, known: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.known, self.network = known, network

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = (features, level) if condition is None else (features, level, condition)
        found: Tensor = self.network(*inputs)
        return found + self.known(*inputs)
