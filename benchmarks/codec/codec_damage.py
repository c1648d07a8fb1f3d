"""Damaged files, by the million: the exact data, or an error that says so.

    python benchmarks/codec/codec_damage.py [--files 1000000] [--seed 0]

Bits flipped, bytes cut, inserted, overwritten and swapped, and files given another model: the
trials of `tests/codec/test_codec_damage.py`, where 10,000 run with every change. An exception that
is not the codec's ends the benchmark; so does data that are not the right ones.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.codes import files, trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    coded, r, start = files(), random.Random(options.seed), time.process_time()
    exact = sum(trial(coded, i, r) for i in range(options.files))
    print(
        f"{options.files} damaged files: 0 wrong data, 0 other exceptions, {exact} exact all the"
        f" same; {time.process_time() - start:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
