r"""A network of the user's own in a model: forward(z, log_snr, condition=None).

    z          z_t = √α_t e + √(1-α_t) ε, (B, *shape); e are levels scaled to -1..1, or real data
               standardised
    log_snr    log α_t/(1-α_t) = -γ(t), (B,)
    condition  (B, F), as in `run.batch()[0].condition`, see `nelbo.models.conditioning`; only of a
               conditional run, or with augmentation: otherwise there is no third argument

It returns ε̂, ê or v̂, (B, *shape), for head="noise", "data" or "velocity"; for head="levels", one
number for each of the K levels, (B, *shape, K), or (B, C K, H, W) for images (C, H, W), with the K
of a channel side by side.

A `UNet2DModel` of diffusers, forward(sample, timestep, class_labels), is called at

    timestep = 1000 (γ(t) - γ_min) / (γ_max - γ_min)

so 0..1000 is the range of the run's --gamma-min and --gamma-max, and with class K for an example
without a label. No file brings code: a saved run is loaded with the module given again.
"""

import copy
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.distributed import main_process_first, world
from nelbo._utils.tensor_files import OTHER
from nelbo.data.schema import Schema
from nelbo.diffusion.model import Model, measuring
from nelbo.models.config import CUSTOM, ModelConfig

#: a module, of which a copy is used; or a function without arguments that returns one
Network = nn.Module | Callable[[], nn.Module]
TIMES = 1000.0  # time inputs of a UNet2DModel lie in 0..TIMES
PROBE = 2  # examples of zeros on which a network is tried


def check_given(config: ModelConfig, network: Network | None, path: object) -> None:
    """Raise ValueError unless a network is given exactly if that of the run is the user's own.

    Args:
        config: of the run's model.
        network: as given.
        path: of the run, for the message.
    """
    if config.network == CUSTOM and network is None:
        raise ValueError(
            f"the network of {path} is a module of your own, which a run does not store: give it"
            f" in Python, as in nelbo.load({str(path)!r}, network=module) or nelbo.resume, and"
            " use the loaded run"
        )
    if config.network != CUSTOM and network is not None:
        raise ValueError(
            f"the network of {path} is nelbo's own, {config.network}, made from its"
            " configuration; leave network out"
        )


def mismatch(network: Network | None) -> str:
    """Return the likely cause of weights of other names or shapes than those of a run."""
    return OTHER if network is None else "the network given is not the one that was trained"


def instantiate(network: Network) -> nn.Module:
    """Return a module to train: a copy of the given one, or of what a function returns.

    All processes get the weights of the first.

    Raises:
        ValueError: it is neither, or has no weights.
    """
    made = network if isinstance(network, nn.Module) else None
    if made is None and callable(network):
        try:
            signature(network).bind()
        except TypeError as error:
            raise ValueError(
                "network must be a torch.nn.Module, or a function without arguments that returns"
                f" one; got {network!r}: {error}"
            ) from None
        made = network()
    if not isinstance(made, nn.Module):
        raise ValueError(
            "network must be a torch.nn.Module, or a function without arguments that returns one;"
            f" got {network!r}"
            + (f", which returned {type(made).__name__}" if callable(network) else "")
        )
    if next(made.parameters(), None) is None:
        raise ValueError(f"the network {type(made).__name__} has no weights to train")
    made = copy.deepcopy(made)
    if world()[1] > 1:
        made.load_state_dict(main_process_first(made.state_dict))
    return made


def adapted(network: nn.Module, config: ModelConfig, schema: Schema, outputs: int) -> nn.Module:
    """Return a user's network as one of `nelbo.diffusion.model.Model`.

    Args:
        network: see the module's docstring.
        config: with the range of γ.
        schema: of an example.
        outputs: numbers per dimension of the example.

    Raises:
        ValueError: a UNet2DModel has no such classes or times.
    """
    # diffusers need not be installed
    if type(network).__name__ == "UNet2DModel" and type(network).__module__.startswith("diffuse"):
        network = OfDiffusers(network, config.gamma_min, config.gamma_max, schema)
    return Custom(network, outputs)


class Custom(nn.Module):
    """A user's network, called with the log-SNR in place of γ.

    Args:
        network: forward(z, log_snr, condition=None).
        outputs: numbers per dimension of the example.
    """

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        given = () if condition is None else (condition,)
        output: Tensor = self.network(features, -level, *given)
        if self.outputs > 1 and isinstance(output, Tensor):
            batch, channels, *places = features.shape
            if output.shape == (batch, channels * self.outputs, *places):
                return output.unflatten(1, (channels, self.outputs)).movedim(2, -1)
        return output


class OfDiffusers(nn.Module):
    """A UNet2DModel of diffusers as forward(z, log_snr, condition=None).

    Args:
        network: the UNet2DModel.
        gamma_min: γ at time input 0.
        gamma_max: γ at time input 1000.
        schema: of an example; conditional on one label of classes, or on none.

    Raises:
        ValueError: its time input is no number in 0..1000, or it has other classes.
    """

    def __init__(
        self, network: nn.Module, gamma_min: float, gamma_max: float, schema: Schema
    ) -> None:
        super().__init__()
        self.network, self.gamma_min, self.gamma_max = network, gamma_min, gamma_max
        about = dict(network.config)  # type: ignore[arg-type]
        if about["time_embedding_type"] != "positional":
            raise ValueError(
                "a UNet2DModel is trained with time_embedding_type='positional'; got"
                f" {about['time_embedding_type']!r}; or put it into a module of your own,"
                " forward(z, log_snr, condition=None)"
            )
        labels = schema.condition
        self.classes = len(labels[0].classes) if labels else 0
        if len(labels) > 1 or (labels and not self.classes):
            raise ValueError(
                "a UNet2DModel takes one label of classes; the run is conditional on"
                f" {', '.join(label.describe() for label in labels)}"
            )
        wanted = self.classes + 1 if self.classes else None
        if (about["class_embed_type"], about["num_class_embeds"]) != (None, wanted):
            got = about["class_embed_type"] or about["num_class_embeds"]
            why = f"{self.classes} classes, and one more for no label" if wanted else "no label"
            raise ValueError(
                f"the UNet2DModel must have num_class_embeds={wanted}, for {why}; got {got!r}"
            )

    @override
    def forward(self, z: Tensor, log_snr: Tensor, condition: Tensor | None = None) -> Tensor:
        time = TIMES * (-log_snr - self.gamma_min) / (self.gamma_max - self.gamma_min)
        labels = {}
        if self.classes:
            if condition is None:
                condition = z.new_zeros(len(z), 1 + self.classes)
            one_hot = condition[:, 1:]
            known = one_hot.sum(1) > 0
            labels["class_labels"] = torch.where(known, one_hot.argmax(1), self.classes)
        elif condition is not None:
            raise ValueError("a UNet2DModel has no input for augmentation; leave augment out")
        output: Tensor = self.network(z, time, return_dict=False, **labels)[0]
        return output


def check_runs(model: Model, features: int) -> None:
    """Call a user's network once, so that what does not fit is said before any work.

    Args:
        model: with the network.
        features: numbers in the condition of an example; 0 if there is none.

    Raises:
        ValueError: the network fails, or its output has another shape or is not finite.
    """
    device = model.device
    z = torch.zeros(PROBE, *model.shape, dtype=torch.float64, device=device)
    t = torch.full((PROBE,), 0.5, dtype=torch.float64, device=device)
    condition = torch.zeros(PROBE, features, device=device) if features else None
    try:
        with measuring(model):
            found = model.predict(z, t, condition).e_hat
    except ValueError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        third = f", condition {(PROBE, features)}" if features else ""
        raise ValueError(
            f"the network failed on z {tuple(z.shape)}, log_snr ({PROBE},){third}:"
            f" {type(error).__name__}: {reason}; it is called as forward(z, log_snr"
            f"{', condition' if features else ''})"
        ) from error
    if not found.isfinite().all():
        raise ValueError("the output of the network is not finite on examples of zeros")
