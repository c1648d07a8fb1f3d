"""A cheap masked model of the same tokens, to measure an expensive one from few calls.

Two levels (`evaluation.masks`) take what a surrogate says about a mask off what the model says. So
the best surrogate for the price has the costs of the model, whatever its own bound: a small
convolutional network is trained on texts, which costs no call of the model; and then, if it may
cost some, to give each hidden token the model's own cost, by least squares.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.masked import BlockDiffusion
from nelbo.diffusion.model import Model, measuring
from nelbo.integrations.token_rows import Texts
from nelbo.integrations.tokens import TokenModel, wrap_tokens

WIDTH, LAYERS, KERNEL = 64, 2, 15  # of the network; a token sees 7 on each side in a layer
STEPS, BATCH = 1500, 64  # of training on texts, about a minute on one core for 48 characters
RATE = 4e-3  # of AdamW, falling linearly to 0
SLOWER = 1 / 4  # factor on it for the model's costs
LARGEST = 1.0  # norm of the gradient, at most


class ConvolutionalTokens(nn.Module):
    """A module from ids (B, L) to logits (B, L, V): depthwise convolutions, of any length.

    Args:
        vocabulary: the number V of ids that it predicts.
        inputs: the number of ids that it reads, with the mask.
        width: channels.
        layers: number of blocks (ConvNeXt's, Liu et al. 2022).
        kernel: odd size of the convolutions.
    """

    def __init__(
        self,
        vocabulary: int,
        inputs: int,
        width: int = WIDTH,
        layers: int = LAYERS,
        kernel: int = KERNEL,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs, width)
        self.mix = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
            for _ in range(layers)
        )
        self.think = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(layers)
        )  # fmt: skip
        self.out = nn.Linear(width, vocabulary)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for mix, think in zip(self.mix, self.think, strict=True):
            h = h + think(mix(h.movedim(1, 2)).movedim(1, 2))
        logits: Tensor = self.out(h)
        return logits


def train_surrogate(
    model: TokenModel,
    texts: Texts | Batch,
    *,
    steps: int = STEPS,
    calls: int = 0,
    start: TokenModel | None = None,
    seed: int = 0,
    track: Track = iter,
) -> TokenModel:
    """Train a surrogate of a model of tokens; the texts should not be those that are measured.

    Args:
        model: the masked model; a surrogate of block diffusion has its blocks.
        texts: ids of training texts, as for `model.batch`.
        steps: number of steps on the texts, BATCH texts each.
        calls: number of network calls of the model, for further steps on its own costs.
        start: a surrogate of an earlier call, which is trained further.
        seed: of everything random.
        track: wraps the steps, for a progress bar.

    Raises:
        ValueError: the model is not masked, the texts are not of it, or a number is negative.
    """
    steps, calls = integer("steps", steps, 0), integer("calls", calls, 0)
    shape = model.shape
    batch = model.batch(texts)
    own = model.network
    if own.mask_id is None:
        kind = type(model.process).__name__
        raise ValueError(f"a surrogate is for a masked model; got one of {kind}")
    block = None if model.process.any_order else cast(BlockDiffusion, model.process).block
    with seeded(seed, 6):
        inputs = max(own.vocabulary, own.mask_id + 1)
        module = ConvolutionalTokens(own.vocabulary, inputs).to(model.device)
        impossible = [int(i) for i in model.never if i != own.mask_id]
        surrogate = wrap_tokens(
            module,
            own.mask_id,
            block=block,
            pad_id=model.pad_id,
            never=impossible,
            length=model.length,
        )
        surrogate.shape = model.shape
        if start is not None:
            module.load_state_dict(start.network.module.state_dict())
        ends = 0, steps, steps + calls // BATCH
        for follow, (begin, end) in enumerate(pairwise(ends)):
            rate = RATE * (SLOWER if follow else 1.0)
            optim = torch.optim.AdamW(module.parameters(), rate)
            for step in track(range(begin, end)):
                optim.param_groups[0]["lr"] = rate * (end - step) / (end - begin)
                loss = _loss(surrogate, model if follow else None, batch)
                optim.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), LARGEST)
                optim.step()
    model.shape = shape
    return surrogate.eval()


def _loss(surrogate: TokenModel, model: Model | None, batch: Batch) -> Tensor:
    """Return the bound of some texts, or the squared distance from the model's costs, a scalar."""
    few = batch[torch.randint(len(batch), (BATCH,))]
    process, shape, device = surrogate.process, few.x.shape[1:], surrogate.device
    scored, u = surrogate.scored_places(few), torch.rand(BATCH, 1)
    keys = torch.where(scored, torch.rand(scored.shape), torch.inf)
    # the block of a random token; its tokens are in random order all the same
    of_places = process.block_of_places(shape)
    block = of_places[keys.argmin(1, keepdim=True)]
    keys = torch.where(of_places == block, keys, torch.inf)
    length = keys.isfinite().sum(1, keepdim=True)
    count = (u * length).long() + 1
    few, hidden = few.to(device), (keys.argsort(1).argsort(1) < count).to(device)
    weight = hidden / count.to(device)
    z = torch.where(hidden, process.codes, few.x)  # what follows a block is not read
    within, blocks = (count / (length + 1))[:, 0].double().sqrt(), process.blocks(shape)
    t = ((blocks - 1 - block[:, 0] + within) / blocks).to(device)

    def costs(of: Model) -> Tensor:
        symbols = of.predict(z, t, few.condition).symbols(z, of.process.codes)
        return -torch.where(hidden, symbols.log_prob(few.x, hidden), 0.0)

    if model is None:
        return (weight * costs(surrogate)).sum() / BATCH
    with measuring(model):
        wanted = costs(model)
    return (weight * (costs(surrogate) - wanted).square()).sum() / BATCH
