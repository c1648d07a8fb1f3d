"""One self-contained HTML page on which the derivation moves: `nelbo explain toy`, `explain RUN`.

The reader moves t and sees the latent, both distributions of a step back, what the step costs, and
the sum that becomes −ELBO. All numbers are computed here; the page looks them up and draws them.
"""

from pathlib import Path

from nelbo._utils.progress import Track, tracker
from nelbo.explain import toy
from nelbo.explain.panels import style
from nelbo.pages.page import write_page


def explain(run: str, out: str | Path, progress: bool = False) -> Path:
    """Write the page about the toy of `nelbo.toy` to `out`.

    Args:
        run: "toy".
        out: the HTML file; it is replaced as a whole.
        progress: show bars on the error stream.

    Returns:
        `out`.

    Raises:
        ValueError: for anything but "toy".
    """

    def track(what: str) -> Track:
        return tracker(what) if progress else iter

    if run != "toy":
        raise ValueError(f"explain takes 'toy'; got {run!r}")
    body, out = toy.page(track("models")), Path(out)
    write_page(out, "nelbo: the lecture, alive", body, style(), script=True)
    return out
