from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt

from nelbo._utils.validation import MOST, Record, validated


@dataclass(frozen=True)
class Part(Record):
    name: str
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Whole(Record):
    size: Annotated[int, Ge(1)] = 3
    rate: Annotated[float, Gt(0)] = 0.5
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    parts: tuple[Part, ...] = ()
    hidden: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size == 7:
            raise ValueError("size cannot be seven")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": "3"}, "size must be an integer; got '3' in x"),
        ({"size": 3.0}, "size must be an integer; got 3.0 in x"),
        ({"size": True}, "size must be an integer; got True in x"),
        ({"size": 0}, "size must be at least 1; got 0 in x"),
        ({"size": 7}, "size cannot be seven in x"),
        ({"rate": True}, "rate must be a number; got True in x"),
        ({"rate": 0}, "rate must be positive; got 0 in x"),
        ({"rate": float("nan")}, "rate must be finite; got nan in x"),
        ({"rate": float("inf")}, "rate must be finite; got inf in x"),
        ({"kind": "c"}, "kind must be one of a, b; got 'c' in x"),
        ({"kind": ["a"]}, "kind must be one of a, b; got ['a'] in x"),
        ({"flag": 1}, "flag must be true or false; got 1 in x"),
        ({"parts": {"name": "p"}}, "parts must be a list; got {'name': 'p'} in x"),
        ({"parts": "p"}, "parts must be a list; got 'p' in x"),
        ({"parts": [1]}, "parts[0] must be a JSON object; got 1 in x"),
        ({"parts": [{}]}, "missing key 'parts[0].name' in x"),
        ({"parts": [{"nme": 1}]}, "unknown key 'parts[0].nme' in x; known are name, ends"),
        ({"parts": [{"name": "p", "ends": [1]}]}, "parts[0].ends has too few values in x"),
        ({"parts": [{"name": "p", "ends": [1, "2"]}]}, "parts[0].ends[1] must be a number"),
        ({"hidden": [None]}, "hidden[0] must be a string; got None in x"),
        (
            {"sizes": 1},
            "unknown key 'sizes' in x; known are size, rate, kind, flag, parts, hidden",
        ),
        ([1], "the value must be a JSON object; got [1] in x"),
    ],
)
def test_a_mistake_is_one_sentence(values, says):
    with pytest.raises(ValueError) as error:
        Whole.from_dict(values, "x")
    assert str(error.value).startswith(says)
    if says.startswith(("size", "rate", "kind", "flag", "hidden")):  # and where it is made
        with pytest.raises(ValueError) as made:
            Whole(**values)
        assert str(made.value) == says.removesuffix(" in x")


def test_values_come_back():
    whole = Whole(size=np.int64(4), rate=1, parts=[Part("p", (np.float32(0.5), 2))])
    assert [type(v) for v in (whole.size, whole.rate, whole.parts)] == [int, float, tuple]
    assert whole.parts[0].ends == (0.5, 2.0)
    assert Whole.from_dict(whole.to_dict(), "x") == whole == Whole.from_dict({**vars(whole)})
    with pytest.raises(ValueError, match=r"^ends must be a list; got 1 in the part 'p'$"):
        Part("p", 1)


def test_a_long_value_is_shortened():
    with pytest.raises(ValueError) as error:
        Whole.from_dict({"size": "3" * 10**6, "u" * 10**6: 1})
    assert len(str(error.value)) < 300


def test_a_list_is_read_to_its_first_mistake():
    """Hostile files may hold millions, and each would be kept."""
    with pytest.raises(ValueError, match=r"^hidden\[0\] must be a string; got 1"):
        Whole.from_dict({"hidden": [1] * (MOST + 1)})
    with pytest.raises(ValueError, match=r"^parts\[1\] must be a JSON object"):
        Whole.from_dict({"parts": [{"name": "p"}] + [1] * MOST})
    with pytest.raises(ValueError, match=f"^{MOST + 1} values are impossible in x"):
        Whole.from_dict({f"k{i}": 1 for i in range(MOST + 1)}, "x")


def test_other_types_than_records():
    assert validated(dict[str, list[str]], {"a": ["b"]}, "x") == {"a": ["b"]}
    with pytest.raises(ValueError, match=r"^a\[0\] must be a string; got 1 in x$"):
        validated(dict[str, list[str]], {"a": [1]}, "x")
