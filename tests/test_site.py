"""What the site's own hooks do; `make docs` builds the site itself."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

DOCS = Path(__file__).parents[1] / "docs"
HOOKS = runpy.run_path(str(DOCS / "_hooks.py"))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ('<script src="https://a.b/c.js"></script>', True),
        ('<img alt="x" src=//a.b/c.png>', True),
        ('<link rel="stylesheet" href="http://a.b/c.css">', True),
        ("@import 'https://a.b/c.css';", True),
        ('<a href="https://github.com/a/b" data-md-component="source">', True),
        ("p { background: url(https://a.b/c.png) }", True),
        ('<span class="arithmatex">\\(x\\)</span>', True),
        ('<a href="https://a.b">a click</a> <img src="data:image/png;base64,AA">', False),
        ('<link rel="canonical" href="https://a.b/"><script src="c.js"></script>', False),
    ],
)
def test_a_site_that_fetches_from_elsewhere_is_refused(tmp_path, text, refused):
    (tmp_path / "page.html").write_text(text)
    config = SimpleNamespace(site_dir=str(tmp_path))
    if not refused:
        HOOKS["on_post_build"](config)
        return
    with pytest.raises(PluginError, match=r"page\.html"):
        HOOKS["on_post_build"](config)


def test_formulas_are_mathml():
    shown = HOOKS["on_page_content"]('a <span class="arithmatex">\\(x &lt; \\alpha_t\\)</span> b')
    assert shown.startswith("a <math") and "&#x0003C;" in shown and "&#x003B1;" in shown
    block = HOOKS["on_page_content"]('<div class="arithmatex">\\[\nx\n\\]</div>')
    assert 'display="block"' in block


def test_links_out_of_docs_lead_to_the_repository():
    config = SimpleNamespace(repo_url="https://a.b/c")
    lead = HOOKS["on_page_markdown"]
    assert lead("[x](../src/y.py)", config=config) == "[x](https://a.b/c/blob/main/src/y.py)"
    assert lead("[x](y.md)", config=config) == "[x](y.md)"


def test_a_notebook_is_a_page(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": "1 + 1",
            "outputs": [{"data": {"text/plain": "2"}}, {"text": ["a\n", "b"]}],
        },
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    page = HOOKS["notebook_page"](tmp_path / "n.ipynb")
    assert page.startswith(
        "# Title\ntext\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n\n```text\na\nb"
    )


def test_doctests_are_shown_as_code():
    griffe = pytest.importorskip("griffe")
    made = runpy.run_path(str(DOCS / "_doctests.py"))["Doctests"]()
    function = griffe.Function("f", docstring=griffe.Docstring("Say a.\n\n>>> f()\n'a'"))
    made.on_object(obj=function)
    assert function.docstring.value == "Say a.\n\nExamples:\n    >>> f()\n    'a'"
    text, examples = function.docstring.parse("google")
    assert (text.kind.value, examples.kind.value) == ("text", "examples")


def test_the_site_is_built_strictly():
    """A warning that is not said, as with --quiet, would not be counted."""
    recipe = (DOCS.parent / "Makefile").read_text().partition("\ndocs: ")[2].partition("\n\n")[0]
    assert "--strict" in recipe and "-q" not in recipe
