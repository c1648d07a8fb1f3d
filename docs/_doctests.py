"""Extension of griffe: the doctests at the end of a docstring are shown as code."""

import re
from textwrap import indent
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Put doctests into a section of their own, as Google's style wants them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401
        """Move all from the first `>>>` on into the section Examples."""
        if obj.docstring is None:
            return
        text, prompt, code = re.split(r"(?m)^(>>> )|\Z", obj.docstring.value, maxsplit=1)
        if prompt:
            obj.docstring.value = f"{text}Examples:\n{indent(prompt + code, '    ')}"
