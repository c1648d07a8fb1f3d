"""Control variates of processes of symbols, masked or replaced: see `control_variates`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import log_frequencies
from nelbo.diffusion.process import SymbolProcess
from nelbo.diffusion.terms import TermDraw
from nelbo.diffusion.uniform import UniformDiffusion
from nelbo.evaluation.price import Work
from nelbo.evaluation.variate import (
    HELD,
    LEAST,
    TABLE,
    Candidate,
    ControlVariate,
    of_symbol,
    variates_of,
)


class SymbolVariate(ControlVariate):
    """Costs of symbols that noise changed, given a context: Σ_i c_i(z_i) - E[ c_i(z_i)|x ].

    The context is log P(x_i = k) of each place, by the network at a neighbouring draw.

    Args:
        model: of symbols.
        x: examples to fit to.
    """

    paired, usual = True, (1.0,)

    def __init__(self, model: Model, x: Tensor) -> None:
        self.model, self.absent = model, model.process.codes
        self.log_frequency = log_frequencies(x.cpu(), model.process.codes).to(x.device)

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        contexts = [self.log_frequency] * len(draws)
        if len(draws) == 2:
            contexts = [self._by_network(draw) for draw in reversed(draws)]
        pairs = zip(draws, contexts, strict=True)
        return torch.stack([self._centred(draw, context)[:, None] for draw, context in pairs])

    def _by_network(self, draw: TermDraw) -> Tensor:
        return draw.prediction.e_hat.clamp(min=LEAST)

    def _centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        """Return Σ_i c_i(z_i) - E[ c_i(z_i)|x ], (B,)."""
        raise NotImplementedError

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        return [self._surprise(self.log_frequency, x).flatten(1).sum(1, keepdim=True)]

    def _surprise(self, log_p: Tensor, x: Tensor) -> Tensor:
        """Return -log p of the symbols, shape of x; 0 where a shorter text has none."""
        return torch.where(x == self.absent, 0.0, of_symbol(-log_p, x.clamp(max=self.absent - 1)))


class MaskVariate(SymbolVariate):
    """The same for masks, w Σ_i (1[masked] - its probability) c_i with c_i = -log P(x_i)."""

    @override
    def _by_network(self, draw: TermDraw) -> Tensor:
        hidden = (draw.z == self.absent)[..., None]  # the mask has the code of what is absent
        return torch.where(hidden, super()._by_network(draw), self.log_frequency)

    @override
    def _centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        process, surprise = self.model.process, self._surprise(context, draw.x)
        share = process.log_one_minus_alpha(draw.term.t).exp()
        changed = (draw.z != draw.x).double() - over(share, surprise)
        return draw.term.mask_weight(process) * (changed * surprise).flatten(1).sum(1)


class ReplacedVariate(SymbolVariate):
    """The same for uniform-state diffusion, where the symbol k costs c_i(k) as that of z_t."""

    @override
    def _by_network(self, draw: TermDraw) -> Tensor:
        # certain where a symbol shows, which costs nothing
        return draw.prediction.symbols(draw.z, None).log_probs.clamp(min=LEAST)

    @override
    def _centred(self, draw: TermDraw, context: Tensor) -> Tensor:
        process = UniformDiffusion.require(self.model.process, "symbols that noise replaces")
        context = context.expand(*draw.x.shape, -1)
        found = []
        size = max(1, HELD // context[0].numel())
        for rows in torch.arange(len(draw.x), device=context.device).split(size):
            x, z, t = draw.x[rows].long(), draw.z[rows].long(), draw.term.t[rows]
            s = None if draw.term.before is None else draw.term.before[rows]
            cost = process.costs_of_symbols(x, context[rows], s, t)  # (K, rows, ...)
            each = torch.arange(len(cost), device=x.device).view(-1, *(1,) * x.ndim)
            q = process.marginal(x, t).base_dist.log_prob(each.expand_as(cost)).exp()
            mean = torch.where(q > 0, q * cost, 0.0).sum(0)
            own = cost.gather(0, z.clamp(max=self.absent - 1)[None])[0]
            found.append(torch.where(x == self.absent, 0.0, own - mean).flatten(1).sum(1))
        return torch.cat(found)


@variates_of.register(MaskedDiffusion)
@variates_of.register(UniformDiffusion)
def _(process: SymbolProcess, model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    free = Work(0, 0, 0)  # they take no more than the normalisation of the logits
    limit = HELD if process.mask is None else TABLE
    if model.dims * process.codes > limit:
        none = ControlVariate()
        none.note = (
            f"no control variates: their table of {model.dims} times {process.codes} symbols"
            f" would exceed {limit} numbers"
        )
        return [Candidate("none", free, lambda: none, alone=True)]
    kind = ReplacedVariate if process.mask is None else MaskVariate
    return [Candidate("costs of symbols", free, lambda: kind(model, x), alone=True)]
