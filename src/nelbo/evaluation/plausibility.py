"""Signs in a bound that the data or the model are not what they are taken for."""

import math

from nelbo.evaluation.result import BoundEstimate, Evaluation, LatentTerms, Measurement

FAR = 2.0  # times the bits of uniform levels beyond which the steps of least noise are to blame


def check_number(found: Measurement) -> None:
    """Raise ValueError if a bound is not a number."""
    if math.isnan(found.nats):
        of = "the examples" if found.split == "as given" else found.split
        raise ValueError(
            f"the bound of {of} is not a number; look for outputs of the network that are not"
            " finite, and for extreme values in the data, example by example with: nelbo score"
        )


def worse_than_uniform(found: Evaluation | BoundEstimate, levels: int) -> str:
    """Return a note if the bound is worse than that of a uniform distribution, else "".

    Args:
        found: the bound.
        levels: that can be predicted, of a dimension.
    """
    if found.bits_per_dim is None or levels < 2 or not found.bits_per_dim > math.log2(levels):
        return ""
    where = f" with {found.steps} steps" if isinstance(found, Evaluation) and found.steps else ""
    return (
        f"worse than uniform{where}: {levels} equally likely levels take {math.log2(levels):.4g}"
        f" {found.unit}; are these data of the kind, and of the levels, that the model was trained"
        f" on?{_of_least_noise(found, math.log2(levels))}"
    )


def _of_least_noise(found: Evaluation | BoundEstimate, uniform: float) -> str:
    """Return a hint if the steps of least noise take far more than uniform levels, bits/dim.

    They are P(x|z_1), and the first bin of the diffusion term, whose variance is the next to it.
    """
    if not isinstance(found, Evaluation) or isinstance(found.terms, LatentTerms):
        return ""
    last, first = found.terms.reconstruction, 0.0
    beside = ""
    if found.steps is not None and found.curve:  # in continuous time there is no variance
        first = found.curve[0].value
        beside = f" and the diffusion term up to t = {found.curve[0].t_to:.3g} takes {first:.4g}"
    if not last + first > FAR * uniform:
        return ""
    return (
        f" The last step, P(x|z_1), takes {last:.4g}{beside}: look at the variance there,"
        " which may be far too small for the network's error; for another library's folder compare"
        " that of its scheduler, ,variance=small or ,variance=large, with the one that fits best,"
        " ,variance=optimal"
    )
