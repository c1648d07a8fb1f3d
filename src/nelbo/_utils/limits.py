"""Limits on untrusted files: a file can demand only resources that its bytes account for.

An untrusted file may claim any size. Before memory is allocated for it,

    pipes, sockets and devices are refused                      `regular`
    the size that it has or claims is checked against memory    `check_file`, `check_memory`
    a model is checked against the number of its weights        `within_file`
    JSON is checked for its size and syntax                     `read_json`
    the search of a folder stops where it finds too little      `check_search`

The limits are far beyond any real file of their kind. `NELBO_TRUST_FILES=1` in the environment
lifts them; even then no file is executed.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TRUST = "NELBO_TRUST_FILES"  # environment variable
#: bytes of a JSON file: a table of 1000 columns of 1000 categories takes 16 MiB
JSON = 2**26
#: bytes of memory for each byte of JSON, most of which may be brackets
OBJECTS = 30
#: bytes of the events of a run, for 80 000 validations, and bytes of one event
EVENTS, EVENT = 2**24, 2**12
#: bytes of an encoded image: more than Pillow's largest image takes uncompressed, as 16-bit RGBA
IMAGE = 2**30
#: bytes to which any file may unpack, and the factor by which larger ones may grow: sparse images
#: and constant columns stay below
UNPACKED, INFLATION = 2**27, 256
#: the factor by which deflated bytes can grow, at most
DEFLATED = 1032
#: bytes of the header of a NumPy array, the limit of NumPy itself
ARRAY_HEADER = 10_000
#: times of a schedule of another program; the usual number is 1000
STEPS = 10**6
#: numbers that a model may hold beyond 4 times those of its weights, for tables of levels and such
BESIDE = 2**25
#: files that a folder may hold beyond 9 for each file of data: the annotations of ImageNet are
#: half as many
OTHERS = 2**20
#: functions of torch that allocate a tensor whose size is an argument
FACTORIES = (
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.linspace,
    torch.arange,
    torch.eye,
    torch.rand,
    torch.randn,
)
#: errors to which impossible sizes lead
IMPOSSIBLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
#: tensors of a model, at most: more than 1000 blocks of any network, made in seconds
TENSORS = 2**14


def trusted() -> bool:
    """Return whether the user lifts the limits."""
    return os.environ.get(TRUST) == "1"


def regular(path: Path) -> int:
    """Return the size of a regular file in bytes; links are followed.

    Raises:
        OSError: if there is no such file, or it is a folder.
        ValueError: if it is a pipe, a socket or a device, which could be read without end.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path} is a folder where a file is needed")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{path} is a pipe, a socket or a device; copy its content to a file, and give that"
        )
    return found.st_size


def contained(path: Path, folder: Path) -> Path:
    """Return the path, if no link leads out of the folder.

    Raises:
        ValueError: if one does.
    """
    if not trusted() and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of {folder}; copy that file into the"
            f" folder, or set {TRUST}=1 if you made the link"
        )
    return path


def check_memory(size: float, what: str) -> None:
    """Raise a ValueError if `what` needs more bytes, `size`, than are free."""
    free = free_memory()
    if size > free and not trusted():
        raise ValueError(
            f"{what} would take {gibibytes(size)} of memory, and {gibibytes(free)} are free; if"
            f" that is right, use a larger machine, or set {TRUST}=1 to try anyway"
        )


def check_file(path: Path, times: float = 1) -> None:
    """Raise a ValueError if `times` the size of a file is not free; also as `regular`."""
    check_memory(times * regular(path), str(path))


def inflates(size: float, packed: float) -> bool:
    """Return whether `size` bytes are suspiciously many to be unpacked from `packed` bytes."""
    return size > max(UNPACKED, INFLATION * packed) and not trusted()


def check_unpacked(size: float, packed: float, what: str, times: float = 1) -> None:
    """Raise a ValueError if a compressed file would unpack to suspiciously many bytes.

    Args:
        size: bytes when unpacked.
        packed: bytes in the file.
        what: name of the file, for the message.
        times: memory that unpacking takes, in multiples of `size`.
    """
    if inflates(size, packed):
        raise ValueError(
            f"{what} would be unpacked from {int(packed)} bytes to {gibibytes(size)}, too much"
            f" for data; if that is right, save it without compression, or set {TRUST}=1"
        )
    check_memory(times * size, what)


def check_search(folder: Path, found: int, seen: int, what: str) -> None:
    """Raise a ValueError if a search for data in a folder finds too few among many files.

    Args:
        folder: that is searched.
        found: files of data so far.
        seen: files so far.
        what: the kind of data, for the message.
    """
    if seen > 9 * found + OTHERS and not trusted():
        raise ValueError(
            f"{folder} holds {found} {what} among the first {seen} files; give a folder of them"
            f" alone, or set {TRUST}=1 to search all of it"
        )


def free_memory() -> float:
    """Return the bytes that this process can still allocate; infinity where unknown."""
    return max(0.0, min(_of_system(), _of_group(), _of_process()))


def _of_system() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _of_group() -> float:
    """Return the bytes that the control group of a container can still use."""
    group = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return float((group / most).read_text()) - float((group / used).read_text())
        except (OSError, ValueError):  # also "max": no limit
            continue
    return math.inf


def _of_process() -> float:
    """Return the bytes that `ulimit -v` leaves."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most == resource.RLIM_INFINITY:
            return math.inf
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return float(most - pages * resource.getpagesize())
    except (ImportError, OSError, ValueError):
        return math.inf


def gibibytes(size: float) -> str:
    """Return bytes in words, such as "1.5 GiB"."""
    return f"{size / 2**30:.3g} GiB"


def read_json(path: Path, infinite: bool = False) -> object:
    """Return the content of a JSON file.

    Args:
        path: the file.
        infinite: accept Infinity and -Infinity, which are not JSON but written by Python.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a regular file, too large, or not JSON, such as with NaN.
    """
    check_json(path)
    return parse_json(path.read_bytes(), str(path), infinite)


def check_json(path: Path, most: int = JSON) -> None:
    """Raise a ValueError if a file has more than `most` bytes; also as `regular`."""
    size = regular(path)
    if size > most and not trusted():
        raise ValueError(
            f"{path} has {size} bytes, more than the {most} that are read as JSON; set {TRUST}=1"
            " if you trust it"
        )
    check_memory(OBJECTS * size, str(path))


def parse_json(text: str | bytes, where: str, infinite: bool = False) -> object:
    """Return the content of a JSON text; `infinite` as for `read_json`.

    Args:
        text: the text.
        where: it comes from, for the message.
        infinite: accept infinities.

    Raises:
        ValueError: if it is not JSON, nested too deeply, or has a number beyond all floats.
    """
    try:
        constant = _infinity if infinite else _no_number
        return json.loads(text, parse_constant=constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _infinity(name: str) -> float:
    return _no_number(name) if name == "NaN" else float(name)


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:32]} is too large a number")
    return value


def check_integers(values: Iterable[object], most: int, what: str) -> None:
    """Raise a ValueError if one of the values is an integer beyond `most`."""
    for value in values:
        if isinstance(value, int) and value > most and not trusted():
            raise ValueError(f"{what} cannot be {value}; at most {most} are read")


class Within(TorchFunctionMode):
    """Inside, torch functions that take a size allocate no more than a number of tensors.

    Tensors computed from other tensors do not count.

    Args:
        numbers: that all tensors may hold together.
        tensors: how many of them.
        why: the message of the error.

    Raises:
        ValueError: inside, before more is allocated.
    """

    def __init__(self, numbers: float, tensors: int, why: str) -> None:
        super().__init__()
        self.numbers, self.tensors, self.why = numbers, tensors, why

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in FACTORIES:
            self.numbers -= _count(func, args, kwargs)
            self.tensors -= 1
            if min(self.numbers, self.tensors) < 0 and not trusted():
                raise ValueError(self.why)
        return func(*args, **kwargs)


@contextmanager
def within_file(tensors: Mapping[str, Tensor], where: object) -> Iterator[None]:
    """Inside, let a model allocate only about as much as the tensors of its file.

    Args:
        tensors: of the file, by name.
        where: they come from, for the message.

    Raises:
        ValueError: inside, before more is allocated; or if the sizes are impossible.
    """
    numbers = sum(tensor.numel() for tensor in tensors.values())
    why = (
        f"{where} has {numbers} numbers, but the configuration beside it needs far more: it"
        " belongs to another architecture"
    )
    try:
        with Within(4 * numbers + BESIDE, 4 * len(tensors) + TENSORS // 16, why):
            yield
    except IMPOSSIBLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"no model can be built from the configuration beside {where}: {reason}"
        ) from None


def within_memory(what: str) -> Within:
    """Inside, let tensors allocate only as much as is free, as float32.

    Args:
        what: takes the memory, for the message.
    """
    free = free_memory()
    return Within(
        free / 4, TENSORS, f"{what} takes more than the {gibibytes(free)} of memory that are free"
    )


def _steps(start: float, end: float | None = None, step: float = 1, **_: object) -> float:
    """Return the size of `torch.arange`."""
    return math.ceil(start if end is None else (end - start) / step)


#: sizes of those whose first call on the device "meta" imports 500 modules, a second of work
COUNTS: dict[Callable[..., object], Callable[..., float]] = {
    torch.arange: _steps,
    torch.eye: lambda n, m=None, **_: n * (n if m is None else m),
    torch.linspace: lambda start, end, steps, **_: steps,
}


def _count(func: Callable[..., object], args: Sequence[object], kwargs: Mapping) -> float:
    """Return the size of the tensor that a function would allocate, without allocating it."""
    try:
        if func in COUNTS:
            return COUNTS[func](*args, **kwargs)
        alike: Callable[..., object] = torch.rand if func is torch.randn else func
        made = alike(*args, **{**kwargs, "device": "meta"})
    except (RuntimeError, TypeError, ArithmeticError):  # beyond the address space
        return math.inf
    return made.numel() if isinstance(made, Tensor) else 0
