"""The module of a model of tokens: its calls, its time input and what they must return."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.network_calls import NetworkCalls, fixed_rows
from nelbo._utils.numerics import digest_of
from nelbo._utils.sharding import is_sharded
from nelbo.integrations.token_scores import Reading
from nelbo.integrations.transformers_warnings import without_covered

PROBED = 16  # tokens of the calls that find the vocabulary and the direction, at most
NO_TIMES = ("attention_mask", "inputs_embeds")  # second inputs of modules without a time input
HASHED = 64  # shares α at which the values of a time input say which function it is
#: the time input of a module, from α_t, the share of tokens that noise leaves, shape (B,)
Clock = Callable[[Tensor], Tensor]
CLOCKS: dict[str, Clock] = {
    "masked": lambda alpha: 1 - alpha,
    "sigma": lambda alpha: -alpha.clamp(min=1e-4).log(),
}


class TokenNetwork(nn.Module):
    """A module behind a process of tokens: hidden ones become its mask id; logits as a tensor.

    Args:
        module: see `wrap_tokens`.
        mask_id: its id for a hidden token; None where noise hides none.
        vocabulary: the number V of ids, which is the mask of the process.
        clock: its time input from α_t; None for a module without a time input.
        reading: logits from its output; None if it returns them.
    """

    def __init__(
        self,
        module: nn.Module,
        mask_id: int | None,
        vocabulary: int,
        clock: Clock | None,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self.module, self.mask_id, self.vocabulary = module, mask_id, vocabulary
        self.clock, self.reading = clock, reading
        self.calls = NetworkCalls(type(module).__name__)
        # `Model` asks the first parameter for device and dtype
        if next(module.parameters(), None) is None:
            self.reference = nn.Parameter(torch.zeros(()), requires_grad=False)

    @override
    def forward(self, z: Tensor, alpha: Tensor, spans: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Return the logits of all tokens that are present, (·, V) or (B, L, V).

        Args:
            z: ids or the mask, (B, L).
            alpha: α_t, (B,).
            spans: rows with the length of their texts; one call for each.
        """
        ids = z if self.mask_id is None else torch.where(z == self.vocabulary, self.mask_id, z)
        if len(spans) == 1:
            return self._call(ids[:, : spans[0][1]], alpha)
        parts = [self._call(ids[rows, :size], alpha[rows]) for rows, size in spans]
        return torch.cat([part.flatten(0, 1) for part in parts])

    def _call(self, ids: Tensor, alpha: Tensor) -> Tensor:
        inputs = [ids] if self.clock is None else [ids, self.clock(alpha)]
        own = next(self.parameters())
        try:
            # processes that share the weights must call the module equally often
            with fixed_rows(is_sharded(own)):
                output = self.calls(partial(call, self.module), inputs)
        except IndexError as error:
            raise ValueError(
                f"the module fails on texts of {ids.shape[1]} tokens ({error}); give the largest"
                " number that it takes as length, and divide longer texts into chunks"
            ) from error
        return output if self.reading is None else self.reading(output, ids, alpha)


def call(module: nn.Module, ids: Tensor, time: Tensor | None = None) -> Tensor:
    """Return the logits of a module for ids, (B, L, V).

    Raises:
        ValueError: if it returns something else.
    """
    inputs = [ids]
    if time is not None:
        own = next(module.parameters(), time)
        inputs.append(time.to(own.device, torch.promote_types(own.dtype, torch.float32)))
    with without_covered():
        found: object = module(*inputs)
    logits = getattr(found, "logits", found)
    if isinstance(logits, Tensor):
        logits = logits.to(ids.device)  # the last of several devices
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != 3
        or logits.shape[:2] != ids.shape
        or not logits.is_floating_point()
    ):
        got = type(logits).__name__
        if isinstance(logits, Tensor):
            got = f"{tuple(logits.shape)}, {logits.dtype}"
        raise ValueError(
            f"the module must return logits ({', '.join(map(str, ids.shape))}, V), real numbers,"
            f" as a tensor or as .logits; got {got}"
        )
    return logits


def clock_of(time: str | Clock | None) -> Clock | None:
    """Return the function of a time input, by its name or as it is; None for no such input."""
    if isinstance(time, str):
        if time not in CLOCKS:
            raise ValueError(f"time must be {', '.join(CLOCKS)} or a function of α; got {time!r}")
        return CLOCKS[time]
    return time


def clock_in_words(clock: Clock | None) -> str:
    """Return what a time input says, for a note."""
    known = {
        CLOCKS["masked"]: "the share of tokens that noise has changed",
        CLOCKS["sigma"]: "σ, minus the log of the share of tokens that noise leaves",
    }
    if clock is None:
        return "has no time input"
    says = known.get(clock, "a function of the share of tokens that noise leaves")
    return f"has {says} as its time input"


def described(clock: Clock | None) -> str:
    """Return what says which function a time input is, in the hash of a model."""
    if clock is None:
        return "none"
    return digest_of(clock(torch.arange(1, HASHED + 1, dtype=torch.float64) / (HASHED + 1)))


def probe(
    module: nn.Module, mask_id: int | None, shift: int, clock: Clock | None, length: int | None
) -> Tensor:
    """Return the logits of a module for masks alone, after a check that it looks at later tokens.

    Where there are no masks, it sees the id 0. The logits are (1, L, V), of few tokens.

    Raises:
        ValueError: if a token changes the logits at later places, and none at earlier ones.
    """
    if clock is not None:
        _check_takes_time(module)
    size = min(length or PROBED // 2, PROBED)
    device = next(module.parameters(), torch.zeros(0)).device
    time = None if clock is None else clock(torch.zeros(1, dtype=torch.float64))
    modes = [(each, each.training) for each in module.modules()]  # some may be frozen
    module.eval()
    try:
        with torch.no_grad():
            ids = torch.full((1, size), mask_id or 0, device=device)
            try:
                base = call(module, ids, time)
            except (IndexError, RuntimeError, TypeError) as error:
                extra, takes = ("", "no") if time is None else (" and a time", "a")
                reason = str(error).strip().split("\n")[0]
                raise ValueError(
                    f"the module fails on {size} ids {mask_id or 0}{extra} ({reason}); give its"
                    " largest number of tokens as length, and check that the mask_id is one of"
                    f" its ids, and that it takes {takes} time"
                ) from error
            other = 0 if mask_id else 1
            last, first = ids.clone(), ids.clone()
            last[:, -1] = first[:, 0] = other
            middle = max(1, size - 1)
            looks_ahead = not torch.equal(call(module, last, time)[:, :middle], base[:, :middle])
            looks_back = size > 1 and not torch.equal(
                call(module, first, time)[:, 1:], base[:, 1:]
            )
    finally:
        for each, mode in modes:
            each.training = mode
    if looks_back and not looks_ahead:
        raise ValueError(
            "the logits of the module never depend on later tokens, so it reads from left to"
            " right: as a diffusion model its bound would be loose; score it left to right"
        )
    return base


def _check_takes_time(module: nn.Module) -> None:
    """Raise a ValueError if the second input of a module is no time, though it takes numbers."""
    try:
        names = [*signature(module.forward).parameters]
    except (TypeError, ValueError):  # one that Python cannot see
        return
    second = next(iter(names[1:2]), "")
    if second in NO_TIMES:
        raise ValueError(
            f"{type(module).__name__} takes {second} after the ids, and no time; leave time out,"
            " or wrap a module that is called as module(ids, time)"
        )
