"""The configuration of a model: names and sizes, as a run stores them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Ge, Le, Lt

from nelbo._utils.validation import Record

#: Names of parts, and the class or function of each; a line in a table registers a part. They are
#: imported when a model is built (`resolve`), so that `--help` loads no torch. A comment of
#: a table gives the arguments of the call; those of schedules are (gamma_min, gamma_max).
SCHEDULES = {
    "linear": "nelbo.diffusion.schedules:Linear",
    "cosine": "nelbo.diffusion.schedules:Cosine",
    "betas": "nelbo.diffusion.schedules:ddpm_betas",
    "learned": "nelbo.diffusion.schedules:LearnedMonotone",
    "learned-ends": "nelbo.diffusion.schedules:learned_endpoints",
    "linear-alpha": "nelbo.diffusion.schedules:linear_alpha",
    "quadratic-alpha": "nelbo.diffusion.schedules:quadratic_alpha",
    "cubic-alpha": "nelbo.diffusion.schedules:cubic_alpha",
}
#: processes of real numbers, and of integers as values: of (schedule, Affine or Levels)
VALUE_PROCESSES = {
    "gaussian": "nelbo.diffusion.gaussian:GaussianDiffusion",
}
#: processes of symbols: of (schedule, number of symbols), with shorter=True for texts and
#: also as_codes=True for tokens; see `SymbolProcess`
SYMBOL_PROCESSES = {
    "absorbing": "nelbo.diffusion.masked:MaskedDiffusion",
    "uniform": "nelbo.diffusion.uniform:UniformDiffusion",
}
#: parametrizations that predict one number for each dimension: of ()
POINT_HEADS = {
    "noise": "nelbo.diffusion.parametrization:EpsPrediction",
    "data": "nelbo.diffusion.parametrization:XPrediction",
    "velocity": "nelbo.diffusion.parametrization:VPrediction",
}
#: parametrizations that predict the probability of each level: of (values of the levels, shape)
LEVEL_HEADS = {
    "levels": "nelbo.diffusion.parametrization:LevelLogits",
    "level-curves": "nelbo.diffusion.parametrization:LevelCurves",
}
#: reverse kernels for any parametrization: of ()
STEPS = {
    "posterior": "nelbo.diffusion.reverse:Posterior",
    "beta": "nelbo.diffusion.reverse:Beta",
    "learned": "nelbo.diffusion.reverse:Learned",
    "optimal": "nelbo.diffusion.reverse:Optimal",
}
#: decoders into integers: `Decoder.of_levels` of the class
LEVEL_DECODERS = {
    "levels": "nelbo.diffusion.decoder:LevelDecoder",
    "evidence": "nelbo.diffusion.decoder:Evidence",
    "discretised-gaussian": "nelbo.diffusion.decoder:DiscretisedGaussian",
    "bernoulli": "nelbo.diffusion.decoder:Bernoulli",
}
#: networks: of (shape, channels, outputs, width, depth, dropout, conditions)
NETWORKS = {
    "conv": "nelbo.nn.conv:ConvNet",
    "unet": "nelbo.nn.unet:UNet",
    "mlp": "nelbo.nn.mlp:MLP",
    "transformer": "nelbo.nn.transformer:Transformer",
}
CUSTOM = "custom"  # the name of a network that is a module of the user's own

if TYPE_CHECKING:  # a type checker reads no table
    Process: TypeAlias = str
    Schedule: TypeAlias = str
    Head: TypeAlias = str
    Step: TypeAlias = str
    Decoder: TypeAlias = str
    Network: TypeAlias = str
else:
    Process = Literal[(*VALUE_PROCESSES, *SYMBOL_PROCESSES, "product")]
    Schedule = Literal[tuple(SCHEDULES)]
    Head = Literal[(*LEVEL_HEADS, *POINT_HEADS, "symbols", "columns")]
    Step = Literal[("mixture", *STEPS, "columns")]
    Decoder = Literal[(*LEVEL_DECODERS, "gaussian", "categorical", "columns")]
    Network = Literal[(*NETWORKS, "table", CUSTOM)]


#: a number of things, and a fraction that is less than all
Count = Annotated[int, Ge(1), Le(10**12)]
Fraction = Annotated[float, Ge(0), Lt(1)]
CLEAREST = -80.0  # -log SNR below which the SNR and its slope overflow float32 in training


@dataclass(frozen=True)
class ModelConfig(Record):
    """Names and sizes of a model, which `nelbo.models.build.build` makes.

    Args:
        process: gaussian adds noise; absorbing, for integers, masks symbols; uniform replaces them
            by any others.
        schedule: -log SNR over time. betas is the classic one, 1000 β's from 1e-4 to 0.02. learned
            finds the interior that minimises the variance of the bound; learned-ends also learns
            the ends.
        gamma_min: -log SNR at the data's end, -80 or more.
        gamma_max: -log SNR at the noise's end.
        head: Output of the network: levels, one number for each level; level-curves, the weights
            of a few curves over many levels; or noise, data, velocity; symbols for the processes
            absorbing and uniform.
        step: Reverse step P(z_s|z_t), used for bounds and samples in few steps.
        decoder: P(x|z_1).
        network: conv is for images, unet for large ones; transformer for text or anything of few
            dimensions; mlp for anything; custom is a module of your own, which only Python takes.
        width: Channels, or hidden units.
        depth: Residual blocks.
        dropout: Fraction of hidden units dropped.
        members: Networks that are trained separately and averaged; each takes its part of the
            batch.
    """

    process: Process = "gaussian"
    schedule: Schedule = "linear"
    gamma_min: Annotated[float, Ge(CLEAREST)] = -7.0
    gamma_max: float = 6.0
    head: Head = "levels"
    step: Step = "mixture"
    decoder: Decoder = "levels"
    network: Network = "conv"
    width: Count = 32
    depth: Count = 3
    dropout: Fraction = 0.1
    members: Count = 1
