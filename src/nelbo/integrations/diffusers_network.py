"""Networks of diffusers: the shape that they take, their classes and prompts, and how they are
called."""

from inspect import signature

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo.integrations.conditions import (
    LABELS,
    Condition,
    Given,
    check_label,
    check_labels,
)
from nelbo.integrations.configs import Config, positive

#: keywords of the networks' prompts
PROMPTS, POOLED = "encoder_hidden_states", "pooled_projections"
MASK = "encoder_attention_mask"  # of the tokens of prompts, where the network takes one


class Plain(nn.Module):
    """network(y, time) -> (B, C, ...), for a fixed class if given, with the first `keep`
    channels."""

    def __init__(
        self, network: nn.Module, label: int | None = None, keep: int | None = None
    ) -> None:
        super().__init__()
        self.network, self.label, self.keep = network, label, keep

    @override
    def forward(self, y: Tensor, time: Tensor, **given: Tensor) -> Tensor:
        if self.label is not None:
            given[LABELS] = torch.full((len(y),), self.label, device=y.device)
        # the second argument of some transformers is the condition
        named = "timestep" in [*signature(self.network.forward).parameters][2:]
        place = () if named else (time,)
        if named:
            given["timestep"] = time
        output: Tensor = self.network(y, *place, return_dict=False, **given)[0]
        return output[:, : self.keep]


def check_call(network: nn.Module) -> None:
    """Raise ValueError if a network takes more than images and their conditions."""
    if "img_ids" in signature(network.forward).parameters:
        raise ValueError(
            f"a {type(network).__name__} takes packed latents with their places, and some of its"
            " kind are distilled from guidance, for which there is no P(x|prompt): wrap a function"
            " that packs them with nelbo.integrations.wrap(.., predicts='flow', sigmas=..,"
            " conditioned_on='embedding')"
        )


def condition_of(
    network: nn.Module, about: Config, condition: Condition | None, label: int | None
) -> Given | None:
    """Return the condition of a network as it takes it, None where it takes none.

    Raises:
        ValueError: it is missing, left over, or not what the network takes.
    """
    classes, width = classes_of(about), _width_of_prompts(about)
    if width is not None and condition is None:
        raise ValueError(
            "the model is of P(x|prompt): give condition=embeddings of the prompts, (N, L,"
            f" {width}), those of the empty prompt for P(x|no prompt), or the prompts themselves"
            " to the pipeline in memory"
        )
    if label is not None or condition is None:
        check_label(label, classes)
    if condition is None:
        return None
    if label is not None or (classes is None and width is None):
        why = "label is one for all" if label is not None else "the model has none"
        raise ValueError(f"the condition is not used, because {why}; leave it out")
    given = Given.of(condition, LABELS if width is None else PROMPTS)
    if classes is not None:
        check_labels(given, LABELS, classes)
    needs = [name for name in (PROMPTS, POOLED) if name in signature(network.forward).parameters]
    needs = needs if width is not None else []
    if about.get("addition_embed_type") == "text_time":
        needs.append("added_cond_kwargs.text_embeds")
    elif about.get("addition_embed_type") is not None or about.get("time_cond_proj_dim"):
        raise ValueError(
            "the network takes more than prompts (addition_embed_type or a guidance scale); wrap"
            " it with nelbo.integrations.wrap(..., conditioned_on=)"
        )
    needs += sizes_of(about, 1.0)
    if missing := [name for name in needs if name not in given.values]:
        raise ValueError(
            f"the condition lacks {', '.join(missing)}: give a mapping of"
            f" {', '.join(needs)} to arrays"
        )
    takes = signature(network.forward).parameters
    for name in given.values:
        if name.partition(".")[0] not in takes:
            raise ValueError(f"a {type(network).__name__} takes no condition {name!r}")
    prompts = given.values.get(PROMPTS)
    if prompts is not None and (prompts.ndim != 3 or prompts.shape[2] != width):
        raise ValueError(
            f"embeddings of prompts must be (N, L, {width}), or (1, L, {width}) for all; got"
            f" {tuple(prompts.shape)}"
        )
    return given


def _width_of_prompts(about: Config) -> int | None:
    """Return the width of the embeddings of prompts that a network takes, None if it takes
    none."""
    if about.get("caption_channels") is not None:  # of PixArt
        return positive(about, "caption_channels")
    for name in ("joint_attention_dim", "encoder_hid_dim", "cross_attention_dim"):
        if about.get(name) is not None and "norm_type" not in about:  # a DiT has one, unused
            return positive(about, name)
    return None


def sizes_of(about: Config, side: float) -> dict[str, list[float]]:
    """Return the sizes of images that a network takes beside prompts, by its keywords.

    They are those of a whole square image: of the original, the corner of the crop, and the target
    (SDXL); or its height and width, and their ratio (PixArt).
    """
    given = "added_cond_kwargs"
    if about.get("addition_embed_type") == "text_time":
        return {f"{given}.time_ids": [side, side, 0.0, 0.0, side, side]}
    additional = about.get("use_additional_conditions")
    if about.get("caption_channels") is not None and (
        about.get("sample_size") == 128 if additional is None else additional
    ):
        return {f"{given}.resolution": [side, side], f"{given}.aspect_ratio": [1.0]}
    return {}


def shape_of(about: Config) -> tuple[int, ...]:
    """Return the shape (C, H, W) of one example."""
    size = about.get("sample_size")
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ValueError(f"the network's sample_size must be its side in pixels; got {size!r}")
    pixels = tuple(map(int, sides))
    blocks = about.get("block_out_channels")
    halvings = len(blocks) - 1 if isinstance(blocks, list | tuple) and blocks else 0
    if any(side % 2**halvings for side in pixels):
        raise ValueError(
            f"the network halves its images {halvings} times, and sample_size {size} is no"
            f" multiple of {2**halvings}: it was trained at another, so set sample_size to that"
        )
    return (positive(about, "in_channels"), *pixels)


def classes_of(about: Config) -> int | None:
    """Return the number of classes of a label, or None."""
    if about.get("class_embed_type") is not None:
        raise ValueError(
            f"class_embed_type {about['class_embed_type']!r} takes no label; wrap the network with"
            " nelbo.integrations.wrap"
        )
    if about.get("caption_channels") is not None:  # of PixArt, whose embeddings are of no class
        return None
    if about.get("num_embeds_ada_norm") is not None:
        return positive(about, "num_embeds_ada_norm") + 1  # the last is "no class"
    return None if about.get("num_class_embeds") is None else positive(about, "num_class_embeds")
