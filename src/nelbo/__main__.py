"""Run `nelbo` as `python -m nelbo`; Ctrl-C stays quiet even while modules load."""

import gc
import sys


def main() -> None:
    """Run the command line."""
    try:
        from nelbo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # a search for garbage in all that was imported would take a second at exit


if __name__ == "__main__":
    main()
