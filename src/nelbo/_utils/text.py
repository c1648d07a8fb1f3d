"""Text for terminals and messages: printable, and not too long."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from unicodedata import category

#: characters shown of a value within a sentence, of a path or word, and of a sentence, at most
VALUE, WORD, LINE = 200, 400, 4000


def printable(text: str) -> str:
    """Return the text with a mark in place of control, format and unassigned characters."""
    return re.sub(r"[^ -~\n\t]", lambda c: "\ufffd" if category(c[0])[0] == "C" else c[0], text)


def shortened(text: str, most: int = VALUE) -> str:
    """Return the text with a mark in place of its middle if it is longer than `most`.

    >>> shortened("0123456789", 5)
    '012…9'
    """
    if len(text) <= most:
        return text
    end = (most - 1) // 3
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def nearest(given: str, known: Collection[str]) -> str:
    """Return the one of some names that is spelled most alike; "" if none is.

    >>> nearest("Linear", ["cosine", "linear"]), nearest("x", ["linear"])
    ('linear', '')
    """
    by_case = {name.lower(): name for name in known}
    return by_case.get(next(iter(get_close_matches(given.lower(), by_case, 1)), ""), "")


def line(text: str) -> str:
    """Return the text for a terminal: printable, with long words and long texts shortened."""
    text = shortened(text, 100 * LINE)  # before the search for words
    return printable(shortened(re.sub(r"\S+", lambda w: shortened(w[0], WORD), text), LINE))
