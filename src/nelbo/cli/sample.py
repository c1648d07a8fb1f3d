"""`nelbo sample`: draw new examples, or the missing parts of given ones."""

import sys
from pathlib import Path
from typing import Any, Literal

from nelbo.cli.common import (
    Device,
    Labels,
    Seed,
    Spacing,
    grid_of,
    place_of,
    say,
    say_of_formulas,
)


def sample(
    run: str,
    *,
    out: Path | None = None,
    n: int = 64,
    steps: int | None = None,
    grid: Spacing | None = None,
    seed: Seed = 0,
    sampler: Literal[
        "ancestral", "flow", "left-to-right", "greedy", "margin", "entropy"
    ] = "ancestral",
    tokens_per_step: int | None = None,
    length: int | None = None,
    condition: Labels | None = None,
    guidance: float = 1.0,
    inpaint: Path | None = None,
    mask: Path | None = None,
    rounds: int = 1,
    impute: Path | None = None,
    particles: int | None = None,
    as_modelled: bool = False,
    trust_remote_code: bool = False,
    precision: Literal["bf16", "fp16", "float32", "float64"] | None = None,
    device_map: str | None = None,
    device: Device = "auto",
) -> None:
    """Draw new examples from a run, or from another library's model.

    Samples of a conditional run are draws from P(x|c); without --condition, each c is taken from a
    random training example. Under torchrun the processes share the work.

    Parameters
    ----------
    run
        A run folder; or another library's model, diffusers:FOLDER, openai:FILE or hf:FOLDER, which
        takes no --grid, --inpaint, --impute or --as-modelled.
    out
        A .png file (a grid of images), a .txt file, a table (.csv, .tsv, .parquet, .arrow), or a
        .npz file (array x in the units of the data; of hf:FOLDER, ids with special tokens, and -2
        after the end of a text); without it, text is printed.
    n
        Number of examples.
    steps
        Number of steps, one network call each; by default 32, or for another library's model of
        images its own number.
    grid
        The times of the steps: best for this run, found once and kept in its folder; or uniform.
    sampler
        ancestral draws from the model that evaluate --steps measures; flow follows the
        deterministic probability flow. The others show masked symbols in an order: left-to-right,
        or the most certain first, by the largest probability (greedy), the margin between the two
        largest, or the entropy. They draw from the model that evaluate --sampler measures.
    tokens_per_step
        Number of symbols that such an order shows in each step, by default 1.
    length
        For hf:FOLDER: number of tokens to draw for each sample, after its prompt; by default 128,
        or as many as there is room for.
    condition
        The label of all samples, such as 3; NAME=VALUE, repeated, if there are several labels. For
        another library's model: a class or a prompt (of hf:FOLDER, the text with which samples
        begin); if repeated, one for each sample.
    guidance
        How strongly the label counts (classifier-free guidance), at two network calls per step.
        Only 1 draws from the model that evaluate measures; any other value draws from another
        distribution.
    inpaint
        An image of the run's size, whose masked part is drawn given the rest: exactly for the
        absorbing process, approximately for the Gaussian one.
    mask
        With --inpaint: an image of the same size, white where to draw and black where to keep.
    rounds
        With --inpaint: how often each step is repeated; more rounds make both parts fit better.
    impute
        A table with the run's columns, whose missing cells are drawn given the other cells of
        their row. The completed table goes to --out. Another --seed gives other draws.
    particles
        With --impute: number of candidates for each row, by default 32. With more candidates, at
        --steps network calls each, the draws approach the model's own conditional distribution.
    as_modelled
        For a table: keep rows with numbers beyond the range of the training data, or with a
        category that they did not have, written as (other). By default such rows are drawn again.
    trust_remote_code
        Run the code in the folder of hf:FOLDER, after printing what will run.
    precision
        Precision of the weights of hf:FOLDER, by default as they are stored. For diffusers:FOLDER
        and openai:FILE: bf16, by autocast of the network.
    device_map
        Where to put the weights of hf:FOLDER, instead of --device, in the form of transformers:
        auto spreads a large model over all devices.
    """
    from nelbo import integrations
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo._utils.progress import tracker
    from nelbo.data.readers.encoded import read_masked
    from nelbo.data.tabular.tables import FILES, to_bytes
    from nelbo.models.conditioning import guided, parse
    from nelbo.report import images
    from nelbo.runs.loading import load
    from nelbo.runs.samples import SAMPLE_STEPS, complete_table, draw, order_of
    from nelbo.sampling.samplers import complete

    if integrations.is_foreign(run):
        only_runs = (grid, inpaint, mask, impute, particles)
        if as_modelled or rounds != 1 or any(v is not None for v in only_runs):
            raise ValueError(
                "--grid, --inpaint, --mask, --rounds, --impute, --particles and --as-modelled are"
                " for runs, and not for another library's model; leave them out"
            )
        if device_map is not None and device != "auto":
            raise ValueError(f"--device-map places the weights; leave --device {device} out")
        options = {
            "steps": steps,
            "condition": condition,
            "guidance": guidance,
            "sampler": sampler,
            "tokens_per_step": tokens_per_step,
            "length": length,
            "trust_remote_code": trust_remote_code,
            "precision": precision,
            "device_map": device_map,
        }
        _foreign(run, out, n, seed, None if device_map else device, options)
        return
    if trust_remote_code or any(v is not None for v in (length, precision, device_map)):
        raise ValueError(
            "--length, --trust-remote-code, --precision and --device-map are for other libraries'"
            " models; leave them out"
        )
    loaded = load(Path(run))
    save = images.saver(out, loaded.config.schema)
    if out is not None:
        check_writable(out)
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; got {n}")
    order = order_of(loaded.model, sampler, tokens_per_step, steps)
    if order is not None and grid is not None:
        raise ValueError(
            f"--grid chooses the times of steps, and the sampler {sampler} has no steps; leave"
            " it out"
        )
    steps, grid = SAMPLE_STEPS if steps is None else steps, grid or "best"
    if (inpaint is None) != (mask is None) or (inpaint is None and rounds != 1):
        raise ValueError("--inpaint, --mask and --rounds go together; give an image and a mask")
    if inpaint is not None and sampler != "ancestral":
        raise ValueError("--inpaint takes the ancestral sampler; leave --sampler out")
    if impute is not None:
        others = (inpaint, condition, n != 64, guidance != 1, sampler != "ancestral", as_modelled)
        if any(others) or out is None or out.suffix.lower() not in FILES:
            raise ValueError(
                "--impute writes the completed table to --out, a .csv, .tsv, .parquet or .arrow"
                " file; only --steps, --grid, --seed and --particles can be given with it"
            )
        with process_group() as rank:
            loaded.model.to(place_of(device, rank == 0))
            drawn = complete_table(
                loaded,
                impute,
                lambda: grid_of(loaded, steps, grid),
                particles=particles,
                seed=seed,
                tell=say if rank == 0 else str,
                track=tracker("impute"),
            )
            if rank == 0:
                content = to_bytes(drawn, out.suffix.lower())
                write(out, content)
                say_of_formulas(out, content)
                say(f"{drawn.height} rows in {out}")
        return
    if particles is not None:
        raise ValueError("--particles goes with --impute; leave it out")
    with process_group() as rank:
        labels = (
            None if condition is None else parse(condition, loaded.config.schema).expand(n, -1)
        )
        if guidance != 1 and rank == 0 and loaded.model.conditioned_on:
            say(
                f"guidance {guidance:g}: these samples are not draws from the model that"
                " evaluate measures"
            )
        place, track = place_of(device, rank == 0), tracker("sample")
        loaded.model.to(place)  # the best grid is measured there too
        if inpaint is not None and mask is not None:
            pixels, known = read_masked(inpaint, mask, loaded.config.schema)
            model, given = guided(loaded.model, guidance), loaded.conditions(n, labels, seed)
            times = grid_of(loaded, steps, grid)
            pixels = pixels.expand(n, *model.shape)
            x = complete(model.to(place), pixels, known, times, seed, rounds, track, given)
        else:
            x = draw(
                loaded,
                n,
                lambda: order or grid_of(loaded, steps, grid),
                labels=labels,
                seed=seed,
                guidance=guidance,
                sampler=sampler,
                as_modelled=as_modelled,
                tell=say if rank == 0 else str,
                track=track,
            )
        if rank:
            return
        if out is None:
            sys.stdout.write(save(x.cpu()).decode())
            return
        content = save(x.cpu())
        write(out, content)
        say_of_formulas(out, content)
        say(f"{n} samples in {out}")


def _foreign(
    source: str,
    out: Path | None,
    n: int,
    seed: int,
    device: str | None,
    options: dict[str, Any],
) -> None:
    """Write samples of another library's model, or print them if they are texts."""
    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo._utils.progress import tracker
    from nelbo.report import images
    from nelbo.runs.foreign_samples import sampler_of

    if out is not None:
        check_writable(out)
    with process_group() as rank:
        schema, draw, texts = sampler_of(
            source,
            device=None if device is None else place_of(device, rank == 0),
            count=n,
            tell=say if rank == 0 else str,
            **options,
        )
        save = images.saver(out, schema, texts)
        x = draw(n, seed, tracker("sample"))
        if rank:
            return
        if out is None:
            sys.stdout.write(save(x.cpu()).decode())
            return
        write(out, save(x.cpu()))
        say(f"{n} samples in {out}")
