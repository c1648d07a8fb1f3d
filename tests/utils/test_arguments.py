"""Arguments are checked against annotations, before any work, in one sentence."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nelbo._utils.arguments import checked


class Rest(TypedDict, total=False):
    clip: bool


@checked
def call(
    n: int = 1,
    x: float | None = None,
    out: str | Path = "",
    grid: Literal["best", "uniform"] = "best",
    flag: bool = False,
    names: Sequence[str] = (),
    betas: Tensor | Sequence[float] = (),
    f: Callable[[int], int] = abs,
    splits: Mapping[str, str] | None = None,
    network: nn.Module | None = None,
    data: object = None,
    **rest: Unpack[Rest],
):
    return locals()


@pytest.mark.parametrize(
    "given",
    [
        {"n": np.int64(3), "x": 2, "out": Path("a")},
        {"x": torch.tensor(1.5), "flag": np.bool_(True), "grid": "uniform"},
        {"names": "one", "betas": np.array([0.1]), "f": int, "splits": {"a": "b"}},
        {"names": ["a", "b"], "betas": [0.1, np.float32(0.2), 1], "network": nn.Identity()},
        {"betas": torch.ones(2), "data": object(), "clip": True},
    ],
)
def test_what_fits_is_passed_on_as_numbers_of_python(given):
    found = call(**given)
    found |= found.pop("rest")
    for name, value in given.items():
        assert found[name] is value or found[name] == value
        assert not isinstance(found[name], np.generic)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n": torch.eye(2)}, r"n must be an integer; got tensor\(\[\[1., 0.\], \[0., 1.\]\]\)$"),
        ({"n": "8"}, "n must be an integer; got '8'"),
        ({"n": 1.0}, "n must be an integer; got 1.0"),
        ({"n": True}, "n must be an integer; got True"),
        ({"x": "8"}, "x must be a finite number or None; got '8'"),
        ({"x": float("nan")}, "x must be a finite number or None; got nan"),
        ({"x": True}, "x must be a finite number or None; got True"),
        ({"out": None}, "out must be a string or a path; got None"),
        ({"grid": "good"}, "grid must be one of best, uniform; got 'good'"),
        ({"grid": "Best"}, "grid must be one of best, uniform; got 'Best'; did you mean 'best'"),
        ({"flag": 1}, "flag must be True or False; got 1"),
        ({"names": 3}, "names must be a list of strings; got 3"),
        ({"names": [3]}, r"names must be a list of strings; got \[3\]"),
        ({"betas": "0.1"}, "betas must be a torch Tensor or a list of numbers; got '0.1'"),
        ({"betas": {}}, "betas must be a torch Tensor or a list of numbers; got {}"),
        ({"f": 3}, "f must be a function; got 3"),
        ({"splits": []}, r"splits must be a mapping or None; got \[\]"),
        ({"network": abs}, "network must be a torch Module or None; got <built-in"),
        ({"clip": 1}, "clip must be True or False; got 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_name_and_value(given, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        call(**given)


def test_a_name_that_there_is_not_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"^call has no argument betta; did you mean betas\?$"):
        call(betta=1)
    with pytest.raises(
        TypeError, match=r"^call has no argument zzz; known are n, x, .*, data, clip$"
    ):
        call(zzz=1)


def test_a_value_by_place_and_by_name_is_answered_with_the_places():
    with pytest.raises(
        TypeError, match=r"^call got two values for n; .* arguments of call are n, x, "
    ):
        call(1, n=2)


def test_a_value_in_the_place_of_another_is_answered_with_the_places():
    with pytest.raises(ValueError, match=r"^out must be .*; .* the arguments of call are n, x, "):
        call(1, 2, 3)
    with pytest.raises(ValueError, match=r"; got 3$"):
        call(1, 2, out=3)


def test_a_class_is_checked_when_one_is_made():
    @checked
    class Made:
        def __init__(self, n: int) -> None:
            self.n = n

    assert Made(np.int8(3)).n == 3
    with pytest.raises(ValueError, match="n must be an integer"):
        Made("3")
