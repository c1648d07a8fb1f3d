r"""A network without weights: the exact denoiser of a kernel density.

    P(x) = 1/N Σ_i N(x; x_i, h²)    has    E[x | z_t] = Σ_i w_i ( x_i + k (z_t/√α - x_i) ),

    w = softmax_i( -‖z_t - √α x_i‖² / 2v ),   v = α h² + 1 - α,   k = α h²/v,

so a diffusion model of it is as good as the kernel density itself, at every noise level. The
mean of a memory and of a trained network is a denoiser whose squared error, and so whose bound, is
at most the mean of theirs, since the square is convex; and most often less than either.
"""

import math

import torch
from torch import Tensor, nn

ENTRIES = 2**22  # of the table of distances that are held at a time


class Memory(nn.Module):
    """E[x|z_t] of a kernel density as the output of the head `VPrediction`.

    Args:
        examples: x_i in the space of the process, (N, *shape).
        bandwidth: h, in the same space.
    """

    examples: Tensor

    def __init__(self, examples: Tensor, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("examples", examples.flatten(1))
        self.bandwidth = bandwidth

    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        """v̂ = √α ε̂ - √(1-α) ê at z = features, (B, *shape), and level = γ, (B,)."""
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
    """The h of the greatest leave-one-out likelihood, between `least` and 4; (N, ...), N > 1."""
    x = examples.flatten(1)
    squares = torch.cdist(x, x).square().fill_diagonal_(math.inf)

    def likelihood(h: float) -> float:
        each = (-squares / (2 * h * h)).logsumexp(1) - x.shape[1] * math.log(h)
        return each.mean().item()

    candidates = torch.linspace(math.log(least), math.log(4.0), 32).exp().tolist()
    return max(candidates, key=likelihood)
