"""The architecture; that imports go downwards is a contract of import-linter (pyproject.toml)."""

import ast
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import nelbo
from nelbo._utils.tables import resolve
from nelbo.data.found import Reader
from nelbo.data.sources import READERS
from nelbo.models import config

SOURCE = Path(nelbo.__file__).parent


def test_the_derivation_is_read_on_two_screens():
    assert len((SOURCE / "diffusion" / "elbo.py").read_text().splitlines()) <= 100


def test_the_package_is_rooms():
    assert len(list(SOURCE.glob("*.py"))) <= 6


def imported(body, modules):
    """Yield the modules that statements import as they are loaded, but for annotations."""
    for statement in body:
        if isinstance(statement, ast.ImportFrom):
            for each in statement.names:
                whole = f"{statement.module}.{each.name}"
                yield whole if whole in modules else statement.module
        elif isinstance(statement, ast.Import):
            yield from (each.name for each in statement.names)
        elif isinstance(statement, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.dump(
            statement
        ):
            yield from imported(statement.body, modules)


def test_no_chain_of_imports_is_long():
    """To understand a module, one follows its imports down to a module without any."""
    names = {
        path: path.relative_to(SOURCE.parent).with_suffix("") for path in SOURCE.rglob("*.py")
    }
    modules = {".".join(v.parts).removesuffix(".__init__"): path for path, v in names.items()}

    @cache
    def chain(module):
        found = {*imported(ast.parse(modules[module].read_text()).body, modules)}
        below = (chain(name) for name in found & {*modules} - {module})
        return [module, *max(below, key=len, default=[])]

    longest = max(map(chain, modules), key=len)
    assert len(longest) <= 14, " -> ".join(longest)


def test_the_command_line_does_not_wait_for_torch():
    heavy = "('torch', 'matplotlib', 'numpy', 'pydantic', 'markdown_it')"
    code = f"import nelbo.cli, sys; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_name_waits_for_a_library_beside_torch():
    """What few calls need is imported by them: this keeps the names within 0.3 s over torch."""
    heavy = ["scipy", "matplotlib", "sklearn", "polars", "pandas", "datasets", "rich"]
    code = (
        f"import torch, sys; before = set(sys.modules); import nelbo;"
        f"[getattr(nelbo, name) for name in nelbo.__all__];"
        f"sys.exit(str([h for h in {heavy} if h in sys.modules and h not in before] or ''))"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert not ended.stderr.strip(), ended.stderr


def test_a_measurement_of_tokens_does_not_import_sympy():
    """50 MiB and half a second, which some functions of torch import at their first use."""
    code = (
        "import nelbo, sys, torch; from nelbo.integrations import wrap_tokens;"
        "model = wrap_tokens(torch.nn.Embedding(5, 5), 4, length=3);"
        "nelbo.evaluate(model, [[0, 1, 2]], calls=2); sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_stay_functions_after_their_modules_are_imported():
    for name in ("diffusion.elbo", "runs.train", "report", "explain"):
        import_module(f"nelbo.{name}")
    assert all(callable(getattr(nelbo, name)) for name in nelbo.__all__)
    assert len(nelbo.__all__) <= 28


TABLES = {name: each for name, each in vars(config).items() if isinstance(each, dict)}
TABLES = {name: each for name, each in TABLES.items() if name.isupper()} | {"READERS": READERS}


@pytest.mark.parametrize("table", TABLES)
def test_every_registered_name_stands_for_something(table):
    for name in TABLES[table]:
        part = resolve(name, TABLES[table])
        assert isinstance(part, Reader) if table == "READERS" else callable(part), name
