"""The notebooks of the docs run from the first cell to the last; what they keep is small."""

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Trainings of a few steps, but in the slow tests.
STEPS, FEW = r'(?<=steps=)\d{2,}|(?<="steps": )\d{2,}|(?<=evaluate_every=)\d{2,}', "4"
# Nothing is left of another notebook but what it imported, which takes longer than most cells.
BEFORE = "%reset -f\nimport os as _os\n_os.chdir({!r})\ndel _os"
# Measured on little, as in `conftest`, and at few numbers of steps.
LITTLE = """
def _measure_little():
    from nelbo.diffusion import gaussian_mixture
    from nelbo.evaluation import grid_search
    from nelbo.report import sections, studies
    from nelbo.runs import pilot_cache
    from nelbo.training import trainer

    gaussian_mixture.SIZES, grid_search.EXAMPLES, pilot_cache.ROWS = (1, 2), 16, 16
    studies.STEPS, sections.STEPS, studies.CODED_STEPS = (2, 4, 8), (2, 4, 8), (2, 3)
    trainer.VALIDATION = (16, 2**18)


_measure_little()
del _measure_little
"""


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 5


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)])
def short(request):
    return request.param


@pytest.fixture(scope="module")
def kernel(short):
    """One kernel for all of them."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the kernel's libraries
def test_a_notebook_runs(path, short, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "run it, and keep its outputs"
    assert path.stat().st_size < 200_000
    for cell in code if short else ():
        cell.source = re.sub(STEPS, FEW, cell.source)
    before = BEFORE.format(str(tmp_path)) + LITTLE * short
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    client = NotebookClient(notebook, km=kernel, timeout=600)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", output["text"]
