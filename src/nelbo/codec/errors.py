"""Errors of compressed files, each with the exit code of the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CodecError(ValueError):
    """A file that cannot be decoded, or not here."""

    exit_code = 3


class CorruptFileError(CodecError):
    """The file is not as it was written: bits flipped, cut off, or never a container."""


class ModelMismatchError(CodecError):
    """The file is intact, but belongs to another model."""

    exit_code = 4


class NotReproducibleError(CodecError):
    """File and model are right, but the network or the coder gives other numbers here."""

    exit_code = 5


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Begin the messages of errors raised inside with the file that they are about."""
    try:
        yield
    except CodecError as error:
        raise type(error)(f"{file}: {error}") from error
