"""What a file may make us do: its sizes are believed as far as its bytes account for them.

A file from a stranger may claim anything. Before anything is allocated for it,

    a pipe, a socket or a device is refused         `regular`
    what it has and claims, against free memory     `check_file`, `check_memory`
    what is built for it against the numbers in it  `within_file`
    JSON is read only up to a size, and is JSON     `read_json`
    a folder is searched as long as that pays       `check_search`

The sizes here are far beyond any real file of their kind. `NELBO_TRUST_FILES=1` in the environment
lifts them; nothing lifts that no file is executed.
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

TRUST = "NELBO_TRUST_FILES"
#: bytes of a JSON file: a table of 1000 columns of 1000 categories takes 16 MiB
JSON = 2**26
#: bytes of memory for each byte of JSON, most of which may be brackets
OBJECTS = 30
#: bytes of the events of a run, 80 000 validations, and of one of them
EVENTS, EVENT = 2**24, 2**12
#: bytes of an encoded image: more than Pillow's largest image has uncompressed, at 16 bits RGBA
IMAGE = 2**30
#: bytes that any file may become when it is unpacked, and how many times its own size beyond that:
#: sparse images and constant columns stay below
UNPACKED, INFLATION = 2**27, 256
#: no deflated bytes hold more than so many times their number
DEFLATED = 1032
#: bytes of the header of a NumPy array, as numpy itself has it
ARRAY_HEADER = 10_000
#: times of a foreign schedule; the usual number is 1000
STEPS = 10**6
#: numbers that a model may hold beside 4 times those in its weights: tables of levels and the like
BESIDE = 2**25
#: files that a folder of data may hold beside 8 for each that is data: the annotations of ImageNet
#: are half as many
OTHERS = 2**20
#: factories of torch whose size is an argument and not that of anything which is there
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
#: what sizes that cannot be lead to
IMPOSSIBLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
#: tensors of a model, at most: more than 1000 blocks of any network, which takes seconds
TENSORS = 2**14


def trusted() -> bool:
    """Whether the user lifts the limits of size."""
    return os.environ.get(TRUST) == "1"


def regular(path: Path) -> int:
    """The bytes of a file; a link is followed.

    Raises:
        OSError: there is none, or it is a folder.
        ValueError: it is a pipe, a socket or a device, to read which may never end.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path} is a folder where a file is needed")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{path} is a pipe, a socket or a device; copy what it holds to a file, and give that"
        )
    return found.st_size


def contained(path: Path, folder: Path) -> Path:
    """The path, which no link leads out of its folder.

    Raises:
        ValueError: one does.
    """
    if not trusted() and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link out of {folder} to {path.resolve()}; copy that file there, or set"
            f" {TRUST}=1 if you made the link"
        )
    return path


def check_memory(size: float, what: str) -> None:
    """Raise ValueError where so many bytes are more than is free; `what` needs them."""
    free = free_memory()
    if size > free and not trusted():
        raise ValueError(
            f"{what} would take {_gibibytes(size)} of memory, and {_gibibytes(free)} are free; if"
            f" that is right, use a larger machine, or set {TRUST}=1 to try all the same"
        )


def check_file(path: Path, times: float = 1) -> None:
    """Raise ValueError where so many times a file are more than is free; else as `regular`."""
    check_memory(times * regular(path), str(path))


def inflates(size: float, packed: float) -> bool:
    """Whether so many bytes are suspiciously many for those that they are packed in."""
    return size > max(UNPACKED, INFLATION * packed) and not trusted()


def check_unpacked(size: float, packed: float, what: str, times: float = 1) -> None:
    """Raise ValueError before bytes are unpacked into so many that they only fill memory.

    Args:
        size: bytes when unpacked.
        packed: bytes in the file.
        what: is unpacked.
        times: how many times the size memory is taken meanwhile.
    """
    if inflates(size, packed):
        raise ValueError(
            f"{what} would be unpacked from {int(packed)} bytes to {_gibibytes(size)}, as no data"
            f" are; if that is right, save it without compression, or set {TRUST}=1"
        )
    check_memory(times * size, what)


def check_search(folder: Path, found: int, seen: int, what: str) -> None:
    """Raise ValueError where a search for data saw far more than it found: `folder` is none."""
    if seen > 9 * found + OTHERS and not trusted():
        raise ValueError(
            f"{folder} holds {found} {what} among the first {seen} files; give a folder of them"
            f" alone, or set {TRUST}=1 to search all of it"
        )


def free_memory() -> float:
    """Bytes that this process can still have, as far as the system tells; else infinity."""
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
    """What a container may still use."""
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
    """What `ulimit -v` leaves."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most == resource.RLIM_INFINITY:
            return math.inf
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return float(most - pages * resource.getpagesize())
    except (ImportError, OSError, ValueError):
        return math.inf


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def read_json(path: Path, infinite: bool = False) -> object:
    """What a JSON file says.

    Args:
        path: the file.
        infinite: take Infinity and -Infinity, which are no JSON, as Python writes them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, too large, or not JSON; NaN and infinities are not.
    """
    check_json(path)
    return parse_json(path.read_bytes(), str(path), infinite)


def check_json(path: Path, most: int = JSON) -> None:
    """Raise ValueError where a file has more bytes than JSON of its kind; else as `regular`."""
    size = regular(path)
    if size > most and not trusted():
        raise ValueError(
            f"{path} has {size} bytes, and JSON here has at most {most}; set {TRUST}=1 if it is"
            " yours"
        )
    check_memory(OBJECTS * size, str(path))


def parse_json(text: str | bytes, where: str, infinite: bool = False) -> object:
    """What a JSON text says; `infinite` as for `read_json`.

    Raises:
        ValueError: it is not JSON, too deep, or has a number that no float is.
    """
    try:
        constant = _infinity if infinite else _no_number
        return json.loads(text, parse_constant=constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _infinity(name: str) -> float:
    return _no_number(name) if name == "NaN" else float(name)


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:32]} is beyond all numbers")
    return value


def check_integers(values: Iterable[object], most: int, what: str) -> None:
    """Raise ValueError where one of the values is an integer beyond `most`."""
    for value in values:
        if isinstance(value, int) and value > most and not trusted():
            raise ValueError(f"{what} cannot be {value}; at most {most} are read")


class Within(TorchFunctionMode):
    """Inside, torch makes no more than so many tensors, of so many numbers, from sizes.

    What is made from other tensors is not counted, for those were.

    Args:
        numbers: of all tensors together.
        tensors: how many of them.
        why: the sentence of the error.

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
    """Inside, a model is made for the tensors of a file, of whose size it can be.

    Raises:
        ValueError: inside, before more is allocated; or sizes of which nothing can be made.
    """
    numbers = sum(tensor.numel() for tensor in tensors.values())
    why = (
        f"{where} has {numbers} numbers, and the configuration beside it asks for far more: it"
        " belongs to another architecture"
    )
    try:
        with Within(4 * numbers + BESIDE, 4 * len(tensors) + TENSORS // 16, why):
            yield
    except IMPOSSIBLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"no model can be made of the configuration beside {where}: {reason}"
        ) from None


def within_memory(what: str) -> Within:
    """Inside, what is made fits into free memory, as float32."""
    free = free_memory()
    return Within(
        free / 4, TENSORS, f"{what} takes more than the {_gibibytes(free)} of memory that are free"
    )


def _count(func: Callable[..., object], args: Sequence[object], kwargs: Mapping) -> float:
    """Numbers of the tensor that a factory makes, which it does not yet."""
    try:
        made = func(*args, **{**kwargs, "device": "meta"})
    except (RuntimeError, TypeError, OverflowError):  # beyond all that is addressed
        return math.inf
    return made.numel() if isinstance(made, Tensor) else 0
