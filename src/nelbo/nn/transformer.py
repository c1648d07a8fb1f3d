r"""A bidirectional transformer: a token for each dimension of an example.

For text a dimension is a position and its features are the channels of its symbol; for vectors of
any process a dimension is a column. A token starts as a convolution over its neighbours; without
it, text is learned only once attention has found the neighbours by itself. Then all tokens attend
to each other. Position enters twice: as learned embeddings, which identify a column, and as
rotations of queries and keys (Su et al. 2021), which give attention the distance of two positions:

    h ← h + A( norm(h) ),   h ← h + M( norm(h) ),   scale and shift of each norm by the noise level
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from typing_extensions import override

from nelbo.nn.dropout import Dropout
from nelbo.nn.embedding import LevelEmbedding, zero

HEAD = 32  # channels of one head of attention
REACH = 3  # neighbours on either side that enter the convolutions


class _LevelNorm(nn.Module):
    """Layer normalisation whose scale and shift depend on the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scale_shift = zero(nn.Linear(width, 2 * width))

    @override
    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.scale_shift(level)[:, None].chunk(2, -1)
        return torch.addcmul(shift, self.norm(h), 1 + scale)


class _Block(nn.Module):
    """Attention over the tokens, (B, D, width), then two layers on each of them.

    A depthwise convolution adds the neighbours of each token before attention (after So et al.
    2021); without it, text is learned only once attention has found them by itself.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm1, self.norm2 = _LevelNorm(width), _LevelNorm(width)
        beside = nn.Conv2d(width, width, (1, 2 * REACH + 1), padding=(0, REACH), groups=width)
        self.beside = zero(beside)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mixed = zero(nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, 4 * width), zero(nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    @override
    def forward(self, h: Tensor, level: Tensor, turn: Tensor) -> Tensor:
        n = self.norm1(h, level)
        # an image of height 1 with channels last: the memory layout that n has already
        n = n + self.beside(n.mT[:, :, None])[:, :, 0].mT
        qkv = self.query_key_value(n).unflatten(-1, (3, self.heads, -1))
        q, k = _rotate(qkv[:, :, :2], turn).permute(2, 0, 3, 1, 4)
        r = scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2))
        h = h + self.dropout(self.mixed(r.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.down(silu(self.up(self.norm2(h, level)))))


def _turns(places: int, channels: int) -> Tensor:
    """Return cosine and sine of position · frequency, shape (2, places, channels/2)."""
    frequency = 10_000.0 ** -(torch.arange(channels // 2) * 2 / channels)
    angle = torch.arange(places)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(h: Tensor, turn: Tensor) -> Tensor:
    """Rotate pairs of channels of h, (B, D, 2, heads, channels), by angles of the position."""
    pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(*turn)[:, None, None]).flatten(-2)


class Transformer(nn.Module):
    """Network for examples of any shape, with one token per dimension.

    Args:
        shape: shape of one example, (L,) for text.
        channels: features per dimension of the example.
        outputs: numbers per dimension of the example; the output has the shape (B, *shape) for 1
            and (B, *shape, outputs) for more.
        width: channels of a token, a multiple of 32.
        depth: blocks.
        dropout: share of hidden units dropped in training.
        conditions: numbers in the condition of an example.
        symbols: number of codes that the single feature of a dimension may have, which are
            embedded; 0 where the features are numbers.

    Raises:
        ValueError: if the width is not a multiple of 32.
    """

    turn: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        outputs: int,
        width: int = 128,
        depth: int = 4,
        dropout: float = 0.0,
        conditions: int = 1,
        symbols: int = 0,
    ) -> None:
        super().__init__()
        if width % HEAD:
            raise ValueError(
                f"width must be a multiple of {HEAD} for the network transformer; got {width}"
            )
        self.shape, self.channels, self.outputs = shape, channels, outputs
        dims = int(torch.Size(shape).numel())
        self.level = LevelEmbedding(width, conditions=conditions)
        self.embed = nn.Embedding(symbols, width) if symbols else None
        of_places = width if symbols else channels
        self.first = nn.Conv1d(of_places, width, 2 * REACH + 1, padding=REACH)
        self.position = nn.Parameter(0.02 * torch.randn(dims, width))
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = _LevelNorm(width)
        self.last = zero(nn.Linear(width, outputs))
        self.register_buffer("turn", _turns(dims, HEAD), persistent=False)

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.embed is not None:
            of_dims = self.embed(features.long()).mT
        else:
            each = features.unflatten(1, (self.shape[0], self.channels)).transpose(1, 2)
            of_dims = each.flatten(2)
        h = self.first(of_dims).mT + self.position
        level = self.level(level, condition)
        for block in self.blocks:
            h = block(h, level, self.turn)
        output: Tensor = self.last(self.norm(h, level))
        extra = () if self.outputs == 1 else (self.outputs,)
        return output.reshape(-1, *self.shape, *extra)
