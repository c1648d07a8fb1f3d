"""`python -m nelbo` is `nelbo`."""

from nelbo.cli import main

main()
