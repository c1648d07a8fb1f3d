"""`python -m nelbo` is `nelbo`; Ctrl-C is quiet also while modules load."""

import sys


def main() -> None:
    """The entry point of the command."""
    try:
        from nelbo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
