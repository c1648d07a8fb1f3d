"""`nelbo report`: a page about a run."""

from pathlib import Path

from nelbo.cli.common import Device, Seed, place_of, say


def report(
    run: str,
    *,
    out: Path | None = None,
    data: str | None = None,
    steps: int | None = None,
    calls: float | None = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Write a self-contained HTML page about a run, or about another library's model.

    Under torchrun the processes share the work.

    Parameters
    ----------
    run
        A run folder; or another library's model of images, diffusers:FOLDER or openai:FILE, with
        --data.
    out
        The page; by default report.html, in the run folder if there is one.
    data
        For another library's model: the images on which it is measured.
    steps
        For another library's model: its number of steps; by default its own.
    calls
        For another library's model: maximal number of network calls per image, by default 24.
    """
    from nelbo import integrations
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable
    from nelbo.report import report as make
    from nelbo.runs.loading import load

    if integrations.is_foreign(run):
        from nelbo.report.foreign import report_foreign

        if data is None:
            raise ValueError(f"{run} comes without data; give some with --data")
        page = out or Path("report.html")
        with process_group() as rank:
            place = str(place_of(device, rank == 0))
            report_foreign(
                run, data, page, steps=steps, calls=calls, device=place, seed=seed, progress=True
            )
        if rank == 0:
            say(f"open {page}")
        return
    if not data is steps is calls is None or device != "auto":
        raise ValueError(
            "--data, --steps, --calls and --device are for another library's model; leave them out"
        )
    loaded, page = load(Path(run)), out or Path(run) / "report.html"
    check_writable(page)
    with process_group() as rank:
        make(loaded, page, seed=seed, progress=True)
    if rank == 0:
        say(f"open {page}")
