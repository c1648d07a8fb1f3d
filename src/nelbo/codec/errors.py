"""What can be wrong with a compressed file, each with the exit code of the command line."""


class CodecError(ValueError):
    """A file that cannot be decoded, or not here."""

    exit_code = 3


class CorruptFileError(CodecError):
    """The file is not what was written: bits flipped, cut off, or never a container."""


class ModelMismatchError(CodecError):
    """The file is whole, and of another model than the one given."""

    exit_code = 4


class NotReproducibleError(CodecError):
    """The file and the model are right, but here the network or the coder answers otherwise."""

    exit_code = 5
