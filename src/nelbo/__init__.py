"""Diffusion models you can measure in bits.

    run = nelbo.load("runs/digits")
    x, _ = run.examples()
    nelbo.evaluate(run.model, x)                 # mean bound, standard error, terms, price
    nelbo.elbo(run.model, x[:8].long()).elbo     # the bound of each, with its error, nats

Names are imported on first use, so `import nelbo` is quick.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from nelbo._version import __version__ as __version__

if TYPE_CHECKING:
    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.elbo import Bound
    from nelbo.diffusion.model import Model
    from nelbo.diffusion.process import GaussianDiffusion, MaskedDiffusion
    from nelbo.diffusion.schedules import Schedule
    from nelbo.diffusion.times import ContinuousTime, TimeGrid
    from nelbo.evaluation.evaluate import evaluate
    from nelbo.evaluation.example_bounds import elbo
    from nelbo.evaluation.toy import toy
    from nelbo.explain import explain
    from nelbo.report import report
    from nelbo.runs.run import Run, load
    from nelbo.runs.train import resume, train
    from nelbo.sampling.samplers import ancestral

_HOME = {
    "MaskedDiffusion": "diffusion.process",
    "Batch": "diffusion.batch",
    "Bound": "diffusion.elbo",
    "ContinuousTime": "diffusion.times",
    "GaussianDiffusion": "diffusion.process",
    "TimeGrid": "diffusion.times",
    "Model": "diffusion.model",
    "Run": "runs.run",
    "Schedule": "diffusion.schedules",
    "ancestral": "sampling.samplers",
    "elbo": "evaluation.example_bounds",
    "evaluate": "evaluation.evaluate",
    "explain": "explain",
    "load": "runs.run",
    "report": "report",
    "resume": "runs.train",
    "toy": "evaluation.toy",
    "train": "runs.train",
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
    "elbo",
    "evaluate",
    "explain",
    "load",
    "report",
    "resume",
    "toy",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'nelbo' has no attribute {name!r}")
    value = getattr(import_module(f"nelbo.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """Keep `nelbo.report` a function, even after the subpackage of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
