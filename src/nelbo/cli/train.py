"""`nelbo train`: train a new run, continue one, or fine-tune one."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nelbo.cli.common import Labels, Splits, say
from nelbo.models.config import Decoder, Head, ModelConfig, Network, Process, Schedule, Step
from nelbo.training import config
from nelbo.training.presets import Preset

if TYPE_CHECKING:
    from nelbo.runs.run import Run


CHANGEABLE = ("steps", "patience", "shard")  # options that may change when a run is continued


def _preset(name: str) -> Parameter:
    """Return an option whose default is set by the preset; help shows auto's for small images."""
    value = vars(ModelConfig()).get(name, vars(config.TrainConfig()).get(name))
    return Parameter(show_default=lambda _: f"by preset, {value}", negative="")


@Parameter(name="*")
@dataclass
class TrainOptions:
    """Override values of the preset; the defaults shown are those of auto for small images.

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
        Fraction of hidden units dropped.
    width
        Channels, or hidden units.
    depth
        Residual blocks.
    members
        Networks that are trained separately and averaged; each takes its part of the batch.
    network
        conv is for images, unet for large ones; transformer for text or anything of few
        dimensions; mlp for anything.
    process
        gaussian adds noise; absorbing, for integers, masks symbols.
    schedule
        -log SNR over time. betas is the classic one, 1000 β's from 1e-4 to 0.02. learned finds the
        interior that minimises the variance of the bound; learned-ends also learns the ends.
    gamma_min
        -log SNR at the data's end.
    gamma_max
        -log SNR at the noise's end.
    head
        Output of the network: levels, one number for each level; level-curves, the weights of
        a few curves over many levels; or noise, data, velocity; symbols for the absorbing process.
    step
        Reverse step P(z_s|z_t), used for bounds and samples in few steps.
    decoder
        P(x|z_1).
    optimizer
        adamw; or muon, which orthogonalises the updates of hidden matrices: large images and text
        need fewer steps.
    objective
        The bound, or a re-weighting of its diffusion term.
    times
        Times of the training steps: stratified over the batch; importance, more often where the
        loss is large, learned while training; or iid. The mean loss is the same with each.
    cross_entropy
        Weight of the decoder's loss at the drawn times.
    augment
        Fraction of the images that are transformed in training; the transform is an input of the
        network.
    label_dropout
        Fraction of the examples whose labels are dropped, so that the network also learns P(x),
        which sample --guidance needs.
    clip
        Maximal norm of the gradient.
    evaluate_every
        Steps between validations; each saves the run.
    patience
        Validations in a row without a better bound after which training ends; 0 for never. By
        default 10 for tables and 0 for all else.
    accumulate
        Number of parts into which each process divides its examples of a batch, one after the
        other: less memory, and the same loss.
    precision
        Precision of the network in training, bf16 by autocast; weights, bound and validation
        stay in full precision.
    compile
        Compile the network: quicker steps on a GPU, after some minutes.
    checkpoint_activations
        Store only the input of each block and compute the rest again for the gradient: less
        memory, and the same gradient.
    shard
        Divide weights, gradients, moments and averages among the processes, for a network larger
        than one device (docs/scale.md).
    deterministic
        Use only algorithms that give the same bits each time, also on a GPU.
    nonfinite
        Handling of a step whose loss or gradient is not finite: stop, with the best weights
        kept; or skip it, at most 9 times in a row.
    seed
        Seed of everything random.
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
    network: Annotated[Network | None, _preset("network")] = None
    process: Annotated[Process | None, _preset("process")] = None
    schedule: Annotated[Schedule | None, _preset("schedule")] = None
    gamma_min: Annotated[float | None, _preset("gamma_min")] = None
    gamma_max: Annotated[float | None, _preset("gamma_max")] = None
    head: Annotated[Head | None, _preset("head")] = None
    step: Annotated[Step | None, _preset("step")] = None
    decoder: Annotated[Decoder | None, _preset("decoder")] = None
    optimizer: Annotated[config.Optimizer | None, _preset("optimizer")] = None
    objective: Annotated[config.Objective | None, _preset("objective")] = None
    times: Annotated[config.Times | None, _preset("times")] = None
    cross_entropy: Annotated[float | None, _preset("cross_entropy")] = None
    augment: Annotated[float | None, _preset("augment")] = None
    label_dropout: Annotated[float | None, _preset("label_dropout")] = None
    clip: Annotated[float | None, _preset("clip")] = None
    evaluate_every: Annotated[int | None, _preset("evaluate_every")] = None
    patience: Annotated[int | None, _preset("patience")] = None
    accumulate: Annotated[int | None, _preset("accumulate")] = None
    precision: Annotated[config.Precision | None, _preset("precision")] = None
    compile: Annotated[bool | None, _preset("compile")] = None
    checkpoint_activations: Annotated[bool | None, _preset("checkpoint_activations")] = None
    shard: Annotated[bool | None, _preset("shard")] = None
    deterministic: Annotated[bool | None, _preset("deterministic")] = None
    nonfinite: Annotated[config.Nonfinite | None, _preset("nonfinite")] = None
    seed: Annotated[int | None, _preset("seed")] = None

    def given(self) -> dict[str, str | int | float]:
        """Return the options that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def train(
    data: str | None = None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    steps_of_bound: int | None = None,
    preset: Annotated[Preset | None, Parameter(show_default=lambda _: "auto")] = None,
    levels: int | None = None,
    size: int | None = None,
    schema: Path | None = None,
    condition: Labels | None = None,
    splits: Splits | None = None,
    minutes: float | None = None,
    device: str = "auto",
    options: TrainOptions | None = None,
) -> None:
    """Train a model of DATA by maximising the ELBO, into a new run folder.

    Ctrl-C saves the run and --resume continues it exactly. The weights with the best validation
    bound are kept. Under torchrun the processes share each batch (docs/scale.md).

    Parameters
    ----------
    data
        "digits" (scikit-learn's 8x8 images), a .npy, .npz or idx file (integers N x ... are
        modelled as levels, floats as densities), a table (.csv, .tsv, .parquet, .arrow), a .tar
        shard of images, a .txt file,
        or a folder of images, idx files, shards or .txt files; or such files at a URL, as in
        s3://bucket/data/*.tar.
    out
        Folder of the new run.
    resume
        Run to continue, instead of DATA and --out; of the options only --steps, --patience,
        --shard and --device may go with it, and --steps-of-bound.
    steps_of_bound
        With --resume: fine-tune for the bound with this number of steps, as a new run that starts
        from the best weights of the old one; --out names it, by default RUN-8steps for 8 steps.
    preset
        auto is quick; best takes longer for a tighter bound.
    levels
        Number of levels of integer data; by default inferred from the data. Images of 16 bits have
        65536 levels, or 256 here for their upper 8 bits. Text is read as characters, or with 256
        levels as bytes.
    size
        Side in pixels to which images are cropped and resized; or symbols in a chunk of text.
    schema
        A JSON file with the columns of a table to be used, such as
        [{"name": "age", "kind": "rounded", "precision": 5}]; anything left open is inferred from
        the cells. nelbo inspect --json writes one.
    condition
        Name of a label of the data, such as class for the sub-folders of a folder of images; may
        be repeated. The model is then one of P(x|class): evaluate states its bound given the
        labels of the data, and sample takes the labels wanted.
    minutes
        Approximate training time, instead of --steps: as many steps as fit, estimated by timing a
        few. Their number is stored in the run, so that it can be continued exactly.
    device
        Where to train: cpu, cuda, cuda:1; auto is cuda, if there is one.
    options
        Override values of the preset.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.signals import Interrupted
    from nelbo.runs.finetune import fine_tune, name_of
    from nelbo.runs.train import resume as continue_run
    from nelbo.runs.train import train as start

    chosen = options or TrainOptions()
    given = chosen.given()
    if resume is None:
        if steps_of_bound is not None:
            raise ValueError(
                "--steps-of-bound fine-tunes a run; name it with --resume:"
                f" nelbo train --resume RUN --steps-of-bound {steps_of_bound}"
            )
        if data is None or out is None:
            raise ValueError(
                "train needs DATA and --out, or --resume; try:"
                " nelbo train digits --out runs/digits"
            )
        path = out

        def work(progress: bool) -> "Run":
            return start(
                data,
                out,
                preset=preset or "auto",
                levels=levels,
                size=size,
                schema=schema,
                condition=condition or (),
                splits=splits,
                minutes=minutes,
                device=device,
                on_event=None,
                progress=progress,
                **given,
            )

    else:
        asked = {
            "DATA": data,
            "--out": out if steps_of_bound is None else None,
            "--preset": preset,
            "--levels": levels,
            "--size": size,
            "--schema": schema,
            "--condition": condition,
            "--splits": splits,
            "--minutes": minutes,
        }
        others = [name for name, value in asked.items() if value is not None]
        others += [f"--{name.replace('_', '-')}" for name in given if name not in CHANGEABLE]
        if others:
            raise ValueError(
                f"--resume continues a run as it was configured; {others[0]} cannot go with it"
            )
        if steps_of_bound is not None and (kept := sorted(given.keys() - {"steps"})):
            raise ValueError(f"--{kept[0]} is as in the run that is fine-tuned; leave it out")
        path = resume if steps_of_bound is None else out or name_of(resume, steps_of_bound)

        def work(progress: bool) -> "Run":
            if steps_of_bound is None:
                return continue_run(
                    path,
                    steps=chosen.steps,
                    patience=chosen.patience,
                    shard=chosen.shard,
                    device=device,
                    progress=progress,
                )
            return fine_tune(
                resume, steps_of_bound, path, steps=chosen.steps, device=device, progress=progress
            )

    with process_group() as rank:
        tell = say if rank == 0 else lambda line: None
        try:
            run = work(rank == 0)
        except Interrupted:
            tell(f"stopped and saved; continue with: nelbo train --resume {quote(str(path))}")
            raise
        tell(f"kept the weights {run.weights}. Next: nelbo evaluate {quote(str(run.path))}")
