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
    from nelbo.report import report as make

    with process_group() as rank:
        foreign = integrations.is_foreign(run)
        place = str(place_of(device, rank == 0)) if foreign or device != "auto" else None
        page = make(run, out, seed, True, data=data, steps=steps, calls=calls, device=place)
    if rank == 0:
        say(f"open {page}")
