r"""The generative model P(x, z_1..z_T|φ) = P(x|z_1) Π_{t=2..T} P(z_{t-1}|z_t) P(z_T).

The network returns tensors; only `Model` turns them into distributions. The arithmetic around the
network runs in `Model.dtype`: float64 for measuring; float32 is enough for training.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from nelbo._utils.arguments import checked
from nelbo._utils.network_calls import NetworkCalls, fixed_rows
from nelbo._utils.sharding import check_finite, is_sharded, whole
from nelbo.diffusion.batch import Batch, check_count
from nelbo.diffusion.checks import check_examples
from nelbo.diffusion.schedules import even_times

if TYPE_CHECKING:
    from nelbo.diffusion.decoder import Decoder
    from nelbo.diffusion.parametrization import Parametrization
    from nelbo.diffusion.prediction import Prediction
    from nelbo.diffusion.process import ForwardProcess
    from nelbo.diffusion.reverse import ReverseKernel

FAR = 1e6  # largest |z| for a network, in units of its noise; float32 overflows further out
ROWS = 2**23  # numbers that the arithmetic around one network call may hold


class Model(nn.Module):
    """A network, the meaning of its output, and the probabilities that follow.

    Args:
        network: forward(features (B, C, ...), level (B,)) -> (B, ...) or (B, ..., outputs), the
            shape of z and `head.outputs` numbers per dimension. Where there is a condition, it is
            the third argument.
        process: the encoder q.
        head: the parametrization, the meaning of the network's output.
        step: the reverse kernel P(z_s|z_t).
        decoder: P(x|z_1).
        shape: the shape of one example.
        conditioned_on: names of c, for a model of P(x|c), such as "class".

    Raises:
        ValueError: if the reverse kernel is not one of such a process.
    """

    @checked
    def __init__(
        self,
        network: nn.Module,
        process: "ForwardProcess",
        head: "Parametrization",
        step: "ReverseKernel",
        decoder: "Decoder",
        shape: tuple[int, ...],
        conditioned_on: str = "",
    ) -> None:
        super().__init__()
        step.check(process)
        self.network, self.process, self.decoder = network, process, decoder
        self.head, self.step = head, step
        self.shape = tuple(shape)
        self.dtype = torch.float64
        self.precision: torch.dtype | None = None  # of autocast within the network, in training
        self.autocast: torch.dtype | None = None  # the same, also while it is measured
        self.conditioned_on = conditioned_on
        self.calls = NetworkCalls(type(network).__name__)

    #: name of a dimension in the unit of a bound, bits/dim
    dimension = "dim"

    #: whether examples may have any length, so that the model itself makes batches of them
    any_length = False

    #: what else decides its numbers, beside its weights and the classes of its parts, for the hash
    settings = ""

    def batch(self, x: Tensor | Batch) -> Batch:
        """Return examples as a batch, with the conditions that follow from them, if any do."""
        return Batch.of(x)

    def blank(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Return latents that hold nothing of x but what the conditions show, (count, *shape).

        In a masked process every symbol that is scored is hidden.
        """
        return self.process.blank(self.shape).to(self.device).expand(count, *self.shape)

    def scored_places(self, batch: Batch) -> Tensor:
        """Return a mask of the dimensions whose cost the bound counts, shape of the examples."""
        if self.process.absent is not None:
            return batch.x != self.process.absent
        return torch.ones(batch.x.shape, dtype=torch.bool)

    def scored_counts(self, batch: Batch) -> Tensor | None:
        """Return the number of symbols of each text whose cost the bound counts, (N,), int64.

        None where every example has the same D dimensions.
        """
        if not self.any_length and self.process.absent is None:
            return None
        return self.scored_places(batch).sum(1)

    def scored(self, batch: Batch) -> float:
        """Return the mean number of dimensions of an example whose cost the bound counts."""
        counts = self.scored_counts(batch)
        return self.dims if counts is None else counts.sum().item() / max(1, len(batch))

    def even_times(self, steps: int) -> Tensor:
        """Return the times that a number of steps T means, (T,), increasing, the last 1.

        Raises:
            ValueError: if `steps` is below 1, or a number of steps that the model cannot take.
        """
        return even_times(self.process.schedule, steps, steps)

    def notes(self, batch: Batch) -> tuple[str, ...]:
        """Return a sentence for each choice that the meaning of the bound depends on."""
        return ()

    @property
    def diffusion(self) -> "Model":
        """The diffusion model: this one, where the data themselves are diffused."""
        return self

    def examples_of(self, drawn: Tensor) -> Tensor:
        """Return the examples (N, *shape) that draws from `diffusion` stand for, (N, ...)."""
        return drawn

    def check_reading(self, batch: Batch | None = None) -> list[str]:
        """Return notes on how a network of another library is read, for one of our own none.

        Args:
            batch: some of the examples to be measured, if there are any.

        Raises:
            ValueError: another reading fits better by far; see `integrations.probe`.
        """
        return []

    def unconditional(self) -> "Model":
        """Return the model of P(x) that a model of P(x|c) contains; it shares all weights."""
        model = copy.copy(self)
        model.conditioned_on = ""
        return model

    def check_condition(self, condition: Tensor | None, examples: int) -> None:
        """Check that a model of P(x|c) gets a condition for each example, and one of P(x) none.

        Raises:
            ValueError: if it does not.
        """
        self._check_given(condition, examples)
        if condition is not None and not self.conditioned_on:
            raise ValueError(
                "the model is one of P(x), but the examples come with conditions: give the"
                " examples alone; if its network does learn from conditions, name them, as in"
                ' Model(..., conditioned_on="class")'
            )

    def _check_given(self, condition: Tensor | None, examples: int) -> None:
        """Check the same but for a model of P(x), whose training may mark augmented examples."""
        if condition is None and self.conditioned_on:
            raise ValueError(
                f"the model is one of P(x|{self.conditioned_on}), but the examples come without"
                f" their {self.conditioned_on}: take the examples from run.batch(...)[0], give"
                " nelbo.Batch(x, condition), or measure P(x) with model.unconditional()"
            )
        check_count(condition, examples)

    @property
    def codes(self) -> int:
        """The number of codes of a dimension; 0 for a real number."""
        return self.process.codes

    @property
    def possible(self) -> int:
        """The number of codes that can be predicted, of all of them."""
        return self.codes

    @property
    def alike(self) -> bool:
        """Whether all dimensions have the same process, so that some of them represent all."""
        return self.process.alike

    @property
    def density(self) -> bool:
        """Whether P(x) is a density, not a probability."""
        return self.decoder.density

    def hash(self) -> str:
        """Return 16 hex digits of all weights, the classes of parts and the settings."""
        return model_hash(self)

    def output_hash(self, batch: Batch) -> str:
        """Return a hash of an output, given the condition of the first of these examples.

        It is that of a conditional network without weights, which `hash` does not tell from others
        as nothing but a condition says what it does; "" of any other.
        """
        return ""

    def given(self, batch: Batch) -> str:
        """Return what the bound of a batch is conditioned on, for the record; "" for P(x)."""
        return "" if batch.condition is None else batch.given or self.conditioned_on

    @property
    def dims(self) -> int:
        """D, the number of dimensions of one example."""
        return int(torch.Size(self.shape).numel())

    @property
    def rows(self) -> int:
        """Number of examples per network call that the memory around it allows."""
        return max(1, ROWS // (self.dims * self.head.numbers))

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def fit_statistics(self, x: Tensor) -> None:
        """Fit to training examples x, (N, *shape), the parts that are not trained by gradients."""
        self.process.fit_statistics(x)
        self.head.fit_statistics(x)

    def embed(self, x: Tensor) -> Tensor:
        """Return e, the data x, (B, *shape), in the space of the process."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"the model is for examples of shape {self.shape}; got {tuple(x.shape[1:])}"
            )
        e = self.process.embed(x)
        return e.to(self.dtype) if e.is_floating_point() else e

    def predict(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> "Prediction":
        """Call the network once; return its prediction of the data from z = z_t and condition."""
        self._check_given(condition, len(z))
        own = next(self.network.parameters())
        features, level = self.process.features(z).clamp(-FAR, FAR), self.process.log_snr_input(t)
        inputs = [features, level] + ([] if condition is None else [condition])
        inputs = [v.to(z.device, own.dtype) for v in inputs]
        # processes that share the weights must call the network equally often
        with _narrow(z.device, self.autocast or self.precision), fixed_rows(is_sharded(own)):
            output = self.calls(self.network, inputs)
        needed = self.head.output_shape(z)
        if output.shape != needed:
            raise ValueError(
                f"the network must give {tuple(needed)} for {type(self.head).__name__};"
                f" got {tuple(output.shape)}"
            )
        return self.head.read(output, z, t, self.process, self.dtype)

    @property
    def takes_time(self) -> bool:
        """Whether predictions depend on t too, and not on z_t alone, as of masks."""
        return self.process.mask is None

    def reverse(
        self, z: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> Distribution:
        """Return P(z_s|z_t, φ) for z = z_t and s < t."""
        return self.step(self.predict(z, t, condition), z, s, t, self.process)

    def likelihood(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> Distribution:
        """Return P(x|z_1, φ) for z = z_1 at the first times t."""
        return self.decoder(self.predict(z, t, condition), z, t, self.process)


def _narrow(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if precision is None else torch.autocast(device.type, precision)


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is cuda where there is one, else cpu.

    Raises:
        ValueError: if this machine has no such device, or it has no float64, as MPS.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "mps":
        raise ValueError(
            f"device {name!r} has no float64, in which everything around the network is computed;"
            " try cpu"
        )
    try:
        place = torch.zeros(1, device=name)
        place.item()  # which meta, that holds no numbers, does not give
        return place.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"there is no device {name!r} on this machine; try cpu") from None


@contextmanager
def measuring(model: Model, batch: Batch | None = None) -> Iterator[None]:
    """Inside, measure: evaluation mode, float64 around the network, no TF32, no autocast.

    Args:
        model: to measure.
        batch: examples to check, if any.

    Raises:
        ValueError: if a weight is not finite, the examples are not of the model, a model of
            P(x|c) lacks their conditions, or one of P(x) gets some.
    """
    check_finite(model, "the model")
    if batch is not None:
        model.check_condition(batch.condition, len(batch))
        check_examples(model, batch.x)
    modes = [(module, module.training) for module in model.modules()]  # some may be frozen
    before = model.dtype, model.precision
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        model.eval()
        model.dtype, model.precision = torch.float64, None
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(model.device.type, enabled=False))
            for process in {model.process, *model.process.factors}:
                stack.enter_context(process.schedule.remembering())
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.dtype, model.precision = before
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@dataclass
class Calls:
    """Number of rows that went through a network, by direction."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(network: nn.Module) -> Iterator[Calls]:
    """Inside, count the rows of the forward and backward passes of a network."""
    calls = Calls()

    def backward(gradient: Tensor) -> None:
        calls.backward += len(gradient)

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.forward += len(inputs[0])  # also of a call whose result is refused

    def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(backward)

    handles = network.register_forward_pre_hook(before), network.register_forward_hook(after)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def model_hash(model: Model) -> str:
    """Return 16 hex digits of the SHA-256 of weights, the classes of parts and settings."""
    parts = (model.network, model.process, model.process.schedule, model.decoder)
    return hash_of((*parts, model.head, model.step), model, model.settings)


def hash_of(parts: Iterable[nn.Module], whole_model: nn.Module, settings: str = "") -> str:
    """Return 16 hex digits of the SHA-256 of the classes of parts, settings and all weights."""
    digest = hashlib.sha256(settings.encode())
    for part in parts:
        digest.update(type(part).__name__.encode())
    for name, tensor in sorted(whole_model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        plain = whole(tensor.detach()).cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()[:16]
