"""The architecture: imports go strictly downwards."""

import ast
import subprocess
import sys
from pathlib import Path

import nelbo

SOURCE = Path(nelbo.__file__).parent
ORDER = (
    "_scalars",
    "_processes",
    "_terminal",
    "sharding",
    "parts",
    "_numerics",
    "_exponential",
    "_progress",
    "_interrupt",
    "_limits",
    "_files",
    "_cache",
    "_distributions",
    "schedules",
    "process",
    "heads",
    "likelihood",
    "reverse",
    "product",
    "_checks",
    "model",
    "elbo",
    "terms",
    "estimate",
    "times",
    "objective",
    "few_steps",
    "sample",
    "particles",
    "data",
    "columns",
    "latent_class",
    "numbers",
    "condition",
    "clusters",
    "roughness",
    "draw",
    "intervals",
    "references",
    "control",
    "proposal",
    "allocate",
    "grids",
    "visits",
    "plan",
    "evaluate",
    "importance",
    "dequantise",
    "flow",
    "tighter",
    "augment",
    "nn",
    "config",
    "build",
    "checkpoint",
    "pilots",
    "impute",
    "integrations",
    "optimise",
    "gradient",
    "execution",
    "learner",
    "state",
    "row_bounds",
    "sklearn",
    "events",
    "train",
    "finetune",
    "pictures",
    "codec",
    "report",
    "scores",
    "show",
    "inspection",
    "cli",
    "__main__",
)


def imported(path):
    """The first parts below nelbo of what a module imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nelbo"):
            below = (node.module or "").split(".")[1:2]
            names = below or [alias.name for alias in node.names]
            yield from (n for n in names if list(SOURCE.glob(f"{n}*")))


def test_imports_go_downwards():
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for other in imported(path):
            assert part == other or ORDER.index(other) < ORDER.index(part), f"{path}: {other}"


def test_the_derivation_knows_no_process_and_no_network():
    assert set(imported(SOURCE / "elbo.py")) == {"_numerics"}
    assert len((SOURCE / "elbo.py").read_text().splitlines()) <= 100


def test_the_command_line_does_not_wait_for_torch():
    code = "import nelbo.cli, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_stay_functions_after_their_modules_are_imported():
    code = (
        "import nelbo, nelbo.elbo, nelbo.evaluate, nelbo.train, nelbo.report;"
        "import sys; sys.exit(not all(callable(getattr(nelbo, n)) for n in nelbo.__all__))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert len(nelbo.__all__) <= 15
