"""The command line. Each command imports what it needs, so `nelbo --help` is quick."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

import nelbo
from nelbo import config

if TYPE_CHECKING:
    from torch import Tensor

    from nelbo.checkpoint import Run
    from nelbo.estimate import Grid, Times
    from nelbo.evaluate import Evaluation
    from nelbo.model import Model
    from nelbo.tighter import Tighter

app = App(
    name="nelbo",
    help="Diffusion models you can measure in bits.",
    version=f"nelbo {nelbo.__version__}",
)


def _preset(name: str) -> Parameter:
    """An option that follows the preset; shows the value of auto for small images."""
    value = vars(config.ModelConfig()).get(name, vars(config.TrainConfig()).get(name))
    return Parameter(show_default=lambda _: f"by preset, {value}")


@Parameter(name="*")
@dataclass
class TrainOptions:
    """In place of the preset's values; the defaults shown are those of auto for small images.

    Attributes
    ----------
    steps
        Training steps.
    batch
        Examples per step.
    lr
        Peak learning rate.
    warmup
        Steps until the peak.
    weight_decay
        Decoupled weight decay of the network's matrices.
    ema
        Decay of the moving average of the weights.
    dropout
        Share of hidden units dropped.
    width
        Channels, or hidden units.
    depth
        Residual blocks.
    members
        Networks that are trained apart and averaged; each takes its part of the batch.
    network
        conv is for images, unet for large ones; transformer for text or anything of few
        dimensions; mlp for anything.
    process
        gaussian noise; or absorbing, for integers: symbols are masked.
    schedule
        -log SNR over time. betas is the classic one, 1000 β's from 1e-4 to 0.02. learned takes the
        interior that makes the draws of the bound vary least, learned-ends also learns the ends.
    gamma_min
        -log SNR at the data's end.
    gamma_max
        -log SNR at the noise's end.
    head
        What the network predicts: levels, one number for each level; level-curves, the weights of
        a few curves over many levels; or noise, data, velocity; symbols of the absorbing process.
    step
        Reverse step P(z_s|z_t): what a bound or sample in few steps uses.
    decoder
        P(x|z_1).
    optimizer
        adamw; or muon, whose steps of hidden matrices are orthogonal: large images and text learn
        in fewer.
    objective
        The bound, or a re-weighting of its diffusion term.
    times
        Of the training steps: stratified over the batch; importance, more often where the loss is
        large, learned while training; or iid. The loss has the same mean with each.
    cross_entropy
        Weight of the decoder's loss at the drawn times.
    augment
        Share of the images that are moved a little in training; the network is told which.
    label_dropout
        Share of the examples whose labels are dropped, so that sample --guidance has P(x) as well.
    clip
        Largest norm of the gradient.
    evaluate_every
        Steps between validations; each saves the run.
    seed
        Everything random follows from it.
    """

    steps: Annotated[int | None, _preset("steps")] = None
    batch: Annotated[int | None, _preset("batch")] = None
    lr: Annotated[float | None, _preset("lr")] = None
    warmup: Annotated[int | None, _preset("warmup")] = None
    weight_decay: Annotated[float | None, _preset("weight_decay")] = None
    ema: Annotated[float | None, _preset("ema")] = None
    dropout: Annotated[float | None, _preset("dropout")] = None
    width: Annotated[int | None, _preset("width")] = None
    depth: Annotated[int | None, _preset("depth")] = None
    members: Annotated[int | None, _preset("members")] = None
    network: Annotated[config.Network | None, _preset("network")] = None
    process: Annotated[config.Process | None, _preset("process")] = None
    schedule: Annotated[config.Schedule | None, _preset("schedule")] = None
    gamma_min: Annotated[float | None, _preset("gamma_min")] = None
    gamma_max: Annotated[float | None, _preset("gamma_max")] = None
    head: Annotated[config.Head | None, _preset("head")] = None
    step: Annotated[config.Step | None, _preset("step")] = None
    decoder: Annotated[config.Decoder | None, _preset("decoder")] = None
    optimizer: Annotated[config.Optimizer | None, _preset("optimizer")] = None
    objective: Annotated[config.Objective | None, _preset("objective")] = None
    times: Annotated[config.Times | None, _preset("times")] = None
    cross_entropy: Annotated[float | None, _preset("cross_entropy")] = None
    augment: Annotated[float | None, _preset("augment")] = None
    label_dropout: Annotated[float | None, _preset("label_dropout")] = None
    clip: Annotated[float | None, _preset("clip")] = None
    evaluate_every: Annotated[int | None, _preset("evaluate_every")] = None
    seed: Annotated[int | None, _preset("seed")] = None

    def given(self) -> dict[str, str | int | float]:
        return {name: value for name, value in vars(self).items() if value is not None}


@app.command
def train(
    data: str | None = None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    steps_of_bound: int | None = None,
    preset: Annotated[config.Preset | None, Parameter(show_default=lambda _: "auto")] = None,
    levels: int | None = None,
    size: int | None = None,
    schema: Path | None = None,
    condition: Annotated[list[str] | None, Parameter(negative="")] = None,
    minutes: float | None = None,
    device: str = "cpu",
    options: TrainOptions | None = None,
) -> None:
    """Train a model of DATA by maximising the ELBO, into a new run folder.

    Ctrl-C saves the run and --resume continues it exactly. The weights with the best validation
    bound are kept.

    Parameters
    ----------
    data
        "digits" (scikit-learn's 8x8 images), a .npy, .npz or idx file (integers N x ... are
        modelled as levels, floats as densities), a table (.csv, .tsv, .parquet, .arrow), a .tar
        shard of PNG or JPEG images, a .txt file,
        or a folder of images, idx files, shards or .txt files.
    out
        Folder of the new run.
    resume
        Run to continue, in place of DATA and --out; of the options only --steps may go with it.
    steps_of_bound
        With --resume: fine-tune for the bound with this number of steps, as a new run that starts
        from the best weights of the old one; --out names it, RUN-8steps and the like by default.
    preset
        auto is quick, best takes longer for a tighter bound.
    levels
        Number of levels of integer data; found in the data where left out. Images of 16 bits have
        65536, or with 256 here their upper 8 bits. Text is read as characters, with 256 levels as
        bytes.
    size
        Side in pixels to which images are cropped and resized; or symbols in a chunk of text.
    schema
        A JSON file with the columns of a table that are to be used, such as
        [{"name": "age", "kind": "rounded", "precision": 5}]; what it leaves open is found in the
        cells. nelbo inspect --json writes one.
    condition
        Name of a label of the data, such as class for the sub-folders of a folder of images; may
        be repeated. The model is then one of P(x|class): evaluate states its bound, given the
        labels of the data, and sample takes the labels wanted.
    minutes
        About how long to train, in place of --steps: as many steps as fit by the time of a few.
        The run keeps their number, so that it is continued exactly.
    device
        Where to train, such as cpu or cuda.
    options
        In place of the preset's.
    """
    from nelbo._interrupt import Interrupted
    from nelbo.finetune import fine_tune, name_of
    from nelbo.train import resume as continue_run
    from nelbo.train import train as start

    given = options.given() if options else {}
    path = resume or out
    if steps_of_bound is not None:
        if resume is None:
            raise ValueError(
                "--steps-of-bound fine-tunes a run; name it with --resume:"
                f" nelbo train --resume RUN --steps-of-bound {steps_of_bound}"
            )
        path = out = out or name_of(resume, steps_of_bound)
    if resume is not None:
        asked = {
            "DATA": data,
            "--out": out if steps_of_bound is None else None,
            "--preset": preset,
            "--levels": levels,
            "--size": size,
            "--schema": schema,
            "--condition": condition,
            "--minutes": minutes,
        }
        others = [name for name, value in asked.items() if value is not None]
        others += [f"--{name.replace('_', '-')}" for name in given if name != "steps"]
        if others:
            raise ValueError(
                f"--resume continues a run as it was configured; {others[0]} cannot go with it"
            )
    elif data is None or out is None:
        raise ValueError(
            "train needs DATA and --out, or --resume; try: nelbo train digits --out runs/digits"
        )
    try:
        if resume is not None:
            steps = None if options is None else options.steps
            if steps_of_bound is None:
                run = continue_run(resume, steps=steps, device=device, progress=True)
            else:
                run = fine_tune(
                    resume, steps_of_bound, out, steps=steps, device=device, progress=True
                )
        else:
            run = start(
                str(data),
                Path(str(out)),
                preset=preset or "auto",
                levels=levels,
                size=size,
                schema=schema,
                condition=condition or (),
                minutes=minutes,
                device=device,
                progress=True,
                **given,
            )
    except Interrupted:
        _say(f"stopped and saved; continue with: nelbo train --resume {quote(str(path))}")
        raise
    _say(f"kept the weights {run.weights}. Next: nelbo evaluate {quote(str(run.path))}")


@app.command
def inspect(
    data: str,
    *,
    levels: int | None = None,
    size: int | None = None,
    schema: Path | None = None,
    json: bool = False,
) -> None:
    """Show what DATA is: the columns of a table, and what makes a likelihood of it meaningless;
    of a compressed file its header, bits/dim, bound and blocks.

    Parameters
    ----------
    data
        As for train; or a .nlb file.
    levels
        As for train.
    size
        As for train.
    schema
        As for train.
    json
        Print one JSON object, which --schema takes; to leave a column out, delete it there.
    """
    from nelbo import inspection

    if data.endswith(".nlb"):
        from nelbo import show
        from nelbo.codec import files

        report = files.report(Path(data).read_bytes())
        if json:
            print(_json(show.of_compressed(report)))
        else:
            show.compressed(data, report)
        return
    found = inspection.inspect(data, levels=levels, size=size, schema=schema)
    if json:
        print(_json(found.to_dict()))
    else:
        inspection.show(found)


@app.command
def evaluate(
    run: str,
    *,
    data: str | None = None,
    split: str | None = None,
    steps: int | None = None,
    grid: Literal["best", "uniform"] = "best",
    calls: int | None = None,
    target_error: float | None = None,
    variates: bool = True,
    importance_samples: int | None = None,
    ode: bool = False,
    dequantise: Literal["encoder", "truncated-normal", "uniform"] = "encoder",
    tolerance: float = 1e-4,
    save: Path | None = None,
    columns: bool = False,
    seed: int = 0,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """State the bound on -log P(x) of a data set, with its error and its price.

    Under torchrun its processes share the work; the number stays the same.

    Parameters
    ----------
    run
        A run folder; or another library's model, diffusers:FOLDER or openai:FILE, with --data.
    data
        Other data, of the kind the run was trained on; the run's own where left out.
    split
        train, validation or test; all for data without splits. The default is test for the run's
        own data, and all of other data.
    steps
        The bound of the model with this number of steps; continuous time where left out.
    grid
        The times of the steps: best for this run, found once and kept in its folder; or uniform.
    calls
        Network calls per example, at most, the pilot's included; 24 where left out.
    target_error
        In place of --calls: the Monte Carlo standard error to reach, in the unit of the result.
    variates
        Take off each draw what is known of it without the network. Without is quicker for many
        levels and a small network, and then more calls may pay.
    importance_samples
        K, for the tighter bound of K importance-weighted samples at --steps T: K T calls each.
    ode
        The likelihood by the probability-flow ODE instead, to two tolerances (extra: ode).
    dequantise
        How --ode passes from the data to the first latent.
    tolerance
        Of --ode, absolute and relative, per example; the looser one is 10 times as large.
    save
        A .npz file for the bound, its error and its terms of each example, in nats.
    columns
        Also what each column of a table costs, in --steps, or 32 where left out, of at most 1000
        examples.
    seed
        Everything random follows from it.
    device
        Where to run the network.
    json
        Print one JSON object.
    """
    from nelbo import integrations, show
    from nelbo._processes import together
    from nelbo._progress import tracker
    from nelbo.checkpoint import check_writable, load, read_config, write
    from nelbo.dequantise import DEQUANTISERS
    from nelbo.evaluate import evaluate as bound
    from nelbo.model import find_device
    from nelbo.tighter import evaluate_flow, evaluate_importance

    _only_one_way(steps, calls, target_error, importance_samples, ode)
    if columns and (
        json or integrations.is_foreign(run) or not read_config(Path(run)).schema.columns
    ):
        raise ValueError("--columns prints what the columns of a run's table cost; leave it out")
    if save is not None:
        if save.suffix != ".npz":
            raise ValueError(f"--save writes a .npz file; got {save}")
        check_writable(save)
    with together() as rank:
        track = tracker("evaluate") if rank == 0 else iter
        if integrations.is_foreign(run):
            foreign = integrations.load(run, steps=steps)
            for note in foreign.notes if rank == 0 else ():
                _say(note)
            model, weights, known = foreign.model, foreign.weights, None
            times: Times | None = foreign.times
            schema = None
            x, split = foreign.examples(data, split)
        else:
            loaded = load(run)
            weights, schema = loaded.weights, loaded.config.schema
            model, x, split = loaded.law(data, split)
            known = None if data else loaded.examples(split="train")[0]
            times = None if steps is None else _grid(loaded, steps, grid)
        model.to(find_device(device))
        find: Callable[..., Evaluation | Tighter]
        if ode:
            way = DEQUANTISERS[dequantise]
            find = partial(evaluate_flow, dequantiser=way, tolerance=tolerance)
        elif importance_samples is not None and times is not None:
            find = partial(evaluate_importance, times=times, samples=importance_samples)
        else:
            find = partial(bound, times=times, calls=calls, target_error=target_error)
            find = partial(find, per_example=save is not None)
            find = partial(find, known=known, variates=variates)
        result = find(model, x, seed=seed, weights=weights, split=split, track=track)
        if rank == 0:
            if save is not None:
                write(save, show.npz(result))
            if json:
                print(_json(result.to_dict() | show.of_text(result, schema)))
            else:
                show.result(result, schema)
            if columns:
                _show_columns(model, loaded, x, steps or 32, grid, seed)


def _show_columns(
    model: "Model", run: "Run", x: "Tensor", steps: int, grid: str, seed: int
) -> None:
    """What each column of a table costs under the model of its rows."""
    from nelbo import show
    from nelbo.report.dimensions import by_column, by_dimension

    known, few = run.config.schema.columns, slice(1000)
    (bound,) = by_dimension(model.at(few), x[few], _grid(run, steps, grid), seed=seed)
    names = [column.name for column in known]
    show.columns(names, by_column(-bound.elbo, known), "nats", steps)


def _only_one_way(
    steps: int | None,
    calls: int | None,
    target_error: float | None,
    importance_samples: int | None,
    ode: bool,
) -> None:
    """Refuse options that contradict each other."""
    if importance_samples is not None and steps is None:
        raise ValueError(
            "--importance-samples weights whole paths of a finite number of steps; give --steps"
        )
    if ode and (steps is not None or importance_samples is not None):
        raise ValueError("--ode is of continuous time; leave --steps and --importance-samples out")
    if (ode or importance_samples is not None) and (calls or target_error):
        raise ValueError(
            "--calls and --target-error are for the bound; --ode is priced by --tolerance, and"
            " --importance-samples by K times T"
        )


@app.command
def sample(
    run: Path,
    *,
    out: Path | None = None,
    n: int = 64,
    steps: int = 32,
    grid: Literal["best", "uniform"] = "best",
    seed: int = 0,
    sampler: Literal["ancestral", "flow"] = "ancestral",
    condition: Annotated[list[str] | None, Parameter(negative="")] = None,
    guidance: float = 1.0,
    inpaint: Path | None = None,
    mask: Path | None = None,
    rounds: int = 1,
    impute: Path | None = None,
    particles: int | None = None,
    device: str = "cpu",
) -> None:
    """Draw new examples from a run.

    Of a conditional run they are draws of P(x|c); without --condition each c is that of a training
    example, drawn by the seed.

    Parameters
    ----------
    run
        A run folder.
    out
        A .png file (a grid of images), a .txt file, or a .npz file (array x in the units of the
        data); left out, text is printed.
    n
        Number of examples.
    steps
        Number of steps, each one network call.
    grid
        Their times: best for this run, found once and kept in its folder; or uniform.
    seed
        Everything random follows from it.
    sampler
        ancestral draws from the model that evaluate --steps measures; flow follows the
        deterministic probability flow.
    condition
        The label of all samples, such as 3; NAME=VALUE, repeated, where there are several.
    guidance
        How many times the label counts, at two network calls a step. Only 1 draws from the model
        whose bound evaluate states; at any other value the samples are of another law.
    inpaint
        An image of the size of the run's, whose masked part is drawn given the rest: exactly so
        for the absorbing process, in approximation for the Gaussian.
    mask
        With --inpaint: an image of the same size, white where to draw and black where to keep.
    rounds
        With --inpaint: how often each step is made; more make both parts fit better.
    impute
        A table with the columns of the run's, whose missing cells are drawn given the others of
        their row; --out has all else as it was. Other --seed, other draws.
    particles
        With --impute: candidates for each row, 32 where left out. The draws near the model's own
        conditional law as they become many, at --steps network calls each.
    device
        Where to run the network.
    """
    from nelbo import pictures
    from nelbo import sample as samplers
    from nelbo._progress import tracker
    from nelbo.checkpoint import check_writable, load, write
    from nelbo.condition import guided, parse
    from nelbo.data.encoded import read_masked
    from nelbo.data.tables import FILES, to_bytes
    from nelbo.impute import impute as fill
    from nelbo.model import find_device

    loaded = load(run)
    save = pictures.saver(out, loaded.config.schema)
    if out is not None:
        check_writable(out)
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; got {n}")
    if (inpaint is None) != (mask is None) or (inpaint is None and rounds != 1):
        raise ValueError("--inpaint, --mask and --rounds go together; give an image and a mask")
    if inpaint is not None and sampler != "ancestral":
        raise ValueError("--inpaint takes the ancestral sampler; leave --sampler out")
    if impute is not None:
        others = (inpaint, condition, n != 64, guidance != 1, sampler != "ancestral")
        if any(others) or out is None or out.suffix.lower() not in FILES:
            raise ValueError(
                "--impute completes a table into the .csv, .tsv, .parquet or .arrow file --out;"
                " of the other options --steps, --grid, --seed and --particles go with it"
            )
        times = _grid(loaded, steps, grid)
        loaded.model.to(find_device(device))
        options = {} if particles is None else {"particles": particles}
        drawn = fill(loaded, impute, times, seed=seed, track=tracker("impute"), **options)
        write(out, to_bytes(drawn, out.suffix.lower()))
        _say(f"{drawn.height} rows in {out}")
        return
    if particles is not None:
        raise ValueError("--particles goes with --impute; leave it out")
    labels = None if condition is None else parse(condition, loaded.config.schema).expand(n, -1)
    model = guided(loaded.law_of_samples(n, labels, seed), guidance)
    if guidance != 1:
        _say(f"guided {guidance:g} times: not draws of the model whose bound evaluate states")
    given = read_masked(inpaint, mask, loaded.config.schema) if inpaint and mask else None
    times = _grid(loaded, steps, grid)
    model.to(find_device(device))
    track = tracker("sample")
    if given is not None:
        x, known = given[0].expand(n, *model.shape), given[1]
        x = samplers.complete(model, x, known, times, seed, rounds, track)
    else:
        draw = samplers.ancestral if sampler == "ancestral" else samplers.probability_flow
        x = draw(model, n, times, seed, track)
    if out is None:
        sys.stdout.write(save(x.cpu()).decode())
        return
    write(out, save(x.cpu()))
    _say(f"{n} samples in {out}")


@app.command
def score(
    run: Path,
    data: str | None = None,
    *,
    out: Path,
    score: Literal["bound", "complexity", "typicality"] = "bound",
    against: Literal["validation", "train", "test"] = "validation",
    split: str | None = None,
    calls: int | None = None,
    figure: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Say how strange each example of DATA is to a run: nats, error, rank and percentile.

    Parameters
    ----------
    run
        A run folder.
    data
        Examples of the kind the run was trained on; the run's own test split where left out.
    out
        A .csv file, one line per example in the order of the data. Of a table each line names the
        three columns that contribute most, and by how many nats more than usual; that takes 32
        network calls more for each row.
    score
        Larger is stranger: the bound on -log P(x); complexity, the bound less the length of a
        lossless code of the example; typicality, how far the bound is from the usual.
    against
        The split of the run's own data among which rank and percentile are told. An example of
        the same law ranks anywhere in validation, but too high among what was trained on.
    split
        Of DATA: all of it where left out.
    calls
        Network calls per example, at most, at least 8; 24 where left out.
    figure
        A .png file: the scores of the run's splits and of DATA.
    seed
        Everything random follows from it.
    device
        Where to run the network.
    """
    from nelbo import scores
    from nelbo._progress import tracker
    from nelbo.checkpoint import check_writable, load, write
    from nelbo.data.conform import SPLITS
    from nelbo.model import find_device

    for path, suffix in ((out, ".csv"), (figure, ".png")):
        if path is not None:
            if path.suffix.lower() != suffix:
                raise ValueError(f"the file must end in {suffix}; got {str(path)!r}")
            check_writable(path)
    loaded = load(run)
    schema, place = loaded.config.schema, find_device(device)
    model, x, name = loaded.law(data, split)
    reference = loaded.law(split=against)[:2]
    loaded.model.to(place)
    track = tracker("score")
    scorer = scores.Scorer(score, schema, *reference, calls=calls, seed=seed, track=track)
    scored = scorer(model, x)
    write(out, scored.csv())
    if figure is not None:
        each = {k: scorer(*scores.first(*loaded.law(split=k)[:2])).score for k in SPLITS}
        write(figure, scores.histogram(each | {name: scored.score}, f"{score}, nats"))
    strange = int((scored.percentile > 95).sum())
    _say(f"{strange} of {len(x)} examples are above 95 % of the {against} split; {out}")


@app.command
def compress(
    run: Path,
    data: str,
    *,
    out: Path,
    steps: int = 32,
    grid: Literal["best", "uniform"] = "best",
    effort: int = 1,
    block: int = 1000,
    verify: bool = True,
    precision: Literal["float64", "float32"] = "float64",
    device: str = "cpu",
) -> None:
    """Compress DATA without loss; the file is as long as the bound of the run says.

    It needs constriction: pip install 'nelbo[codec]'.

    Parameters
    ----------
    run
        A run folder of discrete data. decompress needs it too: it is no part of the file.
    data
        What the run's schema can hold: a .npy or .npz file, a .png file or a folder of them (of
        any size), a table, a .txt file or a folder of them.
    out
        A .nlb file that does not exist.
    steps
        Of the bound that is coded, T: more make a smaller file, and take longer.
    grid
        The times of the steps: best for this run, or uniform.
    effort
        Code each example in this many ways and keep the shortest: the file falls below the bound,
        at so many times the work here and none for decompress.
    block
        About how many examples are independent of all others.
    verify
        Decompress and compare before the file is written.
    precision
        Of the network. float32 is faster, and decodes only on the same machine and versions.
    device
        Where to run the network; decompress on the same kind.
    """
    from nelbo.checkpoint import load
    from nelbo.codec.files import compress_file
    from nelbo.model import find_device

    loaded = load(run)
    loaded.model.to(find_device(device))
    with _progress("compress") as progress:
        found = compress_file(
            loaded,
            data,
            out,
            lambda run: _grid(run, steps, grid),
            effort=effort,
            block=block,
            precision=precision,
            verify=verify,
            progress=progress,
        )
    for note in found.notes:
        _say(f"note: {note}")
    _say(
        f"{found.original} bytes as {found.compressed} in {out}: {found.bits_per_dim:.3f} bits/dim"
        " in all"
    )


@app.command
def decompress(
    run: Path, file: Path, *, out: Path, salvage: bool = False, device: str = "cpu"
) -> None:
    """Restore the data in a compressed FILE: exactly, or not at all.

    Exit codes: 2 for what the command line has wrong, 3 for a damaged file, 4 for another run, 5
    for a machine or versions on which it would not decode to the right data.

    Parameters
    ----------
    run
        The run folder with which it was compressed.
    file
        A .nlb file.
    out
        Where the data go, of the kind they had; it does not exist.
    salvage
        Of a damaged file, restore the blocks that are whole and name the others; exit code 3.
    device
        Where to run the network, of the kind on which it was compressed.
    """
    from nelbo.checkpoint import load
    from nelbo.codec.errors import Damaged
    from nelbo.codec.files import decompress_file
    from nelbo.model import find_device

    loaded = load(run)
    loaded.model.to(find_device(device))
    with _progress("decompress") as progress:
        found = decompress_file(loaded, file, out, salvage=salvage, progress=progress)
    _say(f"{len(found.x)} of {found.header.examples} examples in {out}")
    if found.lost:
        lost = ", ".join(f"{first}..{first + count - 1}" for first, count in found.lost)
        raise Damaged(f"{file} is damaged: lost are the examples {lost}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Yields what makes, of a total, a bar that is told each increment."""
    from nelbo._progress import progress_bar

    with ExitStack() as stack:

        def start(total: int) -> Callable[[int], None]:
            update, so_far = stack.enter_context(progress_bar(what, total)), [0]

            def advance(done: int) -> None:
                so_far[0] += done
                update(so_far[0], "")

            return advance

        yield start


@app.command
def report(run: Path, *, out: Path | None = None, seed: int = 0) -> None:
    """Write a self-contained HTML page about a run.

    Parameters
    ----------
    run
        A run folder.
    out
        The page; report.html in the run folder where left out.
    seed
        Everything random follows from it.
    """
    from nelbo.checkpoint import check_writable, load
    from nelbo.report import report as make

    loaded, page = load(run), out or run / "report.html"
    check_writable(page)
    make(loaded, page, seed=seed, progress=True)
    _say(f"open {page}")


def _grid(run: "Run", steps: int, grid: str) -> "Grid":
    """`steps` times: the best for the run, or uniform."""
    from nelbo._progress import tracker
    from nelbo.estimate import Grid
    from nelbo.grids import even_times

    if grid == "uniform":
        return Grid(even_times(run.model.process.schedule, steps, steps))
    return run.grid(steps, tracker("grid"))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, allow_nan=False)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the user can mend (ValueError, OSError) is one line and exit code 2, or the one that
    the error has; Ctrl-C is 130;
    anything else is a defect and keeps its traceback."""
    try:
        yield
    except CycloptsError as error:
        _fail(str(error).strip())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(place + (error.strerror or str(error)))
    except ValueError as error:
        _fail(str(error), getattr(error, "exit_code", 2))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail(f"out of memory: {error}; try a smaller --batch or --width")


def _fail(message: str, code: int = 2) -> None:
    _say(f"nelbo: {' '.join(message.split())}")
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` in place of the process's own."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a symbol shows a ?
    with _one_line_errors():
        app(arguments, exit_on_error=False, print_error=False)
