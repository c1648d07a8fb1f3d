"""`nelbo sample`: draw new examples, or the missing parts of given ones."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nelbo.cli.common import (
    Device,
    Labels,
    RunFolder,
    Seed,
    Spacing,
    grid_of,
    place_of,
    say,
    say_of_formulas,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nelbo.diffusion.times import TimeGrid
    from nelbo.runs.run import Run


def sample(
    run: RunFolder,
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
    condition: Labels | None = None,
    guidance: float = 1.0,
    inpaint: Path | None = None,
    mask: Path | None = None,
    rounds: int = 1,
    impute: Path | None = None,
    particles: int | None = None,
    as_modelled: bool = False,
    device: Device = "auto",
) -> None:
    """Draw new examples from a run.

    Samples of a conditional run are draws of P(x|c); without --condition, each c is that of a
    random training example. Under torchrun the processes share the work.

    Parameters
    ----------
    out
        A .png file (a grid of images), a .txt file, a table (.csv, .tsv, .parquet, .arrow), or a
        .npz file (array x in the units of the data); without it, text is printed.
    n
        Number of examples.
    steps
        Number of steps, each one network call, by default 32.
    grid
        Their times: best for this run, found once and kept in its folder; or uniform.
    sampler
        ancestral draws from the model that evaluate --steps measures; flow follows the
        deterministic probability flow. For masked symbols: left-to-right; or those first of which
        the model is surest, by the largest probability (greedy), the margin of the two largest, or
        the entropy; they draw from what evaluate --sampler measures.
    tokens_per_step
        How many symbols such an order shows in each step, by default 1.
    condition
        The label of all samples, such as 3; NAME=VALUE, repeated, if there are several labels.
    guidance
        How strongly the label counts (classifier-free guidance), at two network calls per step.
        Only 1 draws from the model whose bound evaluate states; any other value draws from another
        distribution.
    inpaint
        An image of the size of the run's, whose masked part is drawn given the rest: exactly
        for the masked process, approximately for the Gaussian one.
    mask
        With --inpaint: an image of the same size, white where to draw and black where to keep.
    rounds
        With --inpaint: how often each step is repeated; more rounds make both parts fit better.
    impute
        A table with the columns of the run's, whose missing cells are drawn given the others of
        their row; everything else stays as it was in --out. Another --seed gives other draws.
    particles
        With --impute: candidates for each row, by default 32. With more of them the draws approach
        the model's own conditional distribution, at --steps network calls each.
    as_modelled
        For a table: keep rows with numbers beyond the range of the training data, or with a
        category that they did not have, written as (other). By default such rows are drawn again.
    """
    import torch

    from nelbo._utils.distributed import process_group
    from nelbo._utils.files import check_writable, write
    from nelbo._utils.progress import tracker
    from nelbo.data.readers.encoded import read_masked
    from nelbo.data.tabular.tables import FILES
    from nelbo.diffusion.batch import rows_of
    from nelbo.diffusion.times import TimeGrid
    from nelbo.models.conditioning import guided, parse
    from nelbo.report import images
    from nelbo.runs.run import load
    from nelbo.runs.samples import SAMPLE_STEPS, order_of, sampler_of
    from nelbo.sampling import samplers
    from nelbo.sampling.imputation import within

    loaded = load(run)
    save = images.saver(out, loaded.config.schema)
    if out is not None:
        check_writable(out)
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; got {n}")
    order = order_of(loaded.model, sampler, tokens_per_step, steps)
    if order is not None and grid is not None:
        raise ValueError(f"--grid spaces steps in time, and {sampler} has none; leave it out")
    steps, grid = SAMPLE_STEPS if steps is None else steps, grid or "best"
    if (inpaint is None) != (mask is None) or (inpaint is None and rounds != 1):
        raise ValueError("--inpaint, --mask and --rounds go together; give an image and a mask")
    if sampler == "flow":
        samplers.check_path(loaded.model)
    if inpaint is not None and sampler != "ancestral":
        raise ValueError("--inpaint takes the ancestral sampler; leave --sampler out")
    if impute is not None:
        others = (inpaint, condition, n != 64, guidance != 1, sampler != "ancestral", as_modelled)
        if any(others) or out is None or out.suffix.lower() not in FILES:
            raise ValueError(
                "--impute completes a table into the .csv, .tsv, .parquet or .arrow file --out;"
                " of the other options only --steps, --grid, --seed and --particles go with it"
            )
        with process_group() as rank:
            loaded.model.to(place_of(device, rank == 0))
            times = grid_of(loaded, steps, grid)
            _complete_table(loaded, impute, out, times, particles, seed, rank == 0)
        return
    if as_modelled and not loaded.config.schema.columns:
        raise ValueError("--as-modelled is for tables; leave it out")
    if particles is not None:
        raise ValueError("--particles goes with --impute; leave it out")
    with process_group() as rank:
        labels = (
            None if condition is None else parse(condition, loaded.config.schema).expand(n, -1)
        )
        given = loaded.conditions(n, labels, seed)
        model = guided(loaded.model, guidance)
        if guidance != 1 and rank == 0:
            say(f"guidance {guidance:g}: not draws from the model whose bound evaluate states")
        pixels = read_masked(inpaint, mask, loaded.config.schema) if inpaint and mask else None
        place = place_of(device, rank == 0)
        loaded.model.to(place)  # the best grid is measured there too
        way = order or grid_of(loaded, steps, grid)
        model.to(place)
        track = tracker("sample")
        if pixels is not None and isinstance(way, TimeGrid):
            x, known = pixels[0].expand(n, *model.shape), pixels[1]
            x = samplers.complete(model, x, known, way, seed, rounds, track, given)
        else:
            sampled = sampler_of(sampler, way)

            def draw(rows: "Tensor", seed: int) -> "Tensor":
                return sampled(model, len(rows), seed, track, rows_of(given, rows))

            schema = loaded.config.schema
            if schema.columns and not as_modelled:
                x = within(draw, n, schema, seed, say if rank == 0 else str)
            else:
                x = draw(torch.arange(n), seed)
        if rank:
            return
        if out is None:
            sys.stdout.write(save(x.cpu()).decode())
            return
        content = save(x.cpu())
        write(out, content)
        say_of_formulas(out, content)
        say(f"{n} samples in {out}")


def _complete_table(
    run: "Run",
    table: Path,
    out: Path,
    times: "TimeGrid",
    particles: int | None,
    seed: int,
    tell: bool,
) -> None:
    """Write the table to `out`, with its missing cells drawn."""
    from nelbo._utils.files import write
    from nelbo._utils.progress import tracker
    from nelbo.data.tabular.tables import to_bytes
    from nelbo.sampling.imputation import impute

    options = {} if particles is None else {"particles": particles}
    told = say if tell else str
    track = tracker("impute")
    drawn = impute(
        run.model, run.config.schema, table, times, seed=seed, track=track, tell=told, **options
    )
    if not tell:
        return
    content = to_bytes(drawn, out.suffix.lower())
    write(out, content)
    say_of_formulas(out, content)
    say(f"{drawn.height} rows in {out}")
