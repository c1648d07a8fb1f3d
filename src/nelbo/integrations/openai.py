"""Models trained with OpenAI's improved-diffusion and guided-diffusion.

The weights are a file `NAME.pt`, and the flags of the training a JSON object `NAME.json` beside it
with the same names. The meaning of the flags (Nichol & Dhariwal 2021):

    noise_schedule       linear: β from 0.1/T to 20/T, so 1e-4 to 0.02 at T = 1000;
                         cosine: α_t = cos²( (t/T + 0.008)/1.008 · π/2 ), β at most 0.999
    learn_sigma          σ² between β̃_t and β_t (equation 15), else β_t; sigma_small: β̃_t
    predict_xstart       the network predicts x̂, else ε̂
    rescale_timesteps    the time input of the network is t 1000/T, else t, from 0
    timestep_respacing   number of steps to keep

Their evaluation clips x̂ (`clip_denoised`), which is a different model from the one trained; here
it is requested by clip=True.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils import limits
from nelbo._utils.tensor_files import put_weights
from nelbo._utils.validation import Record
from nelbo.data.schema import Schema
from nelbo.diffusion.gaussian import Levels
from nelbo.diffusion.times import TimeGrid
from nelbo.integrations.checkpoints import tensors_of, without_prefix
from nelbo.integrations.conditions import check_label
from nelbo.integrations.configs import read_json
from nelbo.integrations.denoisers import Variance, assemble, signal_left
from nelbo.integrations.external import Foreign, scaled
from nelbo.integrations.noise_levels import gamma_of, spaced
from nelbo.integrations.openai_unet import GROUPS, Architecture, UNet

Size = Annotated[int, Ge(1), Le(limits.STEPS)]
#: -1 for a size that follows from others
Derived = Annotated[int, Ge(-1), Le(limits.STEPS)]


@dataclass(frozen=True)
class Flags(Record):
    """The flags of a training script that determine the model, with the scripts' defaults."""

    image_size: Size = 64
    num_channels: Size = 128
    num_res_blocks: Size = 2
    num_heads: Size = 4
    num_heads_upsample: Derived = -1
    num_head_channels: Derived = -1
    attention_resolutions: str = "16,8"
    channel_mult: str = ""
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    diffusion_steps: Size = 1000
    noise_schedule: Literal["linear", "cosine"] = "linear"
    timestep_respacing: str = ""
    predict_xstart: bool = False
    rescale_timesteps: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads_upsample", "num_head_channels"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be positive, or -1 to follow the others; got 0")


#: flags that only affect training
IGNORED = {"dropout", "use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16"}
#: flags that imply another model, and what to do instead
REFUSED = {
    "clip_denoised": "x̂ is clipped: another model than the one trained; leave the flag out and ask"
    " for clip=True (after the path: ,clip=yes)",
    "classifier_scale": "guidance by a classifier changes every step: it is another model, which"
    " has no bound without the classifier; leave the flag out",
    "use_ddim": "a deterministic sampler has no bound; leave the flag out for ancestral sampling",
    "large_size": "a super-resolution model is of P(x|small image), which is not supported",
    "small_size": "a super-resolution model is of P(x|small image), which is not supported",
}
MULTIPLIERS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
CLASSES = 1000
FIRST = "input_blocks.0.0.weight"  # name of the first weight of every U-Net


def load(
    path: str | Path,
    *,
    flags: Mapping[str, object] | None = None,
    steps: int | None = None,
    clip: bool | None = None,
    label: int | None = None,
    check: bool = True,
) -> Foreign:
    """Load the model in a file of weights. No code in the file is executed.

    Args:
        path: a state dict, .pt or .safetensors.
        flags: flags of the training script; by default those in the .json beside the file.
        steps: number of steps of the model; by default all of the schedule.
        clip: clip x̂ to [-1, 1].
        label: the class, for a class-conditional model.
        check: refuse a network that fits another reading better by far, as for `wrap`; False makes
            a note of it.

    Raises:
        FileNotFoundError: no such file, or no flags beside it.
        ValueError: the weights do not belong to these flags, or the flags have no bound.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a state dict, .pt or .safetensors")
    checked = check_flags(_flags_beside(path) if flags is None else flags)
    weights, prefix_notes = without_prefix(tensors_of(path))
    if FIRST not in weights:
        raise ValueError(f"{path} holds no state dict of a U-Net; save network.state_dict() there")
    with limits.within_file(weights, path):
        network = UNet(architecture(checked, *_sizes(weights)))
    put_weights(network, weights, str(path))
    name = f"openai:{path}"
    network.eval()

    def of_steps(steps: int | None) -> Foreign:
        found = build(
            network,
            checked,
            name,
            steps=steps,
            clip=bool(clip),
            label=label,
            check=check,
            channels=network.architecture.inputs,
            classes=network.architecture.classes,
        )
        return replace(found, notes=(*found.notes, *prefix_notes), of_steps=of_steps)

    return of_steps(steps)


def build(
    network: nn.Module,
    flags: Mapping[str, object] | Flags,
    name: str = "openai",
    *,
    steps: int | None = None,
    clip: bool = False,
    label: int | None = None,
    check: bool = True,
    channels: int = 3,
    classes: int | None = CLASSES,
) -> Foreign:
    """Return the model of a network in memory, network(y, time) or network(y, time, label).

    Args:
        network: in evaluation mode.
        flags: of its training script.
        name: of the source, for messages.
        steps: number of steps of the model; by default those of the flags.
        clip: clip x̂ to [-1, 1].
        label: the class, for a class-conditional model.
        check: as for `load`.
        channels: of its images.
        classes: their number, where the flags say that it takes one.
    """
    flags = flags if isinstance(flags, Flags) else check_flags(flags)
    total, size = flags.diffusion_steps, flags.image_size
    betas = named_betas(flags.noise_schedule, total)
    classes = classes if flags.class_cond else None
    shape = (channels, size, size)
    check_label(label, classes)
    if label is not None:
        network = Labelled(network, label)
    variance: Variance = "small" if flags.sigma_small else "large"
    variance = "learned-range" if flags.learn_sigma else variance
    places = torch.arange(total)
    keep = spaced(total, _respacing(flags) if steps is None else steps)
    model = assemble(
        network,
        shape,
        predicts="data" if flags.predict_xstart else "noise",
        gamma=gamma_of(betas=betas),
        times=places * (1000 / total) if flags.rescale_timesteps else places,
        variance=variance,
        scaling=Levels(256),
        clip=clip,
        keep=keep,
        decoder="step" if len(keep) > 1 else "evidence",
    )
    model.check = check
    notes = (
        f"ancestral sampling in {len(keep)} of {total} steps, variance {variance},"
        f" x̂ {'' if clip else 'not '}clipped",
        scaled(Levels(256)),
        *signal_left(model),
    )
    schema = Schema("levels", shape, 256)
    return Foreign(name, model, schema, TimeGrid.uniform(len(keep)), Path(name).name, notes)


class Labelled(nn.Module):
    """network(y, time) for a fixed class."""

    def __init__(self, network: nn.Module, label: int) -> None:
        super().__init__()
        self.network, self.label = network, label

    @override
    def forward(self, y: Tensor, time: Tensor) -> Tensor:
        output: Tensor = self.network(y, time, torch.full((len(y),), self.label, device=y.device))
        return output


def check_flags(flags: Mapping[str, object]) -> Flags:
    """Return the flags with defaults for missing ones.

    Raises:
        ValueError: an unknown flag, one of the wrong type, or one of `REFUSED`.
    """
    for name, reason in REFUSED.items():
        if flags.get(name):
            raise ValueError(f"{name}={flags[name]}: {reason}")
    aside = IGNORED | REFUSED.keys()
    checked = Flags.from_dict({k: v for k, v in flags.items() if k not in aside}, "the flags")
    if checked.diffusion_steps != 1000 and "rescale_timesteps" not in flags:
        raise ValueError(
            "rescale_timesteps must be given where diffusion_steps is not 1000: improved-diffusion"
            " has it true, guided-diffusion false"
        )
    return checked


def architecture(flags: Flags, channels: int = 3, classes: int = CLASSES) -> Architecture:
    """Return the architecture that the flags describe.

    Args:
        flags: of the training.
        channels: of the images; 3 in the scripts, but not in all copies of them.
        classes: number of classes, if there are any.
    """
    size = flags.image_size
    multipliers: tuple[float, ...] | None = MULTIPLIERS.get(size)
    if flags.channel_mult:
        multipliers = tuple(_integers("channel_mult", flags.channel_mult))
    if multipliers is None:
        known = ", ".join(map(str, MULTIPLIERS))
        raise ValueError(f"image_size {size} needs channel_mult; the sizes without are {known}")
    widths = [int(m * flags.num_channels) for m in multipliers]
    if any(width < 1 or width % GROUPS for width in widths):
        raise ValueError(
            f"num_channels times channel_mult must be multiples of {GROUPS}; got"
            f" {', '.join(map(str, widths))}"
        )
    sides = _integers("attention_resolutions", flags.attention_resolutions)
    heads, heads_up, per_head = (
        flags.num_heads,
        flags.num_heads_upsample,
        flags.num_head_channels,
    )
    return Architecture(
        channels=flags.num_channels,
        outputs=2 * channels if flags.learn_sigma else channels,
        blocks=flags.num_res_blocks,
        multipliers=multipliers,
        attention=tuple(size // side for side in sides),
        heads=heads,
        heads_up=heads if heads_up == -1 else heads_up,
        head_channels=None if per_head == -1 else per_head,
        scale_shift=flags.use_scale_shift_norm,
        updown=flags.resblock_updown,
        qkv_first=flags.use_new_attention_order,
        classes=classes if flags.class_cond else None,
        inputs=channels,
    )


def named_betas(name: str, steps: int) -> list[float]:
    """Return β_1..β_T.

    >>> [round(beta, 6) for beta in named_betas("linear", 1000)[::999]]
    [0.0001, 0.02]
    """
    if name == "linear":
        return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64).tolist()
    if name != "cosine":
        raise ValueError(f"noise_schedule must be linear or cosine; got {name!r}")

    def alpha(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha((i + 1) / steps) / alpha(i / steps), 0.999) for i in range(steps)]


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f'{name} must be integers as in "16,8"; got {text!r}') from None


def _respacing(flags: Flags) -> int:
    """Return the number of steps that the flags keep."""
    text = flags.timestep_respacing
    if not text:
        return flags.diffusion_steps
    if not text.isdecimal():
        raise ValueError(
            f'timestep_respacing must be one number of steps, as in "250"; got {text!r}: "ddim" is'
            " a deterministic sampler without a bound, and sections are not supported"
        )
    return int(text)


def _sizes(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of channels and of classes, which no flag says, in the weights."""
    first, labels = weights.get(FIRST), weights.get("label_emb.weight")
    channels = 3 if first is None or first.ndim != 4 else first.shape[1]
    return channels, CLASSES if labels is None or labels.ndim != 2 else labels.shape[0]


def _flags_beside(path: Path) -> dict[str, object]:
    return read_json(
        path.with_suffix(".json"),
        "write there the flags the model was trained with, as in"
        ' {"image_size": 64, "num_channels": 128, "learn_sigma": true}',
    )
