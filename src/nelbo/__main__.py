"""Run `nelbo` as `python -m nelbo`; Ctrl-C stays quiet even while modules load."""

import gc
import os
import sys

#: turns that a thread of OpenMP waits for work before it sleeps. By default it is 300 000, which
#: takes the processor from those that compute on a machine that other programs use too.
SPINS = "10000"


def main() -> None:
    """Run the command line."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    try:
        from nelbo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # a search for garbage in all that was imported would take a second at exit


if __name__ == "__main__":
    main()
