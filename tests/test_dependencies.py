"""The lower bounds of pyproject.toml are those that `make test-lowest` runs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOWEST = (ROOT / "constraints-lowest.txt").read_text()
PINNED = dict(re.findall(r"^([\w-]+)==([\d.]+)$", LOWEST, re.MULTILINE))


def test_each_lower_bound_is_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("tables", "hub", "codec")]
    for requirement in sum(extras, project["dependencies"]):
        name, bound = re.match(r"([\w-]+)[^>]*>=([\d.]+)", requirement).groups()
        assert f"{PINNED[name]}.".startswith(f"{bound}."), requirement


def test_the_build_of_torch_is_one():
    build = re.search(r"torch==([\d.]+)", (ROOT / "constraints.txt").read_text())[1]
    assert PINNED["torch"] == build
