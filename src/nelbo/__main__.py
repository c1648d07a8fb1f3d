"""Run `nelbo` as `python -m nelbo`; Ctrl-C stays quiet even while modules load."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from nelbo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
