"""The console of tables and progress bars; in a module of its own, as rich is slow to import."""

from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.text import Text
from typing_extensions import override

from nelbo._utils.text import line


class Terminal(Console):
    """Console that obeys no control codes within texts, and shortens long words.

    In a notebook without ipywidgets, of which rich would only say that they are missing, it writes
    plain text.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - those of `Console`
        widgets = None if find_spec("ipywidgets") else False
        super().__init__(force_jupyter=widgets, **options)

    @override
    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(line(text), **options)  # type: ignore[arg-type]
