"""`nelbo report`: a page about a run."""

from pathlib import Path

from nelbo.cli.common import RunFolder, Seed, say


def report(run: RunFolder, *, out: Path | None = None, seed: Seed = 0) -> None:
    """Write a self-contained HTML page about a run.

    Under torchrun the processes share the work.

    Parameters
    ----------
    out
        The page; by default report.html in the run folder.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable
    from nelbo.report import report as make
    from nelbo.runs.loading import load

    loaded, page = load(run), out or run / "report.html"
    check_writable(page)
    with process_group() as rank:
        make(loaded, page, seed=seed, progress=True)
    if rank == 0:
        say(f"open {page}")
