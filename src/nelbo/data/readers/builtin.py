"""Data sets that come with the dependencies."""

import numpy as np

from nelbo.data.conform import Found


def digits() -> Found:
    """Return scikit-learn's 1797 digits, (N, 1, 8, 8), 17 levels: 1000/350/447 in file order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.images.astype(np.uint8)[:, None], digits.target
    parts, labels = (
        dict(zip(("train", "validation", "test"), np.split(v, [1000, 1350]), strict=True))
        for v in (x, y)
    )
    notes = ("digits split in file order: 1000/350/447",)
    return Found("digits", parts, 17, notes, {"class": labels})
