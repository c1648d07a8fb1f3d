"""Diffusion models you can measure in bits.

    run = nelbo.train("digits")        # or an array, a frame, a list of images, a path, ..
    run.evaluate()                     # mean bound on -log P(x), standard error, terms, price
    run.elbo(x).elbo                   # the bound of each example, nats, with its error
    run.sample(16)                     # images, rows of a table, or texts

Each command of the command line is a function here and a method of a run. Names are imported on
first use, so `import nelbo` is quick.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Signature, signature
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nelbo._version import __version__ as __version__

if TYPE_CHECKING:
    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.elbo import Bound
    from nelbo.diffusion.gaussian import GaussianDiffusion
    from nelbo.diffusion.masked import MaskedDiffusion
    from nelbo.diffusion.model import Model
    from nelbo.diffusion.schedules import Schedule
    from nelbo.diffusion.times import ContinuousTime, TimeGrid
    from nelbo.evaluation.toy import toy
    from nelbo.explain import explain
    from nelbo.integrations.denoisers import wrap
    from nelbo.report import report
    from nelbo.runs.commands import (
        compress,
        decompress,
        elbo,
        impute,
        inspect,
        sample,
        score,
    )
    from nelbo.runs.evaluation import evaluate
    from nelbo.runs.loading import load
    from nelbo.runs.run import Run
    from nelbo.runs.sweep import sweep
    from nelbo.runs.train import resume, train
    from nelbo.sampling.samplers import ancestral

_HOME = {
    "Batch": "diffusion.batch",
    "Bound": "diffusion.elbo",
    "ContinuousTime": "diffusion.times",
    "GaussianDiffusion": "diffusion.gaussian",
    "MaskedDiffusion": "diffusion.masked",
    "Model": "diffusion.model",
    "Run": "runs.run",
    "Schedule": "diffusion.schedules",
    "TimeGrid": "diffusion.times",
    "ancestral": "sampling.samplers",
    "compress": "runs.commands",
    "decompress": "runs.commands",
    "elbo": "runs.commands",
    "evaluate": "runs.evaluation",
    "explain": "explain",
    "impute": "runs.commands",
    "inspect": "runs.commands",
    "load": "runs.loading",
    "report": "report",
    "resume": "runs.train",
    "sample": "runs.commands",
    "score": "runs.commands",
    "sweep": "runs.sweep",
    "toy": "evaluation.toy",
    "train": "runs.train",
    "wrap": "integrations.denoisers",
}
__all__ = [
    "Batch",
    "Bound",
    "ContinuousTime",
    "GaussianDiffusion",
    "MaskedDiffusion",
    "Model",
    "Run",
    "Schedule",
    "TimeGrid",
    "ancestral",
    "compress",
    "decompress",
    "elbo",
    "evaluate",
    "explain",
    "impute",
    "inspect",
    "load",
    "report",
    "resume",
    "sample",
    "score",
    "sweep",
    "toy",
    "train",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        try:  # a folder of the package, as in nelbo.integrations
            return import_module(f"nelbo.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"nelbo.{name}":
                raise
        raise AttributeError(f"module 'nelbo' has no attribute {name!r}")
    home = import_module(f"nelbo.{_HOME[name]}")
    value = home if _HOME[name] == name else getattr(home, name)
    globals()[name] = value
    if _HOME[name].startswith("runs."):
        _complete_run()
    return value


def _complete_run() -> None:
    """Give `Run` the methods that need a higher floor of the house than its own."""
    from nelbo.runs.run import Run

    def report(self: Run, out: "str | PathLike[str] | None" = None, seed: int = 0) -> Path:
        """Write a self-contained HTML page about the run; see `nelbo.report`."""
        write = import_module("nelbo.report").report
        made: Path = write(self, out, seed)
        return made

    Run.report = report  # type: ignore[attr-defined]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """Make a package of the name of a function callable: `nelbo.report(run)`."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value.__class__ = _Command
        super().__setattr__(name, value)


class _Command(ModuleType):
    """A package, such as `nelbo.report`, that is called as its function of the same name."""

    def _function(self) -> Callable[..., object]:
        found: Callable[..., object] = vars(self)[self.__name__.rpartition(".")[2]]
        return found

    @property
    def __signature__(self) -> Signature:
        return signature(self._function())

    def __call__(self, *args: object, **options: object) -> object:
        return self._function()(*args, **options)


sys.modules[__name__].__class__ = _Package
