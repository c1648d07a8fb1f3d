"""Results of an evaluation so far, in a file, so that it can be continued.

The tasks of a pass over the data (`blocks.map_blocks`) have random numbers of their own, so a task
that is in the file is not computed again. The result and its number of network calls are the same
as without an interruption, to the last bit.

Each of several processes writes its own tasks: the first one into the file, the others into parts
beside it. All read what is there, and join it at the end, so that another number of processes can
continue.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from nelbo._utils.distributed import gather, main_process_first, world
from nelbo._utils.files import check_writable
from nelbo._utils.tensor_files import read_tensors, write_tensors
from nelbo._version import __version__
from nelbo.data.schema import fingerprint
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Calls, Model, model_hash

T = TypeVar("T")
EVERY = 30.0  # seconds after which what was measured is written
CALLS = "calls"  # the name of the numbers of network calls of a task, forward and backward
PART = ".part"  # ends the name of a file of another process, with its rank


class Kept:
    """Results of tasks in a file.

    Args:
        path: the file; it need not exist.
        about: what the results depend on, by name.

    Raises:
        ValueError: the file is of another evaluation, or damaged.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        self.path, self.about, self.tensors = path, dict(about), dict[str, Tensor]()
        self.written = time.monotonic()
        for place in [path] * path.exists() + parts(path):
            tensors, known = read_tensors(place, hashed=True)
            for name, value in about.items():
                if known.get(name, value) != value:
                    raise ValueError(
                        f"{place} belongs to another evaluation: its {name} is {known[name]}, and"
                        f" now {value}; repeat that, or give another file"
                    )
            self.tensors |= tensors
            self.about = known | self.about
        check_writable(path)

    def write(self) -> None:
        """Write what this process knows, in its own place."""
        rank, _ = world()
        place = self.path.with_name(f"{self.path.name}{PART}{rank}") if rank else self.path
        write_tensors(place, self.tensors, self.about)
        self.written = time.monotonic()

    def join(self) -> None:
        """Write what all processes know in one file; all must call this."""
        for some in gather(self.tensors):
            self.tensors |= some

        def write() -> None:
            self.write()
            for part in parts(self.path):
                part.unlink(missing_ok=True)

        main_process_first(write)


def parts(path: Path) -> list[Path]:
    """Return the files beside this one that other processes wrote."""
    folder, start = path.absolute().parent, f"{path.name}{PART}"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    wanted = sorted(n for n in names if n.startswith(start) and n[len(start) :].isdigit())
    return [path.with_name(name) for name in wanted]


class Tasks:
    """The tasks of one pass, of which some may be known.

    Args:
        kept: the file.
        name: of the pass.
        calls: the counter of network calls.
    """

    def __init__(self, kept: Kept, name: str, calls: Calls) -> None:
        self.kept, self.name, self.calls = kept, name, calls
        self.begun = 0, 0

    def find(self, path: Sequence[int], rows: Tensor) -> Tensor | list[Tensor] | None:
        """Return the result of the task of this seed and rows, if known, and count its calls."""
        self.begun = self.calls.forward, self.calls.backward
        key, tensors = self._key(path, rows), self.kept.tensors
        if f"{key} {CALLS}" not in tensors:
            return None
        forward, backward = map(int, tensors[f"{key} {CALLS}"])
        self.calls.forward += forward
        self.calls.backward += backward
        if key in tensors:
            return tensors[key]
        count = sum(1 for name in tensors if name.startswith(f"{key} part "))
        return [tensors[f"{key} part {i}"] for i in range(count)]

    def add(self, path: Sequence[int], rows: Tensor, result: object) -> None:
        """Keep the result of the task that `find` has not found."""
        key, found = self._key(path, rows), dict[str, Tensor]()
        if isinstance(result, Tensor):
            found[key] = result
        else:
            parts = cast(Sequence[Tensor], result)
            found |= {f"{key} part {i}": part for i, part in enumerate(parts)}
        called = self.calls.forward - self.begun[0], self.calls.backward - self.begun[1]
        self.kept.tensors |= found | {f"{key} {CALLS}": torch.tensor(called)}
        if time.monotonic() - self.kept.written > EVERY:
            self.kept.write()

    def _key(self, path: Sequence[int], rows: Tensor) -> str:
        return f"{self.name} {' '.join(map(str, path))} {fingerprint(rows)}"


def once(tasks: Tasks | None, path: Sequence[int], rows: Tensor, make: Callable[[], T]) -> T:
    """Return the result of a task, a tensor or a list of them, which is made unless it is kept.

    Args:
        tasks: of the pass; None keeps nothing.
        path: of the seed of the task.
        rows: of the examples.
        make: computes it.
    """
    if tasks is None:
        return make()
    known = tasks.find(path, rows)
    if known is not None:
        return cast(T, known)
    made = make()
    tasks.add(path, rows, made)
    return made


@contextmanager
def keeping(
    path: Path | None, model: Model, batch: Batch, seed: int, about: Mapping[str, object]
) -> Iterator[Kept | None]:
    """Inside, keep what is measured in a file, also if it is interrupted; None without a file.

    Args:
        path: the file.
        model: that is measured.
        batch: the examples.
        seed: of everything random.
        about: other options that the results depend on.

    Raises:
        ValueError: the file is of another evaluation.
    """
    if path is None:
        yield None
        return
    given = "none" if batch.condition is None else fingerprint(batch.condition)
    known = {"model": model_hash(model), "data": fingerprint(batch.x), "conditions": given}
    known |= {"seed": str(seed), "nelbo": __version__, "torch": torch.__version__}
    known |= {"device": str(model.device), "network": model.output_hash(batch)}
    known["precision"] = str(model.autocast or "its own")
    kept = Kept(path, known | {name: str(value) for name, value in about.items()})
    try:
        yield kept
    except BaseException:
        kept.write()  # of this process alone: the others may be in the midst of a task
        raise
    kept.join()
