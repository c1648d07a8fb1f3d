r"""Columns of several kinds in one model, as a product of processes.

x = (x_1, .., x_G) is made of groups of columns. Each group has a process of its own; the groups
share only the time and the network:

    q(z_t|x) = Π_g q_g(z_t^g|x^g),      P(z_s|z_t) = Π_g P_g(z_s^g|z_t),      P(x|z_1) too.

The network sees all of z_t, so the prediction of a column depends on the others. The KL of a
product is the sum of KLs and its rate the sum of rates, so `elbo.py` needs no special case. e, the
features and the network's output are flat, (B, ·), with the groups one after the other.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from typing_extensions import override

from nelbo._utils.batch_rng import BatchShard
from nelbo.diffusion.decoder import Decoder
from nelbo.diffusion.distributions import Joint
from nelbo.diffusion.parametrization import Parametrization
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.process import ForwardProcess, Shape, per_example
from nelbo.diffusion.reverse import ReverseKernel


def join(parts: Sequence[Distribution]) -> Independent:
    """Join distributions of groups of columns, of batch shape (B,), into one of that shape."""
    return per_example(Joint([cast(Independent, part).base_dist for part in parts]))


class ProductDiffusion(ForwardProcess):
    """A process for each group of columns.

    The schedule and the noise level for the network are those of the first group.

    Args:
        parts: the processes.
        sizes: D_g, the number of columns of each.
    """

    alike = False

    def __init__(self, parts: Sequence[ForwardProcess], sizes: Sequence[int]) -> None:
        super().__init__(parts[0].schedule)
        self.parts, self.sizes = cast(Sequence[ForwardProcess], nn.ModuleList(parts)), list(sizes)
        self.widths = [part.width * size for part, size in zip(parts, sizes, strict=True)]

    @property
    @override
    def factors(self) -> Sequence[ForwardProcess]:
        return self.parts

    @override
    def split(self, v: Tensor) -> list[Tensor]:
        """Split x or z, (B, D), into those of the groups."""
        return list(v.split(self.sizes, 1))

    def split_e(self, e: Tensor) -> list[Tensor]:
        """Split e, (B, ·), into those of the groups."""
        return [
            v if part.width == 1 else v.reshape(len(v), -1, part.width)
            for part, v in zip(self.parts, e.split(self.widths, 1), strict=True)
        ]

    @override
    def fit_statistics(self, x: Tensor) -> None:
        for part, v in zip(self.parts, self.split(x), strict=True):
            part.fit_statistics(v)

    @override
    def embed(self, x: Tensor) -> Tensor:
        return self._flat(part.embed(v) for part, v in self._of(x))

    @override
    def features(self, z: Tensor) -> Tensor:
        return self._flat(part.features(v) for part, v in self._of(z))

    @override
    def log_snr_input(self, t: Tensor) -> Tensor:
        return self.parts[0].log_snr_input(t)

    @override
    def transition(self, z: Tensor, s: Tensor, t: Tensor) -> Independent:
        return join([part.transition(v, s, t) for part, v in self._of(z)])

    @override
    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        each = zip(self.parts, self.split_e(e), strict=True)
        return join([part.marginal(v, t) for part, v in each])

    @override
    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        each = zip(self._of(z), self.split_e(e), strict=True)
        return join([part.posterior(v, w, s, t) for (part, v), w in each])

    @override
    def predicted_posterior(
        self, z: Tensor, prediction: Prediction, s: Tensor, t: Tensor
    ) -> Independent:
        each = zip(self._of(z), prediction.factors, strict=True)
        return join([part.predicted_posterior(v, own, s, t) for (part, v), own in each])

    @override
    def prior(self, shape: Shape, t: Tensor) -> Independent:
        each = zip(self.parts, self.sizes, strict=True)
        return join([part.prior((size,), t) for part, size in each])

    @override
    def blank(self, shape: Shape) -> Tensor:
        each = zip(self.parts, self.sizes, strict=True)
        return torch.cat([part.blank((size,)) for part, size in each])

    @override
    def grid_width(self, shape: Shape, s: Tensor | None, t: Tensor, u: Tensor | None) -> Tensor:
        each = zip(self.parts, self.sizes, strict=True)
        return torch.cat([part.grid_width((size,), s, t, u) for part, size in each])

    @override
    def reveal(self, x: Tensor, t: Tensor, shard: BatchShard | None = None) -> Tensor:
        return self._flat(part.reveal(v, t, shard) for part, v in self._of(x))

    @override
    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        """Return the sum of the rates of the groups, (B,)."""
        each = zip(self._of(z), self.split_e(e), self.split_e(e_hat), strict=True)
        return torch.stack([part.rate(v, w, w_hat, t) for (part, v), w, w_hat in each]).sum(0)

    @override
    def predicted_rate(self, z: Tensor, e: Tensor, prediction: Prediction, t: Tensor) -> Tensor:
        each = zip(self._of(z), self.split_e(e), prediction.factors, strict=True)
        return torch.stack([part.predicted_rate(v, w, own, t) for (part, v), w, own in each]).sum(
            0
        )

    def _of(self, v: Tensor) -> list[tuple[ForwardProcess, Tensor]]:
        return list(zip(self.parts, self.split(v), strict=True))

    @staticmethod
    def _flat(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], 1)


class ProductPrediction(Prediction):
    """Predictions of the groups.

    Args:
        parts: the predictions.
    """

    def __init__(self, parts: Sequence[Prediction]) -> None:
        self.parts = tuple(parts)

    @property
    def e_hat(self) -> Tensor:
        """The concatenation of the groups' ê, flat, (B, ·)."""
        return torch.cat([part.e_hat.flatten(1) for part in self.parts], 1)

    @property
    @override
    def factors(self) -> Sequence[Prediction]:
        return self.parts

    @override
    def map(self, f: Callable[[Tensor], Tensor]) -> "ProductPrediction":
        return ProductPrediction([part.map(f) for part in self.parts])


class ProductParametrization(Parametrization):
    """A parametrization for each group of columns.

    Args:
        parts: the parametrizations.
        sizes: D_g, the number of columns of each.
    """

    def __init__(self, parts: Sequence[Parametrization], sizes: Sequence[int]) -> None:
        super().__init__()
        self.parts, self.sizes = cast(Sequence[Parametrization], nn.ModuleList(parts)), list(sizes)
        self.widths = [part.outputs * size for part, size in zip(parts, sizes, strict=True)]

    @property
    @override
    def factors(self) -> Sequence[Parametrization]:
        return self.parts

    @property
    @override
    def numbers(self) -> int:
        return max(part.numbers for part in self.parts)

    @override
    def output_shape(self, z: Tensor) -> torch.Size:
        return torch.Size((len(z), sum(self.widths)))

    @override
    def fit_statistics(self, x: Tensor) -> None:
        for part, v in zip(self.parts, x.split(self.sizes, 1), strict=True):
            part.fit_statistics(v)

    @override
    def exclude_missing(self) -> None:
        for part in self.parts:
            part.exclude_missing()

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        outputs, of_z = output.split(self.widths, 1), process.split(z)
        each = zip(self.parts, outputs, of_z, process.factors, strict=True)
        return ProductPrediction(
            [head(o.reshape(head.output_shape(v)), v, t, part) for head, o, v, part in each]
        )


class ProductReverseKernel(ReverseKernel):
    """A reverse kernel for each group of columns.

    Args:
        parts: the reverse kernels.
    """

    def __init__(self, parts: Sequence[ReverseKernel]) -> None:
        super().__init__()
        self.parts = cast(Sequence[ReverseKernel], nn.ModuleList(parts))

    @property
    @override
    def factors(self) -> Sequence[ReverseKernel]:
        return self.parts

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        each = zip(self.parts, prediction.factors, process.split(z), process.factors, strict=True)
        return join([step(of, v, s, t, part) for step, of, v, part in each])


class ProductDecoder(Decoder):
    """A decoder for each group of columns, which is a density if one of them is.

    Args:
        parts: the decoders.
    """

    def __init__(self, parts: Sequence[Decoder]) -> None:
        super().__init__()
        self.parts = cast(Sequence[Decoder], nn.ModuleList(parts))
        self.density = any(part.density for part in parts)
        self.at_any_time = all(part.at_any_time for part in parts)

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        each = zip(self.parts, prediction.factors, process.split(z), process.factors, strict=True)
        return join([decoder(of, v, t, part) for decoder, of, v, part in each])
