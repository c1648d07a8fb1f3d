"""Script that decodes tables for `decoded` and prints the bytes of their texts and of all cells.

It reads pairs of a memory limit and a path from its input, each ended by a NUL. It imports nothing
of nelbo, so that it starts in a fraction of a second.
"""

import sys

NUMBER, VIEW = 8, 16  # minimal bytes of a number in an example, and of a text in polars
CELLS = 2**25  # cells decoded together: the most of a table that is not read in blocks
TEXTS = ("String", "Categorical", "Enum")


def limit_memory(size: int) -> None:
    """Make allocations beyond `size` bytes of data fail, if the system supports it."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            size = min(size, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, AttributeError, OSError, ValueError):
        pass


def sizes_of(path: str) -> tuple[int, int]:
    """Return the bytes of the texts of a table, counting each cell, and of all its cells."""
    import polars as pl

    scan = pl.scan_parquet if path.lower().endswith(".parquet") else pl.scan_ipc
    frame = scan(path, hive_partitioning=False)
    rows = frame.select(pl.len()).collect().item()
    step = max(1, CELLS // max(1, len(frame.collect_schema())))
    texts = total = 0
    for begin in range(0, rows, step):
        part = frame.slice(begin, step).collect()
        if not part.height:
            break
        for cells in part:
            size = max(int(cells.estimated_size()), NUMBER * len(cells))
            if cells.dtype.base_type().__name__ in TEXTS:
                lengths = cells.cast(pl.String).str.len_bytes().fill_null(0)
                size = int(lengths.cast(pl.Int64).clip(VIEW).sum())
                texts += size
            elif cells.dtype == pl.Binary:
                size = max(size, int(cells.bin.size().sum()))
            total += size
    return texts, total


def main() -> None:
    """Decode the tables named on standard input."""
    words = sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")[:-1]
    for limit, path in zip(words[::2], words[1::2], strict=True):
        limit_memory(int(limit))
        try:
            sizes = sizes_of(path)
        except MemoryError:
            raise
        except BaseException as error:  # damage, even a panic, is reported by the reader later
            if "allocat" in str(error):  # as polars words it
                raise MemoryError from error
            sizes = 0, 0
        print(*sizes, flush=True)


if __name__ == "__main__":
    main()
