"""One sentence for a command line that names other arguments than its command has."""

from difflib import get_close_matches

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownOptionError,
)
from cyclopts.argument import Argument
from cyclopts.exceptions import UnusedCliTokensError

#: options of other programs, and those that do their work here
ELSEWHERE = {
    "epochs": ("steps", "minutes"),
    "learning_rate": ("lr",),
    "batch_size": ("batch",),
    "layers": ("depth",),
    "limit": ("target-error", "calls"),
    "num_samples": ("n",),
    "output": ("out",),
}
NUMBERS = {int: "a whole number", float: "a number"}
ALIKE = 0.7  # of get_close_matches: at 0.6 epochs is like process, and limit like split


def sentence(error: CycloptsError, app: App) -> str:
    """Return what the command takes and what it got; of other mistakes, the words of cyclopts."""
    command = " ".join(error.command_chain or ())
    if not command:
        return str(error).strip()
    known = list(app[command].assemble_argument_collection(parse_docstring=True))
    if isinstance(error, UnknownOptionError) and error.token.source == "cli":
        given = (error.token.keyword or error.token.value).partition("=")[0]
        return f"{command} has no option {given}; {_instead(given, command, known)}"
    if isinstance(error, UnusedCliTokensError):
        rest = " ".join(error.unused_tokens or ())
        data = any("--data" in each.names and each.index is None for each in known)
        fix = f"give data as --data {rest}" if data else "leave it out"
        return f"{command} takes {_needs(known, False)}, and got {rest} too; {fix}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.keyword is not None or error.argument.tokens:
            return f"{error.keyword or error.argument.name} needs a value; {_help(command)}"
        given = " ".join((error.root_input_tokens or [])[len(error.command_chain or ()) :])
        needs = _needs(known, True)
        return f"{command} needs {needs}; got {given or 'nothing'}; {_help(command)}"
    if (
        isinstance(error, CoercionError)
        and error.token is not None
        and error.token.source == "cli"
        and error.target_type in NUMBERS
    ):
        name, value = error.token.keyword or command, error.token.value
        first = value.partition(",")[0]
        fix = f"give one, such as {first}" if first != value else _help(command)
        return f"{name} of {command} must be {NUMBERS[error.target_type]}; got {value!r}; {fix}"
    return str(error).strip()


def _instead(given: str, command: str, known: list[Argument]) -> str:
    """Return the advice to take the options that do the same, or one that is spelled alike."""
    options = [name for each in known for name in each.names if name.startswith("--")]
    name = given.lstrip("-")
    if name == "guidance":
        from nelbo.integrations.memory import GUIDANCE  # torch, which --help does not load

        return GUIDANCE
    meant = [f"--{each}" for each in ELSEWHERE.get(name.replace("-", "_"), ())]
    near = [option for option in meant if option in options] or [
        f"--{each}" for each in get_close_matches(name, [o[2:] for o in options], 1, ALIKE)
    ]
    return f"did you mean {' or '.join(near)}?" if near else _help(command)


def _needs(known: list[Argument], options: bool) -> str:
    """Return the arguments that a command takes by place, and the options that it needs."""
    words = []
    for each in known:
        value = each.name.lstrip("-").upper()
        if each.index is not None:
            words.append(value if each.required else f"[{value}]")
        elif options and each.required:
            words.append(f"{each.name} {value}")
    return " ".join(words)


def _help(command: str) -> str:
    return f"see: nelbo {command} --help"
