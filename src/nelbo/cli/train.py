"""`nelbo train`: train a new run, continue one, or fine-tune one."""

from dataclasses import fields, make_dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

from cyclopts import Group, Parameter

from nelbo.cli.common import Labels, Splits, say
from nelbo.models.config import ModelConfig
from nelbo.training.config import TrainConfig
from nelbo.training.presets import Preset

if TYPE_CHECKING:
    from nelbo.runs.run import Run


CHANGEABLE = ("steps", "patience", "shard")  # options that may change when a run is continued


#: options of TrainConfig that change how it is computed, and not what
COMPUTING = (
    "accumulate",
    "precision",
    "compile",
    "checkpoint_activations",
    "shard",
    "deterministic",
    "nonfinite",
)
RUN, DATA, MODEL, TRAINING, COMPUTATION = (
    Group(name, sort_key=i)
    for i, name in enumerate(("Run", "Data", "Model", "Training", "Computation"))
)


def _options(config: type[ModelConfig] | type[TrainConfig], group: Group) -> Any:  # noqa: ANN401
    """Return a dataclass of the fields of a configuration, with its help, all of them optional.

    Defaults are set by the preset; the help shows those of auto for small images. A list of times
    is no option.
    """
    kinds = get_type_hints(config)
    options: list[tuple[str, object, object]] = []
    for each in fields(config):
        if get_origin(kinds[each.name]) is tuple:
            continue
        parameter = Parameter(
            group=COMPUTATION if each.name in COMPUTING else group,
            show_default=partial(_shown, each.default),
            negative="",
        )
        options.append((each.name, Annotated[kinds[each.name] | None, parameter], None))
    made = make_dataclass(f"{config.__name__}Options", options)
    made.__doc__, made.__module__ = config.__doc__, __name__
    return Parameter(name="*")(made)


def _shown(default: object, given: object) -> str:
    return f"by preset, {default}"


ModelOptions = _options(ModelConfig, MODEL)
TrainOptions = _options(TrainConfig, TRAINING)


def train(
    data: Annotated[str | None, Parameter(group=DATA)] = None,
    *,
    out: Annotated[Path | None, Parameter(group=RUN)] = None,
    resume: Annotated[Path | None, Parameter(group=RUN)] = None,
    steps_of_bound: Annotated[int | None, Parameter(group=RUN)] = None,
    preset: Annotated[Preset | None, Parameter(group=RUN, show_default=lambda _: "auto")] = None,
    minutes: Annotated[float | None, Parameter(group=RUN)] = None,
    device: Annotated[str, Parameter(group=RUN)] = "auto",
    levels: Annotated[int | None, Parameter(group=DATA)] = None,
    size: Annotated[int | None, Parameter(group=DATA)] = None,
    schema: Annotated[Path | None, Parameter(group=DATA)] = None,
    condition: Annotated[Labels | None, Parameter(group=DATA)] = None,
    splits: Annotated[Splits | None, Parameter(group=DATA)] = None,
    tokenizer: Annotated[str | None, Parameter(group=DATA)] = None,
    model: ModelOptions | None = None,  # type: ignore[valid-type]
    training: TrainOptions | None = None,  # type: ignore[valid-type]
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
        Run to continue, instead of DATA and --out; only --steps, --patience, --shard, --device and
        --steps-of-bound can be given with it.
    steps_of_bound
        With --resume: fine-tune for the bound with this number of steps, as a new run that starts
        from the best weights of the old one. Its folder is --out, by default RUN-8steps for 8.
    preset
        auto is quick; best takes longer for a tighter bound.
    levels
        Number of levels of integer data; by default inferred from the data. Images of 16 bits have
        65536 levels, or 256 here for their upper 8 bits. Text is read as characters, or with 256
        levels as bytes.
    size
        Side in pixels to which images are cropped and resized; or symbols in a chunk of text.
    schema
        A JSON file with the columns of a table to use, such as
        [{"name": "age", "kind": "rounded", "precision": 5}]; anything left open is inferred from
        the cells. nelbo inspect --json writes such a file.
    condition
        Name of a label of the data, such as class for the sub-folders of a folder of images; may
        be repeated. The model is then one of P(x|class): evaluate measures it given the labels of
        the data, and sample takes a --condition.
    tokenizer
        Read text as tokens: bpe:4096 learns 4096 byte-pair tokens from the training split and
        keeps them in the run; or a folder with a tokenizer.json. By default characters.
    minutes
        Approximate training time, instead of --steps: as many steps as fit, estimated by timing a
        few. Their number is stored in the run, so that it can be continued exactly.
    device
        Where to train: cpu, cuda, cuda:1; auto is cuda, if there is one.
    model
        Options of the model, in place of the preset's.
    training
        Options of the training, in place of the preset's.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.signals import Interrupted
    from nelbo.runs.finetune import fine_tune, name_of
    from nelbo.runs.train import resume as continue_run
    from nelbo.runs.train import train as start

    parts = [vars(part) for part in (model, training) if part is not None]
    given = {name: v for part in parts for name, v in part.items() if v is not None}
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
                tokenizer=tokenizer,
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
            "--tokenizer": tokenizer,
            "--minutes": minutes,
        }
        others = [name for name, value in asked.items() if value is not None]
        others += [f"--{name.replace('_', '-')}" for name in given if name not in CHANGEABLE]
        if others:
            raise ValueError(
                f"--resume continues a run as it was configured; leave {others[0]} out"
            )
        if steps_of_bound is not None and (kept := sorted(given.keys() - {"steps"})):
            raise ValueError(f"fine-tuning keeps --{kept[0]} of the run; leave it out")
        path = resume if steps_of_bound is None else out or name_of(resume, steps_of_bound)

        def work(progress: bool) -> "Run":
            if steps_of_bound is None:
                return continue_run(path, **given, device=device, progress=progress)
            return fine_tune(
                resume,
                steps_of_bound,
                path,
                steps=given.get("steps"),
                device=device,
                progress=progress,
            )

    with process_group() as rank:
        tell = say if rank == 0 else lambda line: None
        try:
            run = work(rank == 0)
        except Interrupted:
            tell(f"stopped and saved; continue with: nelbo train --resume {quote(str(path))}")
            raise
        tell(f"kept the {run.weights}. Next: nelbo evaluate {quote(str(run.path))}")
