"""nelbo: diffusion models you can measure in bits.

    run = nelbo.load("runs/digits")
    x, _ = run.examples()
    nelbo.evaluate(run.model, x)                 # mean bound, standard error, terms, price
    nelbo.elbo(run.model, x[:8].long()).elbo     # one unbiased draw per example, nats

Names are imported where first used, so `import nelbo` costs no more than its own lines.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nelbo.checkpoint import Run, load
    from nelbo.elbo import Bound
    from nelbo.estimate import Continuum, Grid, elbo
    from nelbo.evaluate import evaluate
    from nelbo.model import Model
    from nelbo.process import Absorbing, Gaussian
    from nelbo.report import report
    from nelbo.sample import ancestral
    from nelbo.schedules import Schedule
    from nelbo.train import resume, train

_HOME = {
    "Absorbing": "process",
    "Bound": "elbo",
    "Continuum": "estimate",
    "Gaussian": "process",
    "Grid": "estimate",
    "Model": "model",
    "Run": "checkpoint",
    "Schedule": "schedules",
    "ancestral": "sample",
    "elbo": "estimate",
    "evaluate": "evaluate",
    "load": "checkpoint",
    "report": "report",
    "resume": "train",
    "train": "train",
}
__all__ = [
    "Absorbing",
    "Bound",
    "Continuum",
    "Gaussian",
    "Grid",
    "Model",
    "Run",
    "Schedule",
    "ancestral",
    "elbo",
    "evaluate",
    "load",
    "report",
    "resume",
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
    """`nelbo.elbo` is the function also after something imported the module of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
