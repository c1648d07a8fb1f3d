"""Warnings of transformers that a sentence, a note or a refusal of ours says in their place."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARY = "transformers"
#: beginnings or parts of them
COVERED = (
    "LOAD REPORT",  # weights that are missing or of other shapes are refused, others noted
    "This checkpoint seem corrupted",  # weights that are missing
    "make sure `config.is_decoder=False`",  # models that read from left to right are refused
    "Model config: ",  # ids that the model does not have are refused
    "You are using a model of type",  # the class is noted
    "passing in an `attention_mask`",  # padding never reaches the module
)


def _to_be_shown(record: logging.LogRecord) -> bool:
    of_library = record.name.partition(".")[0] == LIBRARY
    return not (of_library and any(part in record.getMessage() for part in COVERED))


@contextmanager
def without_covered() -> Iterator[None]:
    """Inside, these warnings are not shown; all others are, and the user's settings stay."""
    handlers = {*logging.getLogger(LIBRARY).handlers, *logging.getLogger().handlers}
    for handler in handlers:
        handler.addFilter(_to_be_shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_to_be_shown)
