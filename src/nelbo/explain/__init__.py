"""One self-contained HTML page on which the derivation moves: `nelbo explain toy`, `explain RUN`.

The reader moves t and sees the latent, both distributions of a step back, what the step costs, and
the sum that becomes −ELBO. All numbers are computed here; the page looks them up and draws them.
"""

from pathlib import Path

from nelbo._utils.arguments import checked
from nelbo._utils.progress import Track, tracker
from nelbo.explain import run as run_page
from nelbo.explain import toy
from nelbo.explain.panels import style
from nelbo.pages.page import write_page
from nelbo.runs.loading import load
from nelbo.runs.run import Run


@checked
def explain(
    run: Run | str | Path, out: str | Path | None = None, seed: int = 0, progress: bool = False
) -> Path:
    """Write a page about a run, or about the toy of `nelbo.toy`.

    Args:
        run: a run or its folder; or "toy".
        out: the HTML file, which is replaced as a whole; by default explain.html in the run
            folder, or toy.html.
        seed: seed of the examples of a run and of their latents.
        progress: show bars on the error stream.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the run cannot be read, or its data are not available.
    """

    def track(what: str) -> Track:
        return tracker(what) if progress else iter

    if run == "toy":
        page = Path(out or "toy.html")
        body = toy.page(track("models"))
    else:
        loaded = run if isinstance(run, Run) else load(run)
        page = Path(out or loaded.path / "explain.html")
        body = run_page.page(loaded, seed, track("numbers of steps"))
    write_page(page, "nelbo: the bound of one number", body, style(), script=True)
    return page
