"""A reading of a network: what it takes, what its output means, and how it has seen the data.

    inputs     y = c(γ) z, and the time input at γ
    output     a parametrization of the output, or of minus the output
    data       scaled, turned or inverted

Its error at a noise level is ρ = E‖e - ê‖² / E‖e - (a z + b)‖², with the best straight line
a z + b, which is the same in all units of the data and all conventions for the latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nelbo._utils.numerics import over
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.parametrization import Parametrization
from nelbo.diffusion.schedules import Linear

if TYPE_CHECKING:
    from nelbo.integrations.adapters import Factor
    from nelbo.integrations.denoisers import WrappedModel

NEAR = math.log(1.5)  # distance of log-SNRs that count as the same
EVEN = 1000  # times in (0, 1] at which a network in continuous time is looked at


class Level(NamedTuple):
    """A noise level at which a network is called.

    Args:
        gamma: γ; NaN if it has no such level.
        time: its time input, ().
        process: a process that has this γ, by default one of no other steps,
        t: and its time there.
    """

    gamma: float
    time: Tensor
    process: GaussianDiffusion | None = None
    t: float = 0.0


#: returns the level of a network that is nearest to a γ
Clock = Callable[[float], Level]
#: of the time inputs of a network that takes no others
Ends = tuple[float, float]
#: parametrizations, and factors of the output (0 for none), by a name for a message
Outputs = dict[str, tuple[Parametrization, int]]


@dataclass(frozen=True)
class Reading:
    """Inputs of a network, with all outputs that it may have there.

    Args:
        clock: its levels.
        factor: c(γ).
        outputs: the outputs.
        embed: the data in the units of the network, from x.
        size: of a level in these units, in that of the reading that was given.
    """

    clock: Clock
    factor: "Factor"
    outputs: Outputs
    embed: Callable[[Tensor], Tensor] = field(repr=False)
    size: float = 1.0

    def inputs(self, gamma: float) -> tuple[float, float, float]:
        """Return the γ that is nearest to this one, c and the time input there."""
        level = self.clock(gamma)
        scale = self.factor(torch.tensor(level.gamma, dtype=torch.float64)).item()
        return level.gamma, scale, level.time.item()

    def errors(
        self, model: "WrappedModel", batch: Batch, noise: Tensor, gamma: float
    ) -> dict[str, Tensor]:
        """Return mean square errors of e, (B,), over that of the best line a z + b, by name.

        There are none if the network has no such noise level. They are NaN where a line fits
        exactly.
        """
        wanted = gamma + 2 * math.log(self.size)
        level = self.clock(wanted)
        if not abs(level.gamma - wanted) < NEAR:
            return {}
        e = self.embed(batch.x).double()
        given = torch.full((len(e),), level.gamma, dtype=torch.float64, device=e.device)
        z = over((-given).sigmoid().sqrt(), e) * e + over(given.sigmoid().sqrt(), e) * noise
        adapter = model.network.under(
            self.factor, lambda gamma: level.time.to(gamma.device).expand_as(gamma)
        )
        like = next(adapter.parameters())
        inputs = [z, given] + ([] if batch.condition is None else [batch.condition])
        output = adapter(*(v.to(like) for v in inputs)).double()
        process = level.process or GaussianDiffusion(Linear(level.gamma, level.gamma + 1))
        t = torch.full_like(given, level.t)
        line, found = _error_of_a_line(e, z), {}
        for name, (head, sign) in self.outputs.items():
            own = output if head.outputs > 1 else point(output, z)
            e_hat = head.read(sign * own, z, t, process, torch.float64).e_hat
            found[name] = (e - e_hat).square().flatten(1).mean(1) / line
        return found


def point(output: Tensor, z: Tensor) -> Tensor:
    """Return the output without a variance."""
    return output[..., 0] if output.ndim > z.ndim else output


def _error_of_a_line(e: Tensor, z: Tensor) -> Tensor:
    """Return the mean square error of the best line a z + b, a scalar; NaN if it is exact."""
    e, z = e - e.mean(), z - z.mean()
    error = e.square().mean() - (e * z).mean().square() / z.square().mean()
    return torch.where(error > 1e-12, error, torch.nan)


def said_clock(model: "WrappedModel") -> Clock:
    """Return the levels of a network as they were given."""
    schedule, start = model.process.schedule, 0.0
    count = schedule.steps
    if count is None:
        count, start = EVEN, schedule.start
    part = torch.arange(1, count + 1, dtype=torch.float64, device=model.device) / count
    t = start + (1 - start) * part
    gammas, times = schedule(t), model.network.inputs_at(model.process.log_snr_input(t))[1]

    def levels(gamma: float) -> Level:
        i = int((gammas - gamma).abs().argmin())
        return Level(gammas[i].item(), times[i], model.process, t[i].item())

    return levels


def table_clock(gammas: Tensor) -> Clock:
    """Return the levels γ_1..γ_T of a network whose time inputs are 0..T-1."""

    def levels(gamma: float) -> Level:
        i = (gammas - gamma).abs().argmin()
        return Level(gammas[i].item(), i)

    return levels


def counted_clock(clock: Clock, steps: int) -> Clock:
    """Return the levels of a table with their places, from 0, as time inputs."""

    def levels(gamma: float) -> Level:
        found = clock(gamma)
        return Level(found.gamma, torch.tensor(round(found.t * steps) - 1))

    return levels


def renamed_clock(
    clock: Clock, as_other: Callable[[float], float], as_own: Callable[[float], float]
) -> Clock:
    """Return the levels of the same numbers and times under another name of the numbers."""

    def levels(gamma: float) -> Level:
        found = clock(as_own(gamma))
        return Level(as_other(found.gamma), found.time)

    return levels


def free_clock(time: Callable[[float], float], known: Ends | None) -> Clock:
    """Return the levels of a network that takes any, with a function of γ as its time input.

    Args:
        time: the function.
        known: the ends of the times, if these are places in a table, beyond which it must not be
            called, truncated or rounded.
    """

    def levels(gamma: float) -> Level:
        value = time(gamma)
        taken = known is None or known[0] - 0.5 <= value <= known[1]
        return Level(gamma if taken else math.nan, torch.tensor(value, dtype=torch.float64))

    return levels
