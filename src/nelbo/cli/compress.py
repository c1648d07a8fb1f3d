"""`nelbo compress` and `nelbo decompress`: code data in as many bits as their bound, and back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nelbo.cli.common import Spacing, say, say_of_formulas

if TYPE_CHECKING:
    from nelbo.codec.files import Progress
    from nelbo.runs.run import Run


def compress(
    run: Path,
    data: str,
    *,
    out: Path,
    steps: int = 32,
    grid: Spacing = "best",
    effort: int = 1,
    block: int = 1000,
    verify: bool = True,
    precision: Literal["float64", "float32"] = "float64",
    device: str = "cpu",
) -> None:
    """Compress DATA without loss, into a file of about as many bits as the bound of the run.

    Under torchrun the processes share the blocks; the file is the same.
    It needs constriction: pip install 'nelbo[codec]'.

    Parameters
    ----------
    run
        A run folder of discrete data. decompress needs it too: it is not part of the file.
    data
        Data that fit the run's schema: a .npy or .npz file, a .png file or a folder of them (of
        any size), a table, a .txt file or a folder of them.
    out
        A .nlb file that does not exist.
    steps
        T of the bound that is coded: more steps make a smaller file, and take longer. Text is
        shortest with one step for each symbol of a chunk.
    grid
        The times of the steps: best for this run, or uniform.
    effort
        K, the width of a beam search for a file that is shorter than the bound: each example is
        coded in 4 ways after each of the K shortest beginnings. decompress does not search.
    block
        Approximate number of examples in a block; blocks are coded independently of each other.
    verify
        Decompress and compare before the file is written.
    precision
        Precision of the network. float32 is faster, and decodes only on the same machine and
        versions.
    device
        Where to run the network; decompress needs the same kind.
    """
    with _at_work("compress", run, device) as (rank, loaded, _):
        found = loaded.compress(
            data,
            out,
            steps,
            grid=grid,
            effort=effort,
            block=block,
            precision=precision,
            verify=verify,
            progress=rank == 0,
        )
    if rank:
        return
    for note in found.notes:
        say(f"note: {note}")
    bits = f"{found.bits_per_dim:.3f} bits/{loaded.model.dimension}"
    if loaded.config.schema.tokenizer is not None:
        bits += f", {8 * found.compressed / found.original:.3f} bits/byte of the text,"
    say(f"{found.original} bytes compressed to {found.compressed} in {out}: {bits} in all")


def decompress(
    run: Path, file: Path, *, out: Path, salvage: bool = False, device: str = "cpu"
) -> None:
    """Restore the data in a compressed FILE: exactly, or not at all.

    Under torchrun the processes share the blocks.
    Exit codes: 2 for a wrong command line, 3 for a damaged file, 4 for another run, 5 for a
    machine or versions on which the data would not be decoded correctly.

    Parameters
    ----------
    run
        The run folder with which it was compressed.
    file
        A .nlb file.
    out
        Where to write the data, in their original format; it must not exist.
    salvage
        Restore the intact blocks of a damaged file and name the others; the exit code is 3.
    device
        Where to run the network, of the kind on which it was compressed.
    """
    from nelbo.codec.errors import CorruptFileError
    from nelbo.codec.files import decompress_file

    with _at_work("decompress", run, device) as (rank, loaded, progress):
        found = decompress_file(
            loaded.model, loaded.config.schema, file, out, salvage=salvage, progress=progress
        )
    if rank:
        return
    if out.is_file():
        say_of_formulas(out, out.read_bytes())
    say(f"{len(found.x)} of {found.header.examples} examples in {out}")
    if found.lost:
        lost = ", ".join(f"{first}..{first + count - 1}" for first, count in found.lost)
        raise CorruptFileError(f"{file} is damaged: the examples {lost} are lost")


@contextmanager
def _at_work(what: str, run: Path, device: str) -> "Iterator[tuple[int, Run, Progress]]":
    """Load a run on a device inside the group of processes.

    Yield the rank of this process, the run, and a function that, for a total, returns a function
    to be called with each increment; the first process shows a bar.
    """
    from nelbo._utils.distributed import process_group
    from nelbo._utils.progress import increments
    from nelbo.codec.coding.blocks import nothing
    from nelbo.diffusion.model import find_device
    from nelbo.runs.loading import load

    with process_group() as rank, ExitStack() as stack:

        def start(total: int) -> Callable[[int], None]:
            return nothing if rank else increments(stack, what, total)

        loaded = load(run)
        loaded.model.to(find_device(device))
        yield rank, loaded, start
