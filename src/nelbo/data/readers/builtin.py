"""Data sets that come with the dependencies."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nelbo.data.found import Found


def digits() -> Found:
    """Return scikit-learn's 1797 digits, (N, 1, 8, 8), 17 levels: 1000/350/447 in file order."""
    # its file rather than `load_digits`, whose module imports scipy and pandas for 1.5 seconds
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    x, y = table[:, :-1].reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)
    parts, labels = (
        dict(zip(("train", "validation", "test"), np.split(v, [1000, 1350]), strict=True))
        for v in (x, y)
    )
    notes = ("digits split in file order: 1000/350/447",)
    return Found("digits", parts, 17, notes, {"class": labels})
