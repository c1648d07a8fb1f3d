"""Calls of a network, in as many rows as the memory of its device holds.

Without gradients the rows of a call are independent, so a call may be split, and its results stay
the same up to the rounding of float. Random numbers are drawn outside the network, for all rows,
so no draw depends on the split.

    first call       the rows of a fixed rule; it shows the memory of a row, m
    later calls      on CUDA, as many rows as take half of the free memory f:  f / (2 m)
    convolutions     on a CPU, always so few rows that the cache holds the layers of their images
    out of memory    half of the rows, again and again; that number is kept

With gradients, whose memory outlives the call, and within `fixed_rows` the fixed rule holds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from nelbo._utils.limits import free_memory, gibibytes

#: how errors of too little memory begin that are a plain RuntimeError
EXHAUSTED = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
#: pixels of the images in a call of convolutions on a CPU. Layers beyond some 32 MiB, for which
#: the C library asks the system each time, take up to twice the time
PIXELS = 2**14
#: patches of the images in a call of a transformer of patches there. More take up to 1.5 times the
#: time of each, and one image of few patches alone as much
PATCHES = 2**10

_fixed: ContextVar[bool] = ContextVar("fixed", default=False)


@contextmanager
def fixed_rows(fixed: bool = True) -> Iterator[None]:
    """Inside, split calls by the fixed rule alone: equal results to the last bit, or an error.

    Args:
        fixed: whether to; False changes nothing.
    """
    before = _fixed.set(_fixed.get() or fixed)
    try:
        yield
    finally:
        _fixed.reset(before)


class NetworkCalls:
    """Calls of one network, and what is known of the rows that its devices hold.

    Args:
        name: of the network, for the error.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        #: number of rows in a call, by the device, shape and type of a row
        self.known: dict[tuple[torch.device, torch.Size, torch.dtype], int] = {}
        #: the same that the cache of a CPU holds, None for any
        self.cached: dict[tuple[torch.device, torch.Size, torch.dtype], int | None] = {}

    def __call__(
        self, network: Callable[..., Tensor], inputs: Sequence[Tensor], rows: int | None = None
    ) -> Tensor:
        """Return network(*inputs), (B, ...).

        Args:
            network: computes each row of its result from that row of the inputs.
            inputs: (B, ...) each, on one device.
            rows: the fixed rule, which the first call follows; None for all rows.

        Raises:
            ValueError: one row does not fit the memory, or the network sets the seed.
        """
        seed = torch.initial_seed()
        total, like = len(inputs[0]), inputs[0]
        key = like.device, like.shape[1:], like.dtype
        adaptive = not torch.is_grad_enabled() and not _fixed.get()
        if key not in self.cached:
            self.cached[key] = _that_cache_holds(network, like)
        if adaptive and (cached := self.cached[key]):
            rows = min(rows or cached, cached)
        outputs: list[Tensor] = []
        done = 0
        while done < total or not outputs:
            most = self.known.get(key) if adaptive else None
            some = [v[done : done + (most or rows or total)] for v in inputs]
            count = len(some[0])
            if not adaptive:
                outputs.append(network(*some))
                done += count
                continue
            before = _allocated(like.device)
            output = _unless_exhausted(network, some)
            if output is not None:
                outputs.append(output)
                done += count
                if most is None and count == rows:
                    self.known[key] = max(count, _that_fit(like.device, before, count))
            elif count > 1:
                self.known[key] = count // 2
            else:
                raise ValueError(self._one_row_too_many(like))
        if torch.initial_seed() != seed:
            raise ValueError(
                f"the network {self.name} sets the seed of torch's random numbers when it is"
                " called, so that noise would come again; take manual_seed out of it, or call it"
                " inside torch.random.fork_rng()"
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _one_row_too_many(self, like: Tensor) -> str:
        row = "x".join(map(str, like.shape[1:])) or "one number"
        free, _ = device_memory(like.device)
        return (
            f"the network {self.name} does not fit the memory of {like.device} even with 1 row"
            f" ({row}, {str(like.dtype).removeprefix('torch.')}); {gibibytes(free)} are free; use"
            " a device with more memory, or free some of it"
        )


def device_memory(device: torch.device) -> tuple[float, float]:
    """Return the bytes that are free on a device, and the most that torch has ever allocated.

    The latter is 0 where torch does not count them, as on a CPU.
    """
    if device.type != "cuda":
        return free_memory(), 0.0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept, torch.cuda.max_memory_allocated(device)


def _that_cache_holds(network: Callable[..., Tensor], like: Tensor) -> int | None:
    """Return how many images, (B, C, H, W), a call of convolutions on a CPU has at most.

    None for other networks, data and devices.
    """
    if not isinstance(network, nn.Module) or like.ndim != 4 or like.device.type != "cpu":
        return None
    parts = (part for part in network.modules() if isinstance(part, nn.Conv2d))
    least = min((math.prod(part.stride) for part in parts), default=None)
    if least is None:
        return None
    # a transformer of patches has convolutions for these alone, in steps of their size
    pixels = PIXELS if least == 1 else PATCHES * least
    return max(1, pixels // like.shape[2:].numel())


def _allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0.0


def _that_fit(device: torch.device, before: float, rows: int) -> int:
    """Return the rows that take half of the free memory, by a call of `rows` rows; 0 if unknown.

    `before`: bytes allocated before that call. An earlier peak may be larger than that of the
    call; then the rows are fewer than they could be.
    """
    free, peak = device_memory(device)
    return int(free / 2 * rows / (peak - before)) if peak > before else 0


def is_exhausted(error: Exception) -> bool:
    """Return whether an error is one of too little memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in EXHAUSTED)


def _unless_exhausted(network: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor | None:
    """Return network(*inputs); None, with nothing of the call left in memory, if that ran out."""
    try:
        return network(*inputs)
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
    # here, as the error holds the frames of the call, and they its tensors
    if inputs[0].device.type == "cuda":
        torch.cuda.empty_cache()
    return None
