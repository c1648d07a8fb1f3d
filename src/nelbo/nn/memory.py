r"""A network without weights: the exact denoiser of a kernel density.

    P(x) = 1/N Σ_i N(x; x_i, h²)    has    E[x | z_t] = Σ_i w_i ( x_i + k (z_t/√α - x_i) ),

    w = softmax_i( -‖z_t - √α x_i‖² / 2v ),   v = α h² + 1 - α,   k = α h²/v,

so a diffusion model with this denoiser is as good as the kernel density itself, at every noise
level. The mean of a memory and a trained network is a denoiser whose squared error, and therefore
whose bound, is at most the mean of the two, since the square is convex; it is usually below both.
"""

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

ENTRIES = 2**22  # distances held in memory at a time


class Memory(nn.Module):
    """Exact denoiser of a kernel density, in the parametrization `VPrediction`.

    Args:
        examples: x_i in the space of the process, shape (N, *shape).
        bandwidth: h, in the same space.
    """

    examples: Tensor

    def __init__(self, examples: Tensor, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("examples", examples.flatten(1))
        self.bandwidth = bandwidth

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return v̂ = √α ε̂ - √(1-α) ê at z = features, (B, *shape), and γ = level, (B,)."""
        rows = max(1, ENTRIES // len(self.examples))
        parts = zip(features.flatten(1).split(rows), level[:, None].split(rows), strict=True)
        return torch.cat([self._velocity(*part) for part in parts]).reshape(features.shape)

    def _velocity(self, z: Tensor, gamma: Tensor) -> Tensor:
        signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        variance = (signal * self.bandwidth).square() + noise.square()
        nearest = z / signal
        weight = -torch.cdist(nearest, self.examples).square() * signal.square() / (2 * variance)
        mean = weight.softmax(1) @ self.examples
        kept = (signal * self.bandwidth).square() / variance
        e_hat = mean + kept * (nearest - mean)
        return (signal * z - e_hat) / noise


def best_bandwidth(examples: Tensor, least: float) -> float:
    """Return the bandwidth h in [least, 4] of the greatest leave-one-out likelihood.

    Args:
        examples: x_i in the space of the process, shape (N, ...) with N > 1.
        least: the smallest bandwidth to consider, in the same space.
    """
    x = examples.flatten(1)
    squares = torch.cdist(x, x).square().fill_diagonal_(math.inf)

    def likelihood(h: float) -> float:
        each = (-squares / (2 * h * h)).logsumexp(1) - x.shape[1] * math.log(h)
        return each.mean().item()

    candidates = torch.linspace(math.log(least), math.log(4.0), 32).exp().tolist()
    return max(candidates, key=likelihood)
