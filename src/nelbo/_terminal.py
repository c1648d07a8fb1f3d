"""What is printed: names in files from strangers may hold codes that a terminal obeys."""

from unicodedata import category

from rich.console import Console
from rich.text import Text


def printable(text: str) -> str:
    """The text with a mark in place of control, format and unassigned characters."""
    return "".join(c if c in "\n\t" or category(c)[0] != "C" else "\ufffd" for c in text)


class Terminal(Console):
    """A console that obeys no codes in what it is given."""

    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(printable(text), **options)  # type: ignore[arg-type]
