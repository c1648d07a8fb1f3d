"""`nelbo explain`: a page on which the derivation moves."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nelbo.cli.common import say


def explain(
    run: Annotated[str, Parameter(help="toy, a model of one number of which all is known.")],
    *,
    out: Path | None = None,
) -> None:
    """Write a self-contained HTML page on which a reader moves t and sees what each step costs.

    Parameters
    ----------
    out
        The page; by default toy.html.
    """
    from nelbo._utils.files import check_writable
    from nelbo.explain import explain as make

    page = out or Path("toy.html")
    check_writable(page)
    say(f"open {make(run, page, progress=True)}")
