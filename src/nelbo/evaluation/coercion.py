"""Examples for a bare model, from data of any kind."""

import warnings
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor

from nelbo.data.rows import Rows
from nelbo.data.schema import Schema
from nelbo.data.sources import Source, load_like
from nelbo.data.tabular.datasets import is_table
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.checks import as_tensor
from nelbo.diffusion.model import Model

if TYPE_CHECKING:
    from nelbo.diffusion.latent import LatentModel


def batch_of(model: "Model | LatentModel", x: Source | Batch) -> Batch:
    """Return examples of a model as a batch.

    Args:
        model: the model, whose shape and levels the examples must have.
        x: a batch, as it is; a tensor or an array of the model's shape, which is not copied; or
            data of any kind in `nelbo.data.coerce`.

    Warns:
        UserWarning: a guess, such as channels last.

    Raises:
        ValueError: the data are not of this model.
    """
    if model.any_length:
        return model.batch(cast(Tensor | Batch, x))
    if isinstance(x, Batch):
        return x
    if isinstance(x, Rows):
        return Batch(cast(Tensor, x))
    if (
        isinstance(x, Tensor | np.ndarray)
        and not is_table(x)
        and (tuple(x.shape[1:]) == model.shape or not model.alike)
    ):
        return Batch(as_tensor(x))  # checked by `check_examples`
    if not model.alike:  # the columns of a table, which no model knows by name
        raise ValueError(
            f"the model is of rows of {model.dims} numbers that stand for the cells of a table;"
            f" got {type(x).__name__}: give the table to the run, as in run.evaluate(frame), or"
            " run.batch(frame)[0] to the model"
        )
    levels = model.codes or None
    data = load_like(x, Schema("levels" if levels else "real", model.shape, levels))
    for note in data.notes:
        warnings.warn(note, stacklevel=3)
    return Batch(data.splits["all"])
