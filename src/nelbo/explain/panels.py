"""Panels of a page: a title, an equation, the functions that are it, and a place to draw."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from nelbo.explain.values import Choice, Values

SOURCE = "https://github.com/nelbo/nelbo/blob/main/src/nelbo/"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        name: of the element in which the page's script draws.
        title: plain text.
        equation: HTML.
        number: of the equation in docs/derivation.md.
        code: functions that are the equation, as "folder/file.py:name".
        text: a sentence for the reader, HTML.
        wide: whether it takes a whole row.
        inside: what is in the place to draw at first, HTML.
    """

    name: str
    title: str
    equation: str
    number: str
    code: tuple[str, ...]
    text: str = ""
    wide: bool = False
    inside: str = ""

    def html(self) -> str:
        """Return the panel as HTML."""
        links = ", ".join(
            f'<a href="{SOURCE}{place.partition(":")[0]}"><code>{place}</code></a>'
            for place in self.code
        )
        kind = "panel wide-panel" if self.wide else "panel"
        equations = "Equations" if " " in self.number else "Equation"
        return (
            f'<section class="{kind}" aria-labelledby="title-{self.name}">'
            f'<h2 id="title-{self.name}">{escape(self.title)}</h2>'
            f'<p class="eq">{self.equation}</p>'
            f'<div class="draw" id="{self.name}">{self.inside}</div>'
            f'<p class="say" id="say-{self.name}"></p>'
            f"{f'<p>{self.text}</p>' if self.text else ''}"
            f'<p class="home">{equations} {self.number} · {links}</p></section>'
        )


def sub(symbol: str, index: str) -> str:
    """Return a symbol in italics with an index below."""
    return f"<i>{symbol}</i><sub>{index}</sub>"


def fraction(above: str, below: str) -> str:
    """Return a fraction."""
    return f'<span class="frac"><span>{above}</span><span class="below">{below}</span></span>'


def choices(asked: Iterable[Choice]) -> str:
    """Return the controls as HTML: a group of radio buttons per choice."""
    groups = []
    for choice in asked:
        buttons = "".join(
            f'<label><input type="radio" name="{choice.name}" value="{i}"'
            f"{' checked' * (i == choice.first)}><span>{option}"
            f"{f'<small id={chr(34)}price-{choice.name}-{i}{chr(34)}></small>' * choice.priced}"
            "</span></label>"
            for i, option in enumerate(choice.options)
        )
        groups.append(f"<fieldset><legend>{choice.label}</legend>{buttons}</fieldset>")
    return f'<form class="choices" aria-label="Choices">{"".join(groups)}</form>'


PLAYER = (
    '<div class="player" role="group" aria-label="Step t">'
    '<button type="button" id="down" aria-label="one step towards the data">←</button>'
    '<input type="range" id="t" min="1" max="2" step="1" aria-label="step t">'
    '<button type="button" id="up" aria-label="one step towards the noise">→</button>'
    '<output id="where" for="t" aria-live="polite"></output></div>'
)


def body(head: str, values: Values, panels: Sequence[Panel], foot: str) -> str:
    """Return the body of a page."""
    script = files("nelbo.explain").joinpath("page.js").read_text(encoding="utf-8")
    drawn = "".join(panel.html() for panel in panels)
    return (
        f"<header>{head}</header><noscript><p>This page needs JavaScript, which it"
        f" contains.</p></noscript>{choices(values.choices)}{PLAYER}<main"
        f" class='panels'>{drawn}</main><footer>{foot}</footer><script type=\"application/json\""
        f' id="values">{values.to_json()}</script><script>{script}</script>'
    )


def style() -> str:
    """Return the style sheet of these pages, beside that of all pages."""
    return files("nelbo.explain").joinpath("page.css").read_text(encoding="utf-8")
