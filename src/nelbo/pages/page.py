"""A self-contained HTML page: one file that loads nothing from outside itself."""

from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from nelbo._utils.distributed import world
from nelbo._utils.files import write
from nelbo._utils.text import printable

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(out: Path, title: str, body: str, style: str = "", script: bool = False) -> None:
    """Write a page to `out`, on the main process.

    Args:
        out: the HTML file; it is replaced as a whole.
        title: its title, plain text.
        body: its HTML.
        style: style sheet beside that of all pages.
        script: whether the body has a script, which may load nothing either.
    """
    if world()[0] == 0:
        room = files("nelbo.pages")
        template, base = (
            room.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "style.css")
        )
        policy = POLICY + "; script-src 'unsafe-inline'" * script
        page = Template(template).substitute(
            title=escape(title), body=body, style=base + style, policy=policy
        )
        # names come from files: escape terminal codes and marks that reverse the text direction
        write(out, printable(page).encode())
