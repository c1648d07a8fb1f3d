"""What is printed: names and values in files from strangers may hold codes that a terminal obeys,
and may be as long as the files."""

import re
from unicodedata import category

from rich.console import Console
from rich.text import Text

#: characters that are shown: of a value within a sentence, of a path or word, and of a sentence
VALUE, WORD, LINE = 200, 400, 4000


def printable(text: str) -> str:
    """The text with a mark in place of control, format and unassigned characters."""
    return re.sub(r"[^ -~\n\t]", lambda c: "\ufffd" if category(c[0])[0] == "C" else c[0], text)


def shortened(text: str, most: int = VALUE) -> str:
    """The text with a mark in place of its middle where it is longer than `most`.

    >>> shortened("0123456789", 5)
    '012…9'
    """
    if len(text) <= most:
        return text
    end = (most - 1) // 3
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def line(text: str) -> str:
    """The text for a reader: printable, its words and all of it of a length that can be read."""
    text = shortened(text, 100 * LINE)  # before each word is looked at
    return printable(shortened(re.sub(r"\S+", lambda w: shortened(w[0], WORD), text), LINE))


class Terminal(Console):
    """A console that obeys no codes in what it is given, and shows no endless words."""

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(line(text), **options)  # type: ignore[arg-type]
