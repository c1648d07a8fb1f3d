r"""P(x, z_1..z_T|φ) = P(x|z_1) Π_{t=2..T} P(z_{t-1}|z_t) P(z_T): a network among probabilities.

The network gives tensors; only `Model` makes distributions of them. Around the network the
arithmetic runs in `Model.dtype` (float64 for measuring, float32 is enough for training).
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from nelbo._utils.numerics import check_finite
from nelbo._utils.sharding import whole
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.checks import check_examples
from nelbo.diffusion.decoder import Decoder
from nelbo.diffusion.parametrization import Parametrization, Prediction
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.reverse import ReverseKernel

FAR = 1e6  # of z, in the units of its noise: further out a network of float32 overflows
ROWS = 2**23  # numbers the arithmetic around one network call may hold


class Model(nn.Module):
    """A network, what its output means, and the probabilities built from it.

    Args:
        network: forward(features (B, C, ...), level (B,)) -> (B, ...) or (B, ..., outputs),
            with the shape of z first and `head.outputs` numbers per dimension. Given a
            condition, it is its third argument.
        process: the encoder q.
        head: meaning of the network's output.
        step: the reverse step P(z_s|z_t).
        decoder: P(x|z_1).
        shape: the shape of one example.
    """

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        head: Parametrization,
        step: ReverseKernel,
        decoder: Decoder,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.network, self.process, self.decoder = network, process, decoder
        self.head, self.step = head, step
        self.shape = tuple(shape)
        self.dtype = torch.float64
        self.precision: torch.dtype | None = None  # of autocast inside the network, if any
        self.conditioned_on = ""  # names of c, where the model is one of P(x|c)

    def unconditional(self) -> "Model":
        """Return the model of P(x), which shares all weights, of a model of P(x|c)."""
        model = copy.copy(self)
        model.conditioned_on = ""
        return model

    def check_condition(self, condition: Tensor | None, examples: int) -> None:
        """Refuse to call a model of P(x|c) without c, or with the c of more or fewer examples.

        Raises:
            ValueError: as said.
        """
        if condition is None:
            if self.conditioned_on:
                raise ValueError(
                    f"the model is one of P(x|{self.conditioned_on}), and which"
                    f" {self.conditioned_on} each example has was not said: take the examples from"
                    " run.batch(...), give nelbo.Batch(x, condition), or measure P(x) with"
                    " model.unconditional()"
                )
        elif len(condition) != examples:
            raise ValueError(
                f"each example has its own condition; got {len(condition)} conditions of"
                f" {examples} examples: choose the same rows of both, as batch[rows] does"
            )

    def given(self, batch: Batch) -> str:
        """Return what the bound of a batch is conditioned on, for the record; "" for P(x)."""
        return "" if batch.condition is None else batch.given or self.conditioned_on or "condition"

    @property
    def dims(self) -> int:
        """D, the number of dimensions of one example."""
        return int(torch.Size(self.shape).numel())

    @property
    def rows(self) -> int:
        """Examples that one call of the network may take, for the memory around it."""
        return max(1, ROWS // (self.dims * self.head.numbers))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def fit_statistics(self, x: Tensor) -> None:
        """Take from training examples x, (N, *shape), what is fixed or known before training."""
        self.process.fit_statistics(x)
        self.head.fit_statistics(x)

    def embed(self, x: Tensor) -> Tensor:
        """e, the data in the space of the process."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"the model is of examples of shape {self.shape}; got {tuple(x.shape[1:])}"
            )
        return self.process.embed(x).to(self.dtype)

    def predict(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> Prediction:
        """Call the network once: its prediction of the data, given z = z_t and the condition."""
        self.check_condition(condition, len(z))
        dtype = next(self.network.parameters()).dtype
        features, level = self.process.features(z).clamp(-FAR, FAR), self.process.level(t)
        inputs = [features, level] + ([] if condition is None else [condition])
        inputs = [v.to(z.device, dtype) for v in inputs]
        with _narrow(z.device, self.precision):
            output = self.network(*inputs).to(self.dtype)
        needed = self.head.output_shape(z)
        if output.shape != needed:
            raise ValueError(
                f"the network must give {tuple(needed)} for {type(self.head).__name__};"
                f" got {tuple(output.shape)}"
            )
        return self.head(output, z, t, self.process)

    def reverse(
        self, z: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> Distribution:
        """P(z_s|z_t, φ) for z = z_t."""
        return self.step(self.predict(z, t, condition), z, s, t, self.process)

    def likelihood(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> Distribution:
        """P(x|z_1, φ) for z = z_1 at the first times t."""
        return self.decoder(self.predict(z, t, condition), z, t, self.process)


def _narrow(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if precision is None else torch.autocast(device.type, precision)


def find_device(name: str) -> torch.device:
    """The device of that name, or ValueError where this machine has none."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"there is no device {name!r} on this machine; try cpu") from None


@contextmanager
def measuring(model: Model, batch: Batch | None = None) -> Iterator[None]:
    """Evaluation mode, float64 around the network, no TF32, no autocast; then all as before.

    Args:
        model: the model to measure.
        batch: the examples on which it is measured, where a bound is.

    Raises:
        ValueError: a model of P(x|c) without the conditions of these examples; no such examples;
            weights that are not finite.
    """
    check_finite(model, "the model")
    if batch is not None:
        model.check_condition(batch.condition, len(batch))
        check_examples(model, batch.x)
    before = model.training, model.dtype, model.precision
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        model.eval()
        model.dtype, model.precision = torch.float64, None
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(before[0])
        model.dtype, model.precision = before[1:]
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@dataclass
class Calls:
    """Rows that went through a network."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(network: nn.Module) -> Iterator[Calls]:
    """Counts the rows of each forward pass of a network, and of each backward pass."""
    calls = Calls()

    def backward(gradient: Tensor) -> None:
        calls.backward += len(gradient)

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.forward += len(inputs[0])
        if output.requires_grad:
            output.register_hook(backward)

    handle = network.register_forward_hook(forward)
    try:
        yield calls
    finally:
        handle.remove()


def model_hash(model: Model) -> str:
    """First 16 hex digits of the SHA-256 of all weights and of how they become probabilities."""
    digest = hashlib.sha256()
    parts = (model.network, model.process, model.process.schedule, model.decoder)
    for part in (*parts, model.head, model.step):
        digest.update(type(part).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
