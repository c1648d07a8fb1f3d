"""Data sets that come with the dependencies."""

import numpy as np

from nelbo.data.conform import Found


def digits() -> Found:
    """scikit-learn's 1797 handwritten digits, (N, 1, 8, 8), 17 levels: 1000/350/447 in order."""
    from sklearn.datasets import load_digits

    x = load_digits().images.astype(np.uint8)[:, None]
    parts = dict(zip(("train", "validation", "test"), np.split(x, [1000, 1350]), strict=True))
    return Found("digits", parts, 17, ("digits split in file order: 1000/350/447",))
