"""Numbers and elements of the page as HTML."""

import math
from collections.abc import Iterable
from html import escape

import numpy as np

from nelbo.pages.images import mosaic, uri


def rounded(value: float, error: float) -> str:
    """Return a value with as many decimals as its error has, and a true minus sign."""
    return f"{value:.{_digits(error)}f}".replace("-", "−")


def spread(error: float) -> str:
    """Return an error with two digits; a dash where there is none."""
    return "–" if math.isnan(error) else f"{error:.{_digits(error)}f}"


def _digits(error: float) -> int:
    """Return the number of decimals that shows two digits of an error."""
    if not error > 0:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(error))))


def number(value: float) -> str:
    """Return a value with three to five digits."""
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Return seconds as seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def seconds(value: float) -> str:
    """Return seconds of a measurement, with two digits."""
    if value < 0.0995:
        return f"{1000 * value:.2g} ms"
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def section(title: str, text: str, body: str) -> str:
    """Return a section of the page: title, text, and the HTML of its body."""
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def html_table(head: Iterable[str], rows: Iterable[tuple[str, ...]], total: bool = False) -> str:
    """Return a table of HTML cells, with `head` if it has any; `total` marks the last row."""
    rows = list(rows)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = [
        f"<tr{' class=sum' if total and i == len(rows) - 1 else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f"<table>{f'<tr>{top}</tr>' * bool(top)}{''.join(lines)}</table>"


def picture(images: np.ndarray, columns: int, label: str, side: int = 900) -> str:
    """Return images (N, H, W, 3) as one picture of `columns` columns, about `side` pixels wide."""
    address = uri(mosaic(images, columns, side))
    return f'<img alt="{escape(label)}" src="{address}">'


def strip(columns: list[np.ndarray], labels: list[str]) -> str:
    """Return columns of images side by side, each with its label."""
    cells = "".join(
        f"<figure>{picture(images, 1, label, 96)}<figcaption>{label}</figcaption></figure>"
        for images, label in zip(columns, labels, strict=True)
    )
    style = f"grid-template-columns:repeat({len(columns)},1fr)"
    return f'<div class="strip" style="{style}">{cells}</div>'
