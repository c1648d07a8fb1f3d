"""`nelbo explain`: a page on which the derivation moves."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nelbo.cli.common import Seed, say


def explain(
    run: Annotated[
        str,
        Parameter(
            help="A run folder; or toy, a model of one number about which everything is known."
        ),
    ],
    *,
    out: Path | None = None,
    seed: Seed = 0,
) -> None:
    """Write a self-contained HTML page on which a reader moves t and sees what each step costs.

    Parameters
    ----------
    out
        The page; by default explain.html in the run folder, or toy.html.
    """
    from nelbo._utils.files import check_writable
    from nelbo.explain import explain as make
    from nelbo.runs.loading import load

    loaded = run if run == "toy" else load(run)
    page = out or Path("toy.html" if run == "toy" else Path(run) / "explain.html")
    check_writable(page)
    say(f"open {make(loaded, page, seed, progress=True)}")
