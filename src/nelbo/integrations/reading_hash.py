"""The reading of a foreign network in words and numbers, for the hash of its model.

Its weights do not: two functions of a user, such as time inputs, may have one name, as all lambdas
do. So functions count by their values at fixed inputs, where the model uses them.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nelbo._utils.numerics import digest_of
from nelbo.diffusion.model import measuring

if TYPE_CHECKING:
    from nelbo.integrations.denoisers import WrappedModel

TIMES = 64  # at which functions are called, at most
NUMBERS = 64  # of x̂, at most
FEW = 3  # times at which x̂ is computed


def described(model: "WrappedModel") -> str:
    """Return a text that is another one for another reading of the same weights.

    It has the noise levels, the inputs and times of the network, the data as it sees them, x̂ of
    its output; and of a network without weights, for which nothing else stands, an output.
    """
    adapter, process, place = model.network, model.process, model.device
    most = process.schedule.steps or TIMES
    at = torch.arange(1, TIMES + 1, dtype=torch.float64, device=place) / TIMES
    t = ((at * most).ceil() / most).unique()
    gamma, time = adapter.inputs_at(process.log_snr_input(t))
    few = t[:: max(1, len(t) // FEW)]
    z = torch.linspace(-2, 2, model.dims, dtype=torch.float64, device=place)
    z = z.view(1, *model.shape).expand(len(few), *model.shape)
    output = torch.stack([z.flip(-1)] * model.head.outputs, -1).squeeze(-1)
    x_hat = model.head(output, z, few, process).e_hat.flatten()
    x_hat = x_hat[:: max(1, len(x_hat) // NUMBERS)]
    x = torch.arange(2, device=place).view(-1, *(1 for _ in model.shape)).expand(-1, *model.shape)
    levels = process.embed(x).flatten(1)[:, :: max(1, model.dims // NUMBERS)]
    values = [gamma, adapter.factor(gamma), time, levels, x_hat]
    if not model.conditioned_on:
        values += output_of(model, None)
    return digest_of(*values)


def output_of(model: "WrappedModel", condition: Tensor | None) -> list[Tensor]:
    """Return an output of a network without weights, for which nothing else stands; else none.

    Args:
        model: the model.
        condition: of one example, (1, F), for a model of P(x|c).
    """
    adapter, place = model.network, model.device
    if adapter.network.state_dict():
        return []
    t = torch.ones(1, dtype=torch.float64, device=place)
    z = torch.linspace(-2, 2, model.dims, dtype=torch.float64, device=place)
    given = None if condition is None else condition.to(place, torch.float64)
    with measuring(model):
        # not through the hooks, which count calls
        return [adapter.forward(z.view(1, *model.shape), model.process.log_snr_input(t), given)]
