"""The state from which a training continues, in one file; and the previous state.

    model.*, ema.*   the weights (with a learned γ) and their moving average
    best.*           the averaged weights of the best bound so far, as in `model.safetensors`; left
                     out where they are the newest
    law.*            the timestep sampler
    optimizer.i.*    moments of the i-th parameter
    progress         `training.config.Progress`

The file has five times the bytes of the weights, or four if the newest are the best; so a run
folder has six or five times, and while it is trained, with the previous state, up to 11. All are
needed: moments, raw and averaged weights continue exactly, the best ones come back after a crash,
and the previous state outlives a damaged file. It is removed when the training has ended.

No generator state is saved: randomness follows from the seed and the step (see `trainer`). If the
newest file is missing, or damaged according to its hash, the previous one is used; the steps since
then are repeated, with the same result.
"""

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nelbo._utils import limits
from nelbo._utils.sharding import divided_like, gathered
from nelbo._utils.tensor_files import OTHER, put_weights, read_tensors, write_tensors
from nelbo._utils.validation import validated
from nelbo.runs.config import BEFORE, STATE
from nelbo.training.config import Progress

if TYPE_CHECKING:
    from nelbo.training.trainer import Trainer

#: fields of `Progress` that each state has; older versions did not write the others
WRITTEN = {"step", "seconds", "best", "best_step", "recent"}


def save(out: Path, learner: "Trainer") -> None:
    """Save the newest state of the run `out`; the previous newest becomes the fallback.

    The first process writes it; if the network is sharded, all processes contribute their shards.
    """
    tensors = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in learner.ema.state_dict().items()}
    if not _best_is_newest(learner.at):
        tensors |= {f"best.{k}": v for k, v in learner.best.items()}
    tensors |= {f"law.{k}": v for k, v in learner.law.state_dict().items()}
    for i, moments in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    about = {"weights": "raw and ema", "progress": learner.at.__dict__}
    if tensors := gathered(tensors):
        write_tensors(out / STATE, tensors, about, None if learner.ended else out / BEFORE)


def _best_is_newest(at: Progress) -> bool:
    """Return whether the averaged weights of this step are those of the best bound."""
    return at.best_step == at.step and at.best < math.inf


def is_in(out: Path) -> bool:
    """Return whether the run folder has a state."""
    return (out / STATE).is_file() or (out / BEFORE).is_file()


def load(out: Path, learner: "Trainer", because: str = OTHER) -> None:
    """Restore the state of the run `out` into a trainer; `because` is as for `put_weights`.

    Raises:
        ValueError: no state is intact, it is of another model, or it is a link out of the run.
    """
    path, (tensors, about) = out / STATE, _newest(out)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    modules = (("model.", learner.model), ("ema.", learner.ema), ("law.", learner.law))
    for prefix, module in modules:
        put_weights(module, part(prefix), str(path), because)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        i, _, moment = name.partition(".")
        if not i.isdecimal():
            raise ValueError(f"{path} has moments of unknown parameters; train again")
        own = parameters[int(i)] if int(i) < len(parameters) else tensor
        state.setdefault(int(i), {})[moment] = divided_like(own, tensor)
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    best = part("best.")
    try:
        progress = validated(Progress, about.get("progress"), str(path))
    except ValueError as error:
        raise ValueError(
            f"{error}: it does not say where the training stood; train again"
        ) from None
    if not best and _best_is_newest(progress):
        best = {k: v.clone() for k, v in part("ema.module.").items()}
    if (
        len(state) != (len(parameters) if progress.step else 0)
        or not about["progress"].keys() >= WRITTEN
        or best.keys() not in (set(), learner.average.state_dict().keys())
    ):
        raise ValueError(f"{path} lacks a part of the state; train again")
    learner.at, learner.best = progress, best


def _newest(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the newest intact state; if that is the previous one, make it the newest.

    Raises:
        ValueError: neither is intact, or one is a link out of the run.
    """
    path, before = (limits.contained(out / name, out) for name in (STATE, BEFORE))
    try:
        return read_tensors(path, hashed=True)
    except (ValueError, FileNotFoundError) as error:
        try:
            found = read_tensors(before, hashed=True)
        except (ValueError, FileNotFoundError):
            raise error from None
        step = found[1].get("progress", {}).get("step")
        what = "damaged" if path.exists() else "missing"
        warnings.warn(
            f"{path} is {what}; the state before it is used, of step {step}", stacklevel=2
        )
        os.replace(before, path)
        return found
