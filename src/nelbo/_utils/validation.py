"""The one check of plain values, from JSON or from a user, against annotated types.

A `Record` is a dataclass whose annotations are its specification:

    @dataclass(frozen=True)
    class Size(Record):
        width: Annotated[int, Ge(1)] = 32

    Size.from_dict({"width": 0}, "config.json")
    ValueError: width must be at least 1; got 0 in config.json

Types are strict: an integer is a float, but a text is no number and a boolean is no integer. Lists
become tuples. Unknown keys are refused. The work is done by pydantic, imported at the first check.
"""

import dataclasses
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    Self,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
)

from nelbo._utils.scalars import plain
from nelbo._utils.text import nearest, shortened

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails, SchemaValidator, ValidationError

T = TypeVar("T")
SCALARS = ("int", "float", "str", "bool")
MOST = 1000  # mistakes, beyond which they are counted and not read
#: pydantic's names of mistakes, and the end of a sentence that begins with the place
SENTENCES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "finite_number": "must be finite",
    "literal_error": "must be one of {expected}",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must have {min_length} or more values",
    "string_too_short": "must have {min_length} or more characters",
    "dict_type": "must be a JSON object",
    "dataclass_type": "must be a JSON object",
}
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


class Record:
    """Base of dataclasses of plain values, which are checked whenever one is made.

    Scalars of NumPy become those of Python. A subclass that checks more calls this
    `__post_init__` first.

    Raises:
        ValueError: a value has another type than annotated, is out of its limits or not finite.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012

    def __post_init__(self) -> None:
        given = {name: plain(value) for name, value in vars(self).items()}
        name = given.get("name")
        where = f"the {type(self).__name__.lower()} {name!r}" if isinstance(name, str) else ""
        kind = cast(Any, type(self))
        for name, value in _check(_validator(kind, True), kind, given, where).items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, object]:
        """Return the values by name, ready for JSON: `from_dict` gives the record back."""
        return dataclasses.asdict(cast(Any, self))

    @classmethod
    def from_dict(cls, values: object, where: str = "") -> Self:
        """Return the record of a result of `to_dict`; a missing key takes its default, if any.

        Raises:
            ValueError: a key is unknown or missing, or a value is impossible; names `where`.
        """
        return validated(cls, values, where)


def validated(kind: type[T], values: object, where: str) -> T:
    """Return plain values as an instance of a type: a dataclass, or such as `dict[str, int]`.

    Raises:
        ValueError: they are not of this type; the message names the place in the values, the value
            found there, and `where` they come from.
    """
    return _check(_validator(cast(Any, kind), False), kind, values, where)


def _check(validator: "SchemaValidator", kind: object, values: object, where: str) -> Any:  # noqa: ANN401
    from pydantic_core import ValidationError

    try:
        return validator.validate_python(values)
    except ValidationError as error:
        end = f" in {where}" if where else ""
        raise ValueError(_sentence(kind, error, end)) from None


@cache
def _validator(kind: Any, of_fields: bool) -> "SchemaValidator":  # noqa: ANN401
    """Return the validator of a type, or of the fields of a dataclass as a mapping."""
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator
    from typing_extensions import TypedDict

    if of_fields:
        fields = TypedDict(kind.__name__, get_type_hints(kind, include_extras=True))  # type: ignore[misc]
        fields.__pydantic_config__ = kind.__pydantic_config__  # type: ignore[attr-defined]
        kind = fields
    return SchemaValidator(_strict(TypeAdapter(kind).core_schema))


def _strict(schema: Any) -> Any:  # noqa: ANN401
    """Return pydantic's schema with strict scalars and with lists read to their first mistake.

    A file of nothing but mistakes would otherwise take more memory than its bytes account for.
    """
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if schema.get("type") in SCALARS:
        made["strict"] = True
    if schema.get("type") in ("tuple", "list"):
        made["fail_fast"] = True
    return made


def _sentence(kind: object, error: "ValidationError", end: str) -> str:
    """Return one sentence about the first of pydantic's mistakes."""
    if error.error_count() > MOST:
        return f"{error.error_count()} values are impossible{end}"
    found = min(error.errors(include_url=False), key=lambda each: each["type"] == "missing")
    *above, last = found["loc"] or ("",)
    name = _path(found["loc"]) or "the value"
    if found["type"] in UNKNOWN:
        known = ", ".join(_keys(kind, above))
        return f"unknown key {shortened(name, 64)!r}{end}" + (f"; known are {known}" * bool(known))
    if found["type"] == "missing":
        what = f"{_path(above)} has too few values" if isinstance(last, int) else ""
        return (what or f"missing key {name!r}") + end
    if found["type"] == "value_error":  # the sentence of a __post_init__
        return f"{found['ctx']['error']}{end}"
    near = ""
    if found["type"] == "literal_error" and isinstance(found["input"], str):
        near = nearest(found["input"][:99], _must_be(found).partition("one of ")[2].split(", "))
    fix = f"; did you mean {near!r}?" if near else ""
    return f"{name} {_must_be(found)}; got {shortened(repr(found['input']))}{end}{fix}"


def _must_be(found: "ErrorDetails") -> str:
    context = dict(found.get("ctx", {}))
    if "expected" in context:  # 'a', 'b' or 'c'
        context["expected"] = context["expected"].replace(" or ", ", ").replace("'", "")
    if context.get("gt") == 0:
        return "must be positive"
    plainly = found["msg"].replace("Input should be", "must be")
    return SENTENCES.get(found["type"], plainly).format(**context)


def _path(place: "tuple[int | str, ...] | list[int | str]") -> str:
    """Return a place in nested values as it is written in Python.

    >>> _path(("columns", 0, "name"))
    'columns[0].name'
    """
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    return "".join(parts).removeprefix(".")


def _keys(kind: object, place: "list[int | str]") -> list[str]:
    """Return the keys of the dataclass at a place within a type; none if there is none."""
    for key in [*place, None]:
        held = next((each for each in _parts(kind) if dataclasses.is_dataclass(each)), None)
        if held is None:
            break
        if key is None:
            return [field.name for field in dataclasses.fields(held)]
        if isinstance(key, str):
            kind = get_type_hints(held).get(key)
    return []


def _parts(kind: object) -> list[object]:
    """Return a type and all types that it is made of, such as X of `tuple[X, ...] | None`."""
    return [kind, *(part for each in get_args(kind) for part in _parts(each))]
