"""The one check of a call's arguments against the annotations of the function.

    @checked
    def sample(n: int = 64, steps: int | None = None, grid: Literal["best", "uniform"] = "best"):
        ...

    sample(n="8")
    ValueError: n must be an integer; got '8'

Types are strict, as in `validation`: an integer is a float, but a text is no number and a boolean
is no integer. Scalars of NumPy and torch become those of Python, arrays are sequences and
tensors. An annotation that names anything else, such as `object` for the many kinds of data, is
left to the function.
"""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from nelbo._utils import spelling
from nelbo._utils.scalars import plain
from nelbo._utils.text import nearest, shortened

F = TypeVar("F", bound=Callable[..., object])
#: the types that are checked beside classes of torch and nelbo, and how a sentence names them
WORDS: dict[object, str] = {
    int: "an integer",
    float: "a finite number",
    str: "a string",
    bool: "True or False",
    Path: "a path",
    PathLike: "a path",
    Callable: "a function",
    Sequence: "a list",
    Collection: "a list",
    tuple: "a list",
    Mapping: "a mapping",
    NoneType: "None",
}
ITEM_WORDS: dict[object, str] = {int: "integers", float: "numbers", str: "strings"}
LISTS = (Sequence, Collection, tuple)
ITEMS = 1000  # of a list, the first of which are checked


def checked(function: F) -> F:
    """Return a function, or a class, whose arguments are checked before each call.

    Raises:
        ValueError: an argument is of another type than annotated, a number is not finite, or a
            text is none of those in a `Literal`. Those of the function show options as `spelling`.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: object, **options: object) -> object:
        try:
            given = signature.bind(*args, **options)
        except TypeError:
            _check_names(function, options)
            _check_once(function, len(args), options)
            return function(*args, **options)  # too many or too few, which Python says well
        _check_names(function, options)
        rest = given.arguments.get(_rest(function)[0] or "", {})
        for name, kinds in _checkable(function).items():
            for held in (given.arguments, rest):
                if name in held and not (held is rest and held[name] is None):  # as left out
                    held[name] = plain(held[name])
                    # of many arguments without names, one may be in another's place
                    placed = name in _placed(function)[2 : len(args)]
                    _check(name, held[name], kinds, _order(function) if placed else "")
        with spelling.in_errors():
            return function(*given.args, **given.kwargs)

    return cast(F, call)


def _check_names(function: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raise TypeError on an argument that a function has not, with the nearest that it has."""
    name, keys = _rest(function)
    if name is not None and not keys:
        return  # it takes any
    parameters = inspect.signature(function).parameters
    known = [each for each in (*parameters, *keys) if each not in ("self", name)]
    for given in options:
        if given not in known:
            near = nearest(given, known)
            advice = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"{function.__name__} has no argument {given}; {advice}")


def _check_once(
    function: Callable[..., object], count: int, options: Mapping[str, object]
) -> None:
    """Raise TypeError on an argument that is given by its place and by its name."""
    twice = next((name for name in _placed(function)[:count] if name in options), None)
    if twice is not None:
        raise TypeError(f"{function.__name__} got two values for {twice}{_order(function)}")


@functools.cache
def _placed(function: Callable[..., object]) -> list[str]:
    """Return the names of the arguments that may be given by their place, with self."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def _order(function: Callable[..., object]) -> str:
    """Return the end of a sentence on an argument that is in the wrong place."""
    names = [name for name in _placed(function) if name != "self"]
    return f"; without names, the arguments of {function.__name__} are {', '.join(names)}"


@functools.cache
def _rest(function: Callable[..., object]) -> tuple[str | None, dict[str, object]]:
    """Return the name of **options, and their types if it is an `Unpack` of a TypedDict."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            kind = next(iter(get_args(parameter.annotation)), None)
            return name, dict(get_type_hints(kind)) if is_typeddict(kind) else {}
    return None, {}


@functools.cache
def _checkable(function: Callable[..., object]) -> dict[str, tuple[Any, ...]]:
    """Return the parameters whose annotation can be checked, with the parts of its union."""
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    annotations = {each.name: each.annotation for each in parameters if each.kind not in variadic}
    parts = {name: tuple(_parts(of)) for name, of in (annotations | _rest(function)[1]).items()}
    return {name: kinds for name, kinds in parts.items() if all(map(_known, kinds))}


def _parts(annotation: Any) -> list[Any]:  # noqa: ANN401
    """Return the members of a union."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [part for each in get_args(annotation) for part in _parts(each)]
    return _parts(get_args(annotation)[0]) if origin is Annotated else [annotation]


def _known(kind: object) -> bool:
    kind = get_origin(kind) or kind
    if kind is Literal or kind in WORDS:
        return True
    root = getattr(kind, "__module__", "").partition(".")[0]
    return isinstance(kind, type) and root in ("nelbo", "torch") and not _is_protocol(kind)


def _is_protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


def _check(name: str, value: object, kinds: tuple[Any, ...], order: str) -> None:
    if any(_fits(value, kind) for kind in kinds):
        return
    words = list(dict.fromkeys(map(_words, sorted(kinds, key=lambda kind: kind is NoneType))))
    choices = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    near = nearest(value[:99], list(map(str, choices))) if isinstance(value, str) else ""
    fix = f"; did you mean {near!r}?" if near else ""
    got = shortened(" ".join(repr(value).split()))  # of a tensor in one line
    raise ValueError(f"{name} must be {' or '.join(words)}; got {got}{fix}{order}")


def _words(kind: Any) -> str:  # noqa: ANN401
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if origin in LISTS and (items := ITEM_WORDS.get(get_args(kind)[0])):
        return f"a list of {items}"
    root = origin.__module__.partition(".")[0]
    return WORDS.get(origin) or f"a {root} {origin.__name__}"


def _fits(value: object, kind: Any) -> bool:  # noqa: ANN401
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(kind))
    if origin is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if origin in (int, bool):
        return type(value) is origin
    if origin is Callable:
        return callable(value)
    if origin not in LISTS:
        return isinstance(value, origin) or (
            origin.__name__ == "Tensor" and bool(getattr(value, "shape", ()))
        )
    item = get_args(kind)[0]
    if isinstance(value, str | Mapping):
        return item is str and isinstance(value, str)
    if getattr(value, "shape", ()):
        return True
    if not isinstance(value, Sequence | Collection):
        return False
    first = map(plain, list(value)[:ITEMS] if item in ITEM_WORDS else [])
    # that the numbers of a list are finite is for the function, which knows their meaning
    return all(_fits(each, item) or (item is float and type(each) is float) for each in first)
