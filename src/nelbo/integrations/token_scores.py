r"""From the concrete scores of a score-entropy model (SEDD) to the logits that predict tokens.

The score of y at place i is s_y = p_t(z with y at i)/p_t(z), and s_y = 1 where y = z_i. With
P_y = P(x_i = y|z but z_i) and α = α_t = e^-σ (Lou et al. 2024):

    masked, z_i the mask   s_y = α/(1-α) P_y                  P_y ∝ s_y
    uniform of K ids       s_y ∝ m_y = α P_y + (1-α)/K        P_y ∝ m_y - (1-α)/K, m = s/Σ_y s_y

Exact scores give P exactly, and the bound is then the integral of denoising score entropy, SEDD's
own. Of others, what no P has is taken away: the factor Σ_y s_y (1-α)/α = c of masks, without which
the bound is lower by α/(1-α) (c - 1 - log c) for each mask, and in a uniform process what m lacks
to (1-α)/K. Either way P is normalised, and the bound is one of the model that samples by P.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from nelbo._utils.numerics import log1mexp
from nelbo.diffusion.symbols import WIDE

Head = Literal["logits", "score", "log-score"]
#: logits (B, L, V) from a module's output, the ids that it saw (B, L) and α_t (B,)
Reading = Callable[[Tensor, Tensor, Tensor], Tensor]


def reading_of(head: str, uniform: bool) -> Reading | None:
    """Return how to read the output of a module; None for logits.

    Args:
        head: logits, score or log-score.
        uniform: whether the process is uniform-state, not masked.

    Raises:
        ValueError: if the head is none of these.
    """
    match head, uniform:
        case "logits", _:
            return None
        case "log-score", False:
            return None  # a factor of all scores of a place is of no account
        case "score", False:
            return lambda output, ids, alpha: _log(output)
        case "log-score", True:
            return opinions
        case "score", True:
            return lambda output, ids, alpha: opinions(_log(output), ids, alpha)
    raise ValueError(f"head must be logits, score or log-score; got {head!r}")


def opinions(log_score: Tensor, ids: Tensor, alpha: Tensor) -> Tensor:
    """Return log P_y, up to a constant, from log s_y of a uniform-state process, (B, L, V).

    Args:
        log_score: (B, L, V); those of the ids themselves are taken as 0.
        ids: that the scores are at, (B, L).
        alpha: α_t, (B,).

    Raises:
        ValueError: if α is 0, where z says nothing of x and all scores are 1.
    """
    if (alpha == 0).any():
        raise ValueError(
            "scores say nothing about the text at the end of a grid, where all of it is noise;"
            " leave the steps out, for continuous time"
        )
    count = log_score.shape[-1]
    log_score = log_score.to(torch.float64 if count <= WIDE else torch.float32)
    log_m = log_score.scatter(-1, ids[..., None], 0.0).log_softmax(-1)
    each = ((1 - alpha) / count).log().to(log_m.device, log_m.dtype)
    above = log_m - each[:, None, None]
    lacks = above <= 0
    found = torch.where(lacks, -torch.inf, log_m + log1mexp(-above.clamp(min=0)))
    return torch.where(lacks.all(-1, keepdim=True), log_m, found)


def _log(score: Tensor) -> Tensor:
    if (score < 0).any():
        raise ValueError(
            f"scores are ratios of probabilities, at least 0; got {score.min().item():.4g}; if"
            ' they are logarithms, give head="log-score"'
        )
    return score.log()
