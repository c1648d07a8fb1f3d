"""Pictures of samples, and the files to which samples are written."""

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from nelbo.data.readers.pillow import png
from nelbo.data.readers.text import decode
from nelbo.data.schema import Schema
from nelbo.data.tabular import encoding, tables

SIDE = 1024  # maximal longer side of an enlarged grid, in pixels
RULE = "-" * 72  # between samples of text


def to_bytes(x: Tensor, schema: Schema) -> np.ndarray:
    """Convert images (N, C, H, W) to 8 bits, (N, H, W, C); real data are scaled to their range."""
    pixels = x.double().movedim(1, -1).numpy()
    if schema.levels is not None:
        pixels = pixels / (schema.levels - 1)
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / max(high - low, np.finfo(float).tiny)
    return np.rint(255 * pixels).astype(np.uint8)


def grid(x: Tensor, schema: Schema) -> Image.Image:
    """Arrange images (N, C, H, W), C = 1, 3 or 4, in about a square with margins of one pixel.

    The picture is enlarged by a whole factor to at most SIDE pixels.
    """
    images = to_bytes(x, schema)
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, c), 128, np.uint8)
    sheet[..., 3:] = 255  # the margin is not transparent
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        sheet[top : top + h, left : left + w] = image
    picture = Image.fromarray(sheet[..., 0] if c == 1 else sheet)
    factor = max(1, SIDE // max(sheet.shape))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def saver(
    out: Path | None, schema: Schema, texts: Callable[[np.ndarray], list[str]] | None = None
) -> Callable[[Tensor], bytes]:
    """Return a function that converts samples to the bytes of the file `out`, or to printed text.

    Args:
        out: the file, or None to print texts.
        schema: of one example.
        texts: returns the texts of examples, if their schema does not.

    Raises:
        ValueError: such examples cannot be written to a file with this suffix.
    """
    images = len(schema.shape) == 3 and schema.shape[0] in (1, 3, 4)
    if texts is None and schema.text:
        texts = partial(decode, symbols=schema.tokenizer or schema.alphabet or "")
    kinds = [".txt"] if texts else [".png"] if images else []
    kinds += [*(tables.FILES if schema.columns else ()), ".npz"]
    suffix = ".txt" if out is None else out.suffix.lower()
    if suffix not in kinds:
        raise ValueError(
            f"samples of shape {schema.shape} go into a file --out that ends in"
            f" {' or '.join(kinds)}; got {'none' if out is None else repr(str(out))}"
        )
    if texts and suffix == ".txt":
        return lambda x: "".join(f"{text}\n{RULE}\n" for text in texts(x.numpy())).encode()
    if suffix == ".png":
        return lambda x: png(grid(x, schema))
    if suffix != ".npz":
        return lambda x: tables.to_bytes(encoding.decode(x.numpy(), schema.columns), suffix)

    def array(x: Tensor) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=x.numpy())
        return buffer.getvalue()

    return array
