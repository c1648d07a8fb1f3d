r"""A network without weights: the exact denoiser of a mixture of Gaussians; and its correction.

    P(e) = Σ_k π_k N(e; μ_k, U_k S_k U_k'),    E[e|z] = Σ_k P(k|z) ( μ_k + √α U_k S_k/T_k a_k )

with T_k = α S_k + 1-α and a_k = U_k'(z - √α μ_k). As the velocity v = (√α z - E[e|z])/√(1-α), with
the difference taken by hand,

    v = √(1-α) Σ_k P(k|z) ( -μ_k + √α U_k (1-S_k)/T_k a_k ).

Whatever is learned is added to it, so training starts where the mixture is.
"""

import math

import torch
from torch import Tensor, nn

ENTRIES = 2**22  # of the table of rows and components that is held at a time


class MixtureDenoiser(nn.Module):
    """E[e|z] of a mixture as the output of the head `VPrediction`, and the density of z.

    Args:
        weight: π, shape (K,).
        mean: μ, shape (K, D).
        variance: the diagonals of S, shape (K, D), positive.
        axes: U, shape (K, D, D); left out, the axes of e.
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
        """N(0, I) of so many dimensions."""
        zeros = torch.zeros(1, dims, dtype=torch.float64)
        return MixtureDenoiser(torch.ones(1, dtype=torch.float64), zeros, torch.ones_like(zeros))

    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """v at z = features, (B, *shape), and level = γ, (B,)."""
        return self.describe(features, level)[0]

    def describe(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """v, shape of z (B, *shape), and log P(z), (B,), at noise levels γ, (B,)."""
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
    """A denoiser that is known, plus what a network has learned, at first nothing."""

    def __init__(self, known: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.known, self.network = known, network

    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = (features, level) if condition is None else (features, level, condition)
        found: Tensor = self.network(*inputs)
        return found + self.known(*inputs)
