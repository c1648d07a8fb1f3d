"""Models of the latents of diffusers' variational autoencoders, measured on images.

An AutoencoderKL has an encoder q(z|x) and decodes z to an image; the network and its scheduler are
a diffusion prior of e = (z - shift_factor) scaling_factor. The law of the pixels about the decoded
image is of no file: its scale is fitted to images that are not measured, or given.
"""

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo.data.schema import Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.latent import LAWS, LatentModel, PixelLaw
from nelbo.integrations.external import Foreign

VARIATIONAL = "AutoencoderKL"
LAW = re.compile(rf"({'|'.join(LAWS)})(:channels|:(\d*\.?\d+))?")
SHOWN = "law=laplace (or gaussian, logistic), law=laplace:channels or law=laplace:0.05"


class Encoder(nn.Module):
    """The mean and the log-variance of q(z|x) of an AutoencoderKL, in the halves of channels."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    @override
    def forward(self, images: Tensor) -> Tensor:
        found = cast(Any, self.vae).encode(images).latent_dist
        return torch.cat([found.mean, found.logvar], 1)


class Decoder(nn.Module):
    """The image of latents z by an AutoencoderKL."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    @override
    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = cast(Any, self.vae).decode(z).sample
        return image


def refusal(kind: str) -> str:
    """Return why there is no bound of images through an autoencoder of a class."""
    if "KL" in kind:
        return f"the autoencoder {kind} is not supported; {VARIATIONAL} is"
    return (
        f"the encoder of a {kind} is deterministic: q(z|x) is a point, whose density is infinite,"
        f" and so is the bound; an encoder with a variance, as of an {VARIATIONAL}, has one"
    )


def scaling_of(vae: nn.Module, about: dict[str, object]) -> Affine:
    """Return the map from latents z to e, (z - shift)/scale.

    Args:
        vae: an AutoencoderKL.
        about: config of the network of the prior.

    Raises:
        ValueError: the network is not of these latents.
    """
    config = dict(vae.config)  # type: ignore[arg-type]
    kind = str(config.get("_class_name", type(vae).__name__))
    if kind != VARIATIONAL:
        raise ValueError(f"the model is of the latents of an autoencoder, and {refusal(kind)}")
    channels = config["latent_channels"]
    if about.get("in_channels") != channels:
        raise ValueError(
            f"the network takes {about.get('in_channels')} channels, and the latents of the"
            f" autoencoder have {channels}; networks that take more, as for inpainting, have no"
            " bound"
        )
    factor = float(config["scaling_factor"])
    shift: Tensor | float = float(config.get("shift_factor") or 0.0)
    scale: Tensor | float = 1 / factor
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift, spread = (
            torch.tensor(config[f"latents_{name}"], dtype=torch.float64).reshape(-1, 1, 1)
            for name in ("mean", "std")
        )
        scale = spread / factor
    return Affine(shift, scale)


def through(found: Foreign, vae: nn.Module, levels: Levels | Affine, law: str | None) -> Foreign:
    """Return a model of images from that of their latents.

    Args:
        found: the model of the latents.
        vae: an AutoencoderKL.
        levels: of the images, as the autoencoder sees them.
        law: of the pixels: a key of LAWS, followed by ":channels" for a scale of each channel or
            by ":0.05" for this scale; by default the best on images that are not measured.
    """
    match = LAW.fullmatch(law or "")
    if law and not match:
        raise ValueError(f"law, the distribution of the pixels, must be {SHOWN}; got {law!r}")
    family, rest, scale = match.groups() if match else ("", "", None)
    config = dict(vae.config)  # type: ignore[arg-type]
    prior = found.model.diffusion
    _, *sides = prior.shape
    longer = 2 ** (len(config["block_out_channels"]) - 1)
    shape = (int(config["in_channels"]), *(longer * side for side in sides))
    pixels = PixelLaw(levels, family or "gaussian", float(scale) if scale else 0.1)
    model = LatentModel(Encoder(vae), Decoder(vae), pixels, prior, shape)
    latents = "x".join(map(str, prior.shape))
    note = (
        f"a bound on images through the {VARIATIONAL}: the diffusion model is of {latents}"
        " latents, the encoder draws them, and the pixels are distributed around the decoder's"
        " image"
    )

    def fit(batch: Batch) -> str:
        note = "" if found.fit is None else f"{found.fit(model.latents_of(batch))}; "
        if not scale:
            model.fit_law(batch.x, family or None, rest == ":channels")
            note += f"the distribution of the pixels is {model.law}; "
        return note.removesuffix("; ")

    return Foreign(
        found.name,
        model,
        Schema("levels", shape, levels.count),
        found.times,
        found.weights,
        (note, *found.notes),
        found.condition,
        None if scale and found.fit is None else fit,
        nothing=found.nothing,
    )
