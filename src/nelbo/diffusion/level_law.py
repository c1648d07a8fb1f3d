r"""Means and normalisers of distributions over levels, without storing the probabilities.

    P(k) = exp( Σ_j c_j f_j(k) + h(k) − ½ p (z − a v_k)² − A )

over K levels, for each dimension of each example. Several tensors with K numbers per dimension
would take up the memory and most of the time of a training step on images of 256 levels. Here
they exist only in parts that fit the processor's cache, and are computed again for the gradient:
with w(k) = P(k) ( g_m (v_k − E[v]) + g_A ) with respect to the logits, of

    g_m E[v] + g_A A.

Logits are to the base 2: where exp underflows, as most of P does, that of MKL takes twenty times
as long as exp2 of torch.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable
from typing_extensions import override

from nelbo._utils.numerics import LOG_2

PART = {"cpu": 2**18}  # numbers in a part, which fit the cache, by device
LARGE = 2**25  # numbers in a part on all other devices


def mean_and_norm(
    c: Tensor, f: Tensor, h: Tensor, v: Tensor, z: Tensor, a: Tensor, p: Tensor
) -> tuple[Tensor, Tensor]:
    """Return E[v] and A of each dimension, (B, D) each; differentiable once, but not in v.

    Args:
        c: coefficients, shape (B, D, J).
        f: functions, shape (J, K).
        h: log-weights, shape (D, K) or (1, K).
        v: values, shape (K,).
        z: observations a·v + noise, shape (B, D).
        a: signal factor, shape (B,).
        p: precision of the noise, shape (B,).
    """
    mean, norm = _MeanAndNorm.apply(c, f, h, v, z, a, p)
    return mean, norm


def _parts(c: Tensor, f: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the examples and the dimensions of each part."""
    (examples, dims, _), count = c.shape, f.shape[1]
    most = PART.get(c.device.type, LARGE)
    wide = max(1, min(dims, most // count))
    high = max(1, most // (count * wide))
    for d, b in product(range(0, dims, wide), range(0, examples, high)):
        yield slice(b, b + high), slice(d, d + wide)


class _Part:
    """Logits of a part to the base 2, (b, d, K), and the scaled distances of z to all levels."""

    def __init__(self, part: tuple[slice, slice], *parameters: Tensor) -> None:
        c, f2, h2, v, z, a, p = parameters
        examples, dims = part
        self.c = c[part]
        h2 = h2 if len(h2) == 1 else h2[dims]
        self.logits = torch.baddbmm(h2, self.c, f2.expand(len(self.c), -1, -1))
        self.root = (p[examples, None] / (2 * LOG_2)).sqrt()
        self.away = z[part][..., None] - (a[examples, None] * v)[:, None]
        self.away *= self.root[..., None]
        self.logits.addcmul_(self.away, self.away, value=-1)


class _MeanAndNorm(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: FunctionCtx,
        c: Tensor,
        f: Tensor,
        h: Tensor,
        v: Tensor,
        z: Tensor,
        a: Tensor,
        p: Tensor,
    ) -> tuple[Tensor, Tensor]:
        mean, norm = torch.empty_like(z), torch.empty_like(z)
        one_and_v = torch.stack([torch.ones_like(v), v], 1)
        for part in _parts(c, f):
            logits = _Part(part, c, f / LOG_2, h / LOG_2, v, z, a, p).logits
            most = logits.amax(-1)
            sums = logits.sub_(most[..., None]).exp2_() @ one_and_v
            mean[part] = sums[..., 1] / sums[..., 0]
            norm[part] = LOG_2 * (sums[..., 0].log2() + most)
        ctx.save_for_backward(c, f, h, v, z, a, p, mean, norm)
        return mean, norm

    @staticmethod
    @once_differentiable
    @override
    def backward(
        ctx: BackwardCFunction, of_mean: Tensor, of_norm: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        c, f, h, v, z, a, p, mean, norm = saved
        of_c, of_z = torch.empty_like(c), torch.zeros_like(z)
        of_f, of_h, of_a, of_p = (torch.zeros_like(x) for x in (f, h, a, p))
        base = of_norm - of_mean * mean
        for part in _parts(c, f):
            some, (examples, dims) = _Part(part, c, f / LOG_2, h / LOG_2, v, z, a, p), part
            w = some.logits.sub_((norm[part] / LOG_2)[..., None]).exp2_()
            w *= torch.addcmul(base[part][..., None], of_mean[part][..., None], v)
            of_c[part] = w @ f.T
            of_f.addmm_(some.c.flatten(0, 1).T, w.flatten(0, 1))
            if len(h) == 1:
                of_h += w.sum((0, 1))
            else:
                of_h[dims] += w.sum(0)
            if any(ctx.needs_input_grad[4:]):
                w *= some.away  # root (z - a v), root² = p/2 log 2
                sum_0, sum_v = w.sum(-1), w @ v
                scale = 2 * LOG_2 * some.root
                of_z[part] = -scale * sum_0
                of_a[examples] += (scale * sum_v).sum(1)
                of_p[examples] -= (
                    0.5 / some.root[:, 0] * (z[part] * sum_0 - a[examples, None] * sum_v).sum(1)
                )
        return of_c, of_f, of_h, None, of_z, of_a, of_p
