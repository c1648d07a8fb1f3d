"""The lower bounds of pyproject.toml are those that `make test-lowest` runs."""

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOWEST = (ROOT / "constraints-lowest.txt").read_text()
PINNED = dict(re.findall(r"^([\w-]+)==([\d.]+)$", LOWEST, re.MULTILINE))

MAKE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def bounds(requirements):
    """Names and lower bounds; `nelbo[docs,test]` has none."""
    found = (re.match(r"([\w-]+)[^>]*>=([\d.]+)", each) for each in requirements)
    return [each.groups() for each in found if each]


def test_each_lower_bound_is_run():
    installed = re.search(r"constraints-lowest.txt -e \"\.\[([\w,]+)\]", MAKE)[1].split(",")
    assert {"tables", "hub", "codec"} <= set(installed)
    needed = chain(PROJECT["dependencies"], *(EXTRAS[name] for name in installed))
    for name, bound in bounds(needed):
        assert f"{PINNED[name]}.".startswith(f"{bound}."), name
    for name, bound in bounds(chain(*EXTRAS.values())):  # one library has one bound
        assert f"{PINNED.get(name, bound)}.".startswith(f"{bound}."), name


def test_the_workflow_runs_the_lowest_versions():
    """With the oldest Python that is declared."""
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    job = re.search(r'python: "([\d.]+)"\s+versions: lowest\s+command: (.*)', workflow)
    assert PROJECT["requires-python"] == f">={job[1]}"
    assert job[2].startswith("make test-lowest ") and "\ntest-lowest: " in MAKE


def test_each_extra_that_is_named_exists():
    files = chain(ROOT.glob("*.md"), ROOT.glob("docs/**/*.md"), ROOT.glob("src/**/*.py"))
    named = re.findall(r"nelbo\[([\w,]+)\]'", "".join(map(Path.read_text, files)))
    assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()
    assert len(named) > 10


def test_the_build_of_torch_is_one():
    build = re.search(r"torch==([\d.]+)", (ROOT / "constraints.txt").read_text())[1]
    assert PINNED["torch"] == build
