"""The files, tests and functions that the pages name are there."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
TESTS: dict[str, str] = {}  # of all files of a name
for path in sorted(ROOT.glob("tests/**/*.py")):
    stem = path.stem.removeprefix("test_")
    TESTS[stem] = TESTS.get(stem, "") + path.read_text()
MODULES = {path.stem for place in ("src", "tests") for path in ROOT.glob(f"{place}/**/*.py")}
CONTRACTS = "\n".join(path.read_text() for path in ROOT.glob("src/nelbo/testing/*.py"))
SOURCES = "\n".join(
    path.read_text()
    for place in ("src", "tests", "benchmarks")
    for path in ROOT.glob(f"{place}/**/*.py")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_tests_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", text):
        assert (ROOT / path).exists(), path
    last = ""
    for file, name in re.findall(
        r"`(?:[\w/]*?(\w+)(?:\.py)?)?::((?:Test\w+|test_\w+)[\w.:]*)", text
    ):
        last = file.removeprefix("test_") or last
        tests = TESTS[last] + CONTRACTS
        for part in re.split(r"::|\.", name):
            assert re.search(rf"(def|class) {part}\b", tests), f"{last}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    known = [str(path) for path in ROOT.glob("*/**/*.py")]
    for name in re.findall(r"`([\w/]+\.py)[`:]", page.read_text()):
        example = name == "src/nelbo/diffusion/power.py"  # which docs/extending.md would add
        assert example or any(path.endswith(f"/{name}") for path in known), name


NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_imports_of_the_examples_exist(page):
    for line in re.findall(r"from nelbo[\w.]* import [\w, ]+", page.read_text()):
        if "nelbo.diffusion.power" not in line:  # which docs/extending.md would add
            exec(line, {})


def test_the_derivation_names_what_exists():
    text = (ROOT / "docs" / "derivation.md").read_text()
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
        for part in name.split("."):
            assert part in MODULES or re.search(rf"\b{part}\b", SOURCES), name


def test_each_equation_leads_to_its_function_and_its_test():
    sections = (ROOT / "docs" / "derivation.md").read_text().split("\n## ")[1:]
    equations = [each for each in sections if "$$" in each or "| $" in each]
    assert len([each for each in equations if each[0].isdigit()]) == 10
    for section in equations:
        assert re.search(r"`[a-z_]*\.?[A-Za-z_]+(\.\w+)?`", section), section[:40]
        assert re.search(r"`(\w+::test_|ProcessContract\.test_)", section), section[:40]


def test_each_number_of_the_readme_is_measured():
    table = (ROOT / "README.md").read_text().partition("## Eight numbers")[2].partition("##")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    measured = (ROOT / "docs" / "measured.md").read_text()
    assert len(rows) == 8
    for number in re.findall(r"\d+(?:\.\d+)?", " ".join(map(" ".join, rows))):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]\d)", measured), number


def test_an_index_can_follow_every_link_of_the_readme():
    """An index shows the README alone, so the build makes its links absolute."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    shown = (ROOT / "README.md").read_text()
    count = len(re.findall(r"\]\(", shown))
    for rule in build["hooks"]["fancy-pypi-readme"]["substitutions"]:
        shown = re.sub(rule["pattern"], rule["replacement"], shown)
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    assert len(targets) == count > 8
    assert all(re.match(r"https://[\w.]+/|#", target) for target in targets)
    assert "](https://github.com/nelbo/nelbo/raw/main/docs/report.png)" in shown


def test_the_schedule_of_extending_works():
    """Its class and its use in Python, in a module that the page would add."""
    text = (ROOT / "docs/extending.md").read_text()
    module, use = re.findall(r"```python\n((?:\"\"\"|from ).*?)```", text, re.DOTALL)
    names = {"x": torch.randint(17, (6, 1, 8, 8))}
    exec(module, names)
    exec(use.replace("from nelbo.diffusion.power import Power\n", ""), names)
    assert names["result"].bits_per_dim > 0
    names["loss"].backward()
    assert all(p.grad is not None for p in names["model"].network.parameters())
