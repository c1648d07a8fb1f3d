"""Runs on the hub of Hugging Face: weights, configuration and a card. No code is loaded.

Needs huggingface_hub (extra: hub).
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nelbo.data.sources import BUILT_IN
from nelbo.evaluation.result import Evaluation
from nelbo.models.config import CUSTOM
from nelbo.runs.config import CONFIG, GRIDS, METRICS, WEIGHTS
from nelbo.runs.samples import SAMPLE_STEPS

if TYPE_CHECKING:
    from nelbo.runs.run import Run

FILES = (CONFIG, WEIGHTS, METRICS, GRIDS)  # neither the data nor the state of training
CARD = "README.md"


def push(run: "Run", name: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a run; see `Run.push_to_hub`."""
    _check_name(name)
    library = _library()
    api = library.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder, _reached(name):
        write(run, name, Path(folder))
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A run of nelbo")
    return f"{library.constants.ENDPOINT}/{name}"


def write(run: "Run", name: str, folder: Path) -> None:
    """Write what is uploaded of a run, with the grid of its samples, which takes its data."""
    run.grid(SAMPLE_STEPS)
    for file in FILES:
        if (run.path / file).is_file() and file != CONFIG:
            (folder / file).write_bytes((run.path / file).read_bytes())
    source = run.config.source
    if source not in BUILT_IN:  # a path of this machine is nobody's concern
        source = Path(source).name
    (folder / CONFIG).write_text(replace(run.config, source=source).to_json(), encoding="utf-8")
    (folder / CARD).write_text(card(run, name), encoding="utf-8")


def pull(name: str) -> Path:
    """Return the folder with the files of a run, downloaded or kept from before.

    Raises:
        ValueError: it cannot be downloaded.
    """
    library = _library()
    with _reached(name):
        return Path(library.snapshot_download(name, allow_patterns=list(FILES)))


def card(run: "Run", name: str) -> str:
    """Return a model card: the bound of the test split, its error and the command."""
    result = run.evaluate(progress=False)
    assert isinstance(result, Evaluation)
    value = result.value
    command = f"nelbo evaluate {name} --data DATA --seed {result.seed}"
    arguments = f'"{name}"'
    if run.config.model.network == CUSTOM:
        arguments += ", network=module"
        command = f"nelbo.load({arguments}).evaluate(DATA, seed={result.seed})"
    about = {
        "library_name": "nelbo",
        "tags": ["diffusion", "likelihood", "elbo", "nelbo"],
    }
    head = "\n".join(f"{key}: {json.dumps(of_key)}" for key, of_key in about.items())
    terms = "\n".join(f"| {k} | {v:.4f} | |" for k, v in vars(result.terms).items())
    given = f" given {result.given}" if result.given else ""
    return f"""---
{head}
---

# {name}

A diffusion model that is measured in bits, trained with nelbo.

| bound on -log P(x){given} | {result.unit} | standard error |
|---|---|---|
| **{result.split} split** | **{value:.4f}** | {result.standard_error.total:.4f} |
{terms}

{result.examples} examples of {result.dims} dimensions, continuous time,
{result.calls_per_example:.4g} network calls per example; {result.weights}, model
{result.model_hash}, data {result.data_hash}. Measured with

    {command}

where DATA are the test split of the data that the run was trained on.

```python
import nelbo

run = nelbo.load({arguments})
run.sample(16)
run.evaluate(data)
```
"""


def _check_name(name: str) -> None:
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"a run on the hub is called user/name; got {name!r}")


def _library() -> ModuleType:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise ValueError("the hub needs huggingface_hub; try: pip install 'nelbo[hub]'") from None


@contextmanager
def _reached(name: str) -> Iterator[None]:
    """Turn any failure of the hub into one sentence."""
    try:
        yield
    except Exception as error:  # of requests, httpx, the hub's own kinds, ..
        if type(error).__module__.startswith("nelbo"):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"there is no run {name} here, and the hub cannot be reached or refuses: {reason};"
            " give the path of a run folder, or try again online"
        ) from None
