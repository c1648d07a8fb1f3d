"""How rough an image is: what is known of its bits without any law."""

import torch
from torch import Tensor

SCALES = (1 / 16, 1.0, 16.0)  # of differences, in units of the mean one of neighbours


class Roughness:
    """Σ log(1 + |d|/s) over an image, at a few scales s, of two kinds of differences d.

    As what a coder spends that predicts a pixel from the one beside it, or above it, and one that
    does from all three around the corner: of photographs these follow a network's bits more
    closely than any law in `control`.

    Args:
        x: images, shape (N, C, H, W), of more than one pixel.
    """

    def __init__(self, x: Tensor) -> None:
        neighbours, _ = self._differences(x)
        self.mean = neighbours.mean().clamp(min=1e-300)

    @staticmethod
    def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
        """Of neighbours; and of a pixel from left + above - corner."""
        x = x.double()
        down, right = x.diff(dim=2), x.diff(dim=3)
        neighbours = torch.cat([down.flatten(1), right.flatten(1)], 1)
        return neighbours.abs(), down.diff(dim=3).flatten(1).abs()

    def __call__(self, x: Tensor) -> Tensor:
        """Of each image, shape (B, 2 len(SCALES))."""
        kinds = [d / self.mean for d in self._differences(x)]
        return torch.stack([torch.log1p(d / s).sum(1) for d in kinds for s in SCALES], 1)
