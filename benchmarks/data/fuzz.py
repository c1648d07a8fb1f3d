"""Damaged files of every kind that nelbo reads, for as long as one likes.

    python benchmarks/data/fuzz.py [--minutes 5] [--reader NAME] [--seed 0] [--out FOLDER]

Bytes flipped, overwritten, cut, inserted and swapped, values of JSON replaced: the damage of
`tests/data/test_fuzz.py`, whose few examples run with every change. A read ends in a result, the
right one where the file has a checksum, or in an error that the command line tells in one
sentence. What ends otherwise, a NaN where a number is told among it, is made small by Hypothesis,
kept in the folder, and named. Minutes are of CPU; Ctrl-C ends after the file that is being read.
"""

import argparse
import os
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.fuzzing import Kind, damaged, kinds, outcome
from support.runs import TINY

from nelbo._utils.signals import interruptible
from nelbo.runs.train import train

BATCH = 100  # files at a time


def cpu() -> float:
    """Seconds of CPU of this process and of those that it had decode for it."""
    return sum(os.times()[:4])


def fuzz(
    kind: Kind, start: int, folder: Path, counts: Counter, stopped: Callable[[], bool]
) -> str | None:
    """Count the outcomes of a batch of files; the traceback of one that fails, which is kept."""

    @seed(start)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(kind))
    def run(content: bytes) -> None:
        if not stopped():
            counts[outcome(kind, content, folder)] += 1

    try:
        run()
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--reader", help="the name of one kind of file, such as x.npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--gibibytes", type=float, default=4, help="of memory that a read may take"
    )
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    most = round(used + options.gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))  # a MemoryError is a failure
    with tempfile.TemporaryDirectory() as place:
        made = kinds(train("digits", Path(place) / "run", **TINY).path)
        some = [kind for kind in made if options.reader in (None, kind.name)]
        if not some:
            sys.exit(f"readers are {', '.join(kind.name for kind in made)}")
        counts = {kind.name: Counter() for kind in some}
        failures, start, batch = [], cpu(), options.seed * 10**6
        # a KeyboardInterrupt would be lost where it is raised in a callback of a library
        with interruptible(twice=False) as stopped:
            while some and cpu() - start < 60 * options.minutes and not stopped():
                kind = min(some, key=lambda kind: counts[kind.name]["cpu"])
                begun, folder = cpu(), Path(place) / "damaged"
                why = fuzz(kind, batch, folder, counts[kind.name], stopped)
                counts[kind.name]["cpu"] += round(1e6 * (cpu() - begun))
                batch += 1
                if why is not None:
                    options.out.mkdir(exist_ok=True)
                    kept = options.out / f"{batch}-{kind.name}"
                    kept.write_bytes((folder / kind.name).read_bytes())
                    failures.append(kept)
                    print(f"{kept}: {why}", flush=True)
                    some.remove(kind)
        for name, count in counts.items():
            print(f"{name:24} {count['read']:7} read {count['refused']:7} refused")
        total = sum(c["read"] + c["refused"] for c in counts.values())
        minutes = (cpu() - start) / 60
        print(f"{total} damaged files, {len(failures)} failures; {minutes:.1f} min of CPU")
        sys.exit(bool(failures))


if __name__ == "__main__":
    main()
