r"""Diffusion language models: any module from ids (B, L) to logits (B, L, V), as a `Model`.

A masked one predicts each hidden token from those that show. With the masked process it has a
bound on -log P(x), an expectation over the number of hidden tokens and which they are:

    -log P(x) <= E_{l ~ U{1..L}} E_{|S| = l} (L/l) Σ_{i in S} -log P(x_i | x outside of S)

**Shown tokens** (a prompt, BOS, EOS, padding) are the condition c of P(x|c): they are never hidden
and cost nothing, so the bound is P(answer|prompt), and a token is one that is *scored*. They stand
in a `Batch` as its conditions, (N, L): the id where a token shows, SCORED where it does not, and
ABSENT beyond the end of a text. Absent places never reach the module, so its numbers do not depend
on padding; lengths are given, not coded.

**Uniform-state models** (UDLM, Duo) hide no token: noise replaces it by any of the V ids, and the
module's logits are its opinion of each token from the others (`diffusion.uniform`). Tokens that
show stay as they are.

**Block diffusion** (BD3-LM) masks a block at a time. For block b the module is called on the
tokens up to the end of b and no others: those before b as they are, those of b hidden or not. So
it needs no mask of its attention, and one that is causal by blocks may have it. (In training
BD3-LM reads x_t and x_0 side by side, all blocks at once, under such a mask.)

**Ids that cannot be predicted** (the mask, padding and those in `never`) get probability 0, and
the others are renormalised.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo._utils.numerics import digest_of
from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.masked import BlockDiffusion, MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import PowerAlpha, even_times
from nelbo.diffusion.uniform import UniformDiffusion
from nelbo.integrations.token_network import (
    Clock,
    TokenNetwork,
    clock_in_words,
    clock_of,
    described,
    probe,
)
from nelbo.integrations.token_prediction import TokenLogits, TokenPrediction
from nelbo.integrations.token_rows import (
    ABSENT,
    SCORED,
    Texts,
    TokenRules,
    fitting,
    listed,
    rows_of,
)
from nelbo.integrations.token_scores import Head, reading_of

Shown = Tensor | np.ndarray | Callable[[Tensor], Tensor] | Collection[int] | None


@checked
def wrap_tokens(
    module: nn.Module,
    mask_id: int | None = None,
    *,
    process: Literal["masked", "uniform"] = "masked",
    block: int | None = None,
    head: Head = "logits",
    shift: Literal[0, 1] = 0,
    time: Literal["masked", "sigma"] | Clock | None = None,
    pad_id: int | None = None,
    never: Collection[int] = (),
    shown: Shown = None,
    length: int | None = None,
) -> "TokenModel":
    """Return a model of any module from ids (B, L) to logits (B, L, V).

    The module's dtype and device are kept; logits are normalised in float64 up to 4096 ids and in
    float32 above, and sums are float64.

    Args:
        module: called as module(ids), or module(ids, time); returns the logits as a tensor, or an
            object that has them as `.logits`.
        mask_id: the id that stands for a hidden token; left out for a uniform-state model.
        process: "masked"; or "uniform" for a uniform-state model, whose noise replaces a token by
            any of the V ids.
        block: tokens of a block, for block diffusion; the module is called on the text up to the
            end of a block, with clean tokens before the block. Blocks are counted from the first
            token.
        head: what the module returns in place of logits: "score", concrete scores, or "log-score",
            their logarithms, of a score-entropy model (`token_scores`).
        shift: the logits at place i predict the token at i + shift. 1 is for models that began
            as left-to-right ones, such as Dream; place 0 then predicts the first token too.
        time: the module's time input: "masked", the share of hidden tokens; "sigma", minus the
            log of the share α that noise leaves, at most 9.2, as for MDLM, SEDD, UDLM and Duo; or
            a function of α, (B,). None for a module without one.
        pad_id: id of padding at either end of a text, which the module never gets.
        never: further ids that cannot be predicted, such as unused ones.
        shown: which tokens show: a mask (L,) or (N, L) of places of the ids as given, padding
            included; or a function of these ids (N, L) that returns one; or ids that show wherever
            they are. For prompts of a batch, `TokenModel.batch`.
        length: largest number of tokens of a text; by default there is no limit.

    Raises:
        ValueError: ids outside the vocabulary; a module that fails on as many tokens, or returns
            logits of another shape; a left-to-right module,
            but for blocks of one token; no mask_id for a masked model, or one for a uniform-state
            model; or blocks of the latter.
    """
    block = check_process(process, mask_id, block)
    uniform = process == "uniform"
    for name, value, least in (("mask_id", mask_id, 0), ("length", length, 1)):
        if value is not None:
            integer(name, value, least)
    # tokens of one block see each other
    size = min(length or block, block) if block else length
    clock = clock_of(time)
    logits = probe(module, mask_id, shift, clock, size)
    vocabulary = logits.shape[-1]
    impossible = {*never, *(i for i in (mask_id, pad_id) if i is not None)}
    # the mask may be beyond the ids that have logits
    outside = [i for i in impossible if i < 0 or (i >= vocabulary and i != mask_id)]
    if outside:
        raise ValueError(
            f"ids of the module are 0..{vocabulary - 1}; got {outside} in never, pad_id or mask_id"
        )
    reading = reading_of(head, uniform)
    network = TokenNetwork(module, mask_id, vocabulary, clock, reading)
    forbidden = tuple(sorted(i for i in impossible if i < vocabulary))
    if len(forbidden) > vocabulary - 2:
        raise ValueError("at least two ids must be possible; leave some out of never")
    # in continuous time any schedule gives this bound, and this one a small variance
    schedule = PowerAlpha(3.0 if uniform else 2.0)
    made: ForwardProcess
    if uniform:
        made = UniformDiffusion(schedule, vocabulary)
    elif block:
        made = BlockDiffusion(schedule, vocabulary, block)
    else:
        made = MaskedDiffusion(schedule, vocabulary)
    model = TokenModel(network, made, shift, pad_id, forbidden, shown, length)
    model.settings = (
        f"mask {mask_id}, block {block}, head {head}, shift {shift}, time {described(clock)}, pad"
        f" {pad_id}, never {forbidden}"
    )
    if not model.network.module.state_dict():  # nothing else says which module it is
        model.settings += f", logits {digest_of(logits)}"
    return model


def check_process(process: str, mask_id: int | None, block: int | None) -> int | None:
    """Return the tokens of a block, after a check that it, a process and a mask go together.

    Raises:
        ValueError: they do not.
    """
    if process not in ("masked", "uniform"):
        raise ValueError(f"process must be masked or uniform; got {process!r}")
    uniform = process == "uniform"
    if uniform != (mask_id is None):
        raise ValueError(
            f"a masked model has a mask_id, and a uniform-state one has none; got {process} and"
            f" {mask_id}" + ("; if its mask is never predicted, name it in never" * uniform)
        )
    if block is not None:
        block = integer("block", block, 1)
        if uniform:
            raise ValueError("block diffusion is masked; leave block or process out")
    return block


class TokenModel(Model):
    """A diffusion language model as a `Model` of P(x|shown tokens); see `wrap_tokens`."""

    dimension, any_length = "token", True
    network: TokenNetwork
    never: Tensor

    def __init__(
        self,
        network: TokenNetwork,
        process: ForwardProcess,
        shift: int,
        pad_id: int | None,
        never: tuple[int, ...],
        shown: Shown,
        length: int | None,
    ) -> None:
        count = network.vocabulary
        parts = network, process, TokenLogits(count), Posterior(), Categorical()
        super().__init__(*parts, (length or 1,))
        self.shift, self.pad_id, self.shown, self.length = shift, pad_id, shown, length
        ids = torch.tensor(never, dtype=torch.long, device=self.device)
        self.register_buffer("never", ids, persistent=False)
        self.conditioned_on = "shown tokens and lengths"

    @override
    def unconditional(self) -> "TokenModel":
        return self

    # ---- texts and the tokens that show

    @override
    def batch(self, x: Texts | Batch, shown: Tensor | np.ndarray | None = None) -> Batch:
        """Return texts with the tokens that show, and take the longest as the shape of an example.

        Padding is moved behind the texts, so that each begins at the first place.

        Args:
            x: ids, (N, L), or a list of texts of any lengths; or a `Batch` with its conditions.
            shown: mask of further tokens that show, (N, L), such as those of prompts.

        Raises:
            ValueError: ids that are not of the model, a text longer than the model allows, or one
                without a token to score.
        """
        if isinstance(x, Batch) and x.condition is not None:
            batch = x
        else:
            ids, present = rows_of(x.x if isinstance(x, Batch) else x, self.pad_id)
            show = self._shows(ids)
            if shown is not None:
                show |= fitting(torch.as_tensor(shown), ids)
            condition = torch.where(show, ids, SCORED)
            batch = Batch(ids, torch.where(present, condition, ABSENT))
        batch = self.rules.aligned(batch)
        self.shape = tuple(batch.x.shape[1:])
        return batch

    @override
    def check_condition(self, condition: Tensor | None, examples: int) -> None:
        super().check_condition(condition, examples)
        if condition is None:
            return
        absent = condition == ABSENT
        if absent[:, 0].any() or (absent[:, :-1] & ~absent[:, 1:]).any():
            raise ValueError(
                "conditions have padding before a token, and texts begin at the first place; take"
                " them from model.batch(texts).condition"
            )

    @override
    def blank(self, count: int, condition: Tensor | None = None) -> Tensor:
        self.check_condition(condition, count)
        assert condition is not None
        self.shape = tuple(condition.shape[1:])
        return torch.where(condition == SCORED, self.process.mask or 0, condition.clamp(min=0))

    @override
    def scored_places(self, batch: Batch) -> Tensor:
        assert batch.condition is not None
        return batch.condition == SCORED

    @override
    def even_times(self, steps: int) -> Tensor:
        """Return T times between which equal numbers of tokens change, (T,).

        Equal steps of time would not do: the schedule is chosen for its variance in continuous
        time, and is no property of the module.

        Args:
            steps: T; for block diffusion, a multiple of the number of blocks of an example.

        Raises:
            ValueError: `steps` is below 1, or not such a multiple.
        """
        blocks = self.process.blocks(self.shape)
        if steps % blocks:
            raise ValueError(
                f"each step shows tokens of one of {blocks} blocks; steps must be a multiple of"
                f" {blocks}; got {steps}"
            )
        # α_τ = 1 - τ^p falls by the same amount in each step of a block
        schedule = cast(PowerAlpha, self.process.schedule)
        own = even_times(schedule, steps // blocks, steps // blocks) ** (1 / schedule.power)
        return ((torch.arange(blocks)[:, None] + own) / blocks).flatten()

    @override
    def notes(self, batch: Batch) -> tuple[str, ...]:
        assert batch.condition is not None
        scored, absent = ((batch.condition == v).sum().item() for v in (SCORED, ABSENT))
        showing = (batch.condition >= 0).sum().item()
        network = self.network
        lengths = "; lengths are given, not coded" if absent else ""
        masked, others = network.mask_id is not None, set(self.never.tolist())
        others -= {network.mask_id, self.pad_id}
        kinds = {"the mask": masked, "padding": self.pad_id is not None, listed(others): others}
        zeros = ", ".join(kind for kind, there in kinds.items() if there)
        impossible = (
            f", but not {zeros}, whose probability is 0; the others are renormalised"
            if zeros
            else ""
        )
        return (
            f"{scored} tokens of {len(batch)} texts are scored; {showing} show (prompts, special"
            f" tokens): given, not counted{lengths}",
            f"{self.possible} of {network.vocabulary} ids can be predicted{impossible}",
            *(() if masked else ("noise replaces a token by any of the ids",)),
            *self.process.notes(self.dimension),
            f"the model {clock_in_words(network.clock)}",
        )

    def _shows(self, ids: Tensor) -> Tensor:
        """Return a mask of the tokens that show in all texts, (N, L)."""
        show = torch.zeros_like(ids, dtype=torch.bool)
        if self.pad_id is not None:
            show |= ids == self.pad_id
        own = self.shown
        if callable(own):
            show |= fitting(torch.as_tensor(own(ids)), ids)
        elif isinstance(own, Tensor | np.ndarray):
            show |= fitting(torch.as_tensor(own), ids)
        elif own is not None:
            show |= torch.isin(ids, torch.tensor(sorted(own)))
        return show

    @property
    def rules(self) -> TokenRules:
        """The rules for its texts."""
        network, never = self.network, frozenset(self.never.tolist())
        return TokenRules(network.vocabulary, network.mask_id, never, self.length)

    # ---- predictions

    @property
    @override
    def possible(self) -> int:
        return self.network.vocabulary - len(self.never)

    @property
    @override
    def takes_time(self) -> bool:
        return super().takes_time or self.network.clock is not None

    @override
    def predict(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> TokenPrediction:
        self.check_condition(condition, len(z))
        assert condition is not None
        end, t = self.process.window(t, z.shape[1:])
        beyond = torch.arange(z.shape[1], device=z.device) >= end[:, None]
        condition = torch.where(beyond, ABSENT, condition)
        z = torch.where(condition >= 0, condition, z.long())
        z = torch.where(condition == ABSENT, 0, z)
        spans = _spans(condition)
        logits: Tensor = self.network(z, self.process.alpha(t), spans)
        certain = condition != SCORED
        return TokenPrediction(logits, z, self._rows(spans, z), self.never, certain)

    def _rows(self, spans: Sequence[tuple[Tensor, int]], z: Tensor) -> Tensor | None:
        """Return the row of the logits for each place of z; None if they are in order."""
        if len(spans) == 1 and spans[0][1] == z.shape[1] and not self.shift:
            return None
        row, before = torch.zeros_like(z), 0
        for rows, size in spans:
            place = torch.arange(size, device=z.device) - self.shift
            place = place.clamp(0, size - 1)
            starts = before + size * torch.arange(len(rows), device=z.device)
            row[rows, :size] = starts[:, None] + place
            before += size * len(rows)
        return row


def _spans(condition: Tensor) -> list[tuple[Tensor, int]]:
    """Return groups of rows whose texts are of the same length, and these."""
    lengths = (condition != ABSENT).sum(1)
    return [((lengths == k).nonzero()[:, 0], k) for k in lengths.unique().tolist()]
