"""Hooks of `mkdocs build`: links into the repository, formulas, notebooks, and a last check."""

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

#: what a browser fetches by itself, not by a click
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|(?:@import\s*["']|url\(\s*["']?)(?:https?:)?//"""
)
#: where the script of the theme fetches from the host of the repository
ASKED = re.compile(r"""<[^>]*data-md-component=["']?source["' >]""")


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401
    """Add a page for each notebook."""
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, config: Any, **_: object) -> str:  # noqa: ANN401
    """Lead links out of docs/ to the repository."""
    return re.sub(r"\]\(\.\./(?!\.)", f"]({config.repo_url}/blob/main/", markdown)


def on_page_content(content: str, **_: object) -> str:
    """Write formulas as MathML, which browsers show without a script."""

    def shown(found: re.Match[str]) -> str:
        formula = html.unescape(found["inline"] or found["block"]).strip()
        shown = convert(formula, display="inline" if found["inline"] else "block")
        return re.sub(r"(<mi>(?:log|sigmoid)</mi>)", r'<mspace width="0.2em"/>\1', shown)

    return re.sub(
        r'<(?P<tag>span|div) class="arithmatex">'
        r"(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>",
        shown,
        content,
        flags=re.DOTALL,
    )


def on_post_template(output_content: str, **_: object) -> str:
    """Keep the theme's script from asking GitHub for the stars of the repository."""
    return output_content.replace(' data-md-component="source"', "")


def on_post_page(output: str, **_: object) -> str:
    """Do on pages what is done on templates, such as that of a missing page."""
    return on_post_template(output)


def on_post_build(config: Any) -> None:  # noqa: ANN401
    """Refuse a site that fetches anything from elsewhere, or shows a formula as its source."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix not in (".html", ".css"):
            continue
        text = path.read_text()
        if found := FETCHED.search(text) or ASKED.search(text):
            raise PluginError(f"{path}: fetches from elsewhere: {text[found.start() :][:120]}")
        if 'class="arithmatex"' in text:
            raise PluginError(f"{path}: a formula is not MathML")


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown, with the outputs that are kept in it."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join([*parts, f"This page is the notebook [{path.name}]({path.name})."])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return (
            f'<img alt="figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
        )
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text}\n```"
