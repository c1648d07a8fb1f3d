"""Examples, latents and predictions as RGB pixels, and pictures as data URIs."""

import base64
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nelbo.data.readers.pillow import png
from nelbo.data.schema import Schema
from nelbo.diffusion.process import ForwardProcess

MASK = np.array([104, 124, 158], np.uint8)  # a grey that no grey pixel has
HEAT = "magma"  # colours of costs


def is_image(schema: Schema) -> bool:
    """Return whether examples are grey, RGB or RGBA images large enough to be shown as such."""
    return len(schema.shape) == 3 and schema.shape[0] in (1, 3, 4) and min(schema.shape[1:]) >= 4


def over_white(pixels: np.ndarray) -> np.ndarray:
    """Convert 8-bit grey, RGB or RGBA pixels (..., C) to RGB on a white ground, (..., 3)."""
    if pixels.shape[-1] < 4:
        return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    opaque = pixels[..., 3:] / 255
    return np.rint(255 + opaque * (pixels[..., :3] - 255.0)).astype(np.uint8)


class Canvas:
    """Convert data, latents and predictions to RGB pixels.

    Integers span all levels; real data are clipped to quantiles.

    Args:
        process: the process of the latents.
        schema: the schema of the images, C = 1, 3 or 4.
        x: images that set the range of real data.
    """

    def __init__(self, process: ForwardProcess, schema: Schema, x: Tensor) -> None:
        self.process = process
        limits = torch.tensor([0.002, 0.998], dtype=torch.float64)
        few = x.double().flatten()[: 2**20]
        low, high = (0.0, schema.levels - 1.0) if schema.levels else few.quantile(limits).tolist()
        self.low, self.high = low, max(high, low + 1e-12)

    def data(self, x: Tensor) -> np.ndarray:
        """Return x (N, C, H, W), in the units of the data, as pixels (N, H, W, 3)."""
        pixels = (x.double().cpu().movedim(1, -1).numpy() - self.low) / (self.high - self.low)
        pixels = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
        return over_white(pixels)

    def latent(self, z: Tensor, t: float) -> np.ndarray:
        """Return z_t as pixels, rescaled to the range of the data; masks have their own colour."""
        x, hidden = self.process.picture(z, torch.tensor(t, dtype=torch.float64))
        masked = hidden.cpu().movedim(1, -1).numpy()
        return np.where(masked[..., :3], MASK, self.data(x)).astype(np.uint8)

    def prediction(self, e_hat: Tensor, z: Tensor) -> np.ndarray:
        """Return the mean of x predicted from z as pixels; unmasked symbols are shown as is."""
        return self.data(self.process.mean(e_hat, z))


def heated(cost: np.ndarray, high: float) -> np.ndarray:
    """Return maps (N, H, W) as RGB images of 8 bits, from black at 0 to the lightest at `high`."""
    import matplotlib

    colours = matplotlib.colormaps[HEAT](np.clip(cost / high, 0, 1))
    return np.rint(255 * colours[..., :3]).astype(np.uint8)


def uri(picture: Image.Image) -> str:
    """Return a picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def mosaic(images: np.ndarray, columns: int, side: int = 900) -> Image.Image:
    """Arrange 8-bit RGB images (N, H, W, 3) in rows on a transparent ground, about `side` wide."""
    n, h, w, _ = images.shape
    rows, gap = math.ceil(n / columns), max(1, round(w / 12))
    sheet = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w, :3] = image
        sheet[top : top + h, left : left + w, 3] = 255
    picture = Image.fromarray(sheet)
    factor = side / picture.width
    if factor < 1:
        return picture.resize((side, round(picture.height * factor)), Image.Resampling.LANCZOS)
    whole = math.ceil(factor)
    size = picture.width * whole, picture.height * whole
    return picture.resize(size, Image.Resampling.NEAREST)
