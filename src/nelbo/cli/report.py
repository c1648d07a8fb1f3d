"""`nelbo report`: a page about a run."""

from pathlib import Path

from nelbo.cli.common import RunFolder, Seed, say


def report(run: RunFolder, *, out: Path | None = None, seed: Seed = 0) -> None:
    """Write a self-contained HTML page about a run.

    Parameters
    ----------
    out
        The page; report.html in the run folder where left out.
    """
    from nelbo.checkpoint import check_writable, load
    from nelbo.report import report as make

    loaded, page = load(run), out or run / "report.html"
    check_writable(page)
    make(loaded, page, seed=seed, progress=True)
    say(f"open {page}")
