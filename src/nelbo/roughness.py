"""How rough an image is: what is known of its bits without any law."""

import torch
from torch import Tensor

SCALES = (1 / 16, 1.0, 16.0)  # of the differences of neighbours, in units of their mean


class Roughness:
    """Σ log(1 + |x_i - x_j|/s) over neighbours i, j in an image, at a few scales s.

    As what a coder spends that predicts a pixel from the one beside it: of photographs these
    follow a network's bits more closely than any law in `control`.

    Args:
        x: images, shape (N, C, H, W), of more than one pixel.
    """

    def __init__(self, x: Tensor) -> None:
        self.mean = self._differences(x).mean().clamp(min=1e-300)

    @staticmethod
    def _differences(x: Tensor) -> Tensor:
        x = x.double()
        return torch.cat([x.diff(dim=2).flatten(1), x.diff(dim=3).flatten(1)], 1).abs()

    def __call__(self, x: Tensor) -> Tensor:
        """Of each image, shape (B, len(SCALES))."""
        d = self._differences(x) / self.mean
        return torch.stack([torch.log1p(d / s).sum(1) for s in SCALES], 1)
