r"""Augmentation that leaves the modelled distribution unchanged.

Some images of a batch are moved a little, and the condition tells the network which ones. So it
learns P(x|moved) and P(x|not moved) together; only the second, the distribution of the data, is
measured or sampled (Karras et al. 2020, 2022: non-leaking augmentation).
"""

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from nelbo._utils.batch_rng import BatchShard, rand
from nelbo.data.schema import Schema

# the greatest rotation (radians), log of the scale, shear, and shift (half sides of the image)
ROTATION, LOG_SCALE, SHEAR, SHIFT = 0.2, 0.12, 0.2, 0.25


def augment(
    x: Tensor, share: float, schema: Schema, shard: BatchShard | None = None
) -> tuple[Tensor, Tensor]:
    """Move each image with probability `share` by a small random affine map.

    Args:
        x: images (B, C, H, W), integers or reals.
        share: the probability.
        schema: of the images; levels are rounded to levels after the move.
        shard: of a batch, which the images are; the whole batch where left out.

    Returns:
        The images, and a float (B,) that is 1 where an image was moved, else 0.
    """

    def uniform(most: float) -> Tensor:
        return (rand((len(x),), shard, device=x.device) * 2 - 1) * most

    angle, shear = uniform(ROTATION), uniform(SHEAR)
    wide, high = uniform(LOG_SCALE).exp(), uniform(LOG_SCALE).exp()
    top = torch.stack([angle.cos() * wide, (shear - angle.sin()) * high, uniform(SHIFT)], 1)
    bottom = torch.stack([angle.sin() * wide, angle.cos() * high, uniform(SHIFT)], 1)
    grid = affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    mode = "bicubic" if schema.levels is not None else "bilinear"
    moved = grid_sample(x.float(), grid, mode=mode, align_corners=False)
    if schema.levels is not None:
        moved = moved.round().clamp(0, schema.levels - 1)
    which = rand((len(x),), shard, device=x.device) < share
    return torch.where(which[:, None, None, None], moved.to(x.dtype), x), which.float()
