"""The section of a report on how to make it again: versions, commands and the configuration."""

import platform
import shlex
import textwrap
from html import escape
from typing import TYPE_CHECKING

import torch

from nelbo._version import __version__
from nelbo.data.schema import Schema
from nelbo.models.config import CUSTOM
from nelbo.pages.images import is_image
from nelbo.report.markup import section
from nelbo.report.studies import SAMPLE_STEPS
from nelbo.training.presets import OF_NETWORKS

if TYPE_CHECKING:
    from nelbo.runs.run import Run


def again(run: "Run", seed: int) -> str:
    """Return the section with versions, commands and the configuration."""
    path = shlex.quote(str(run.path))
    commands = "\n".join(
        (
            "# the run",
            train_command(run),
            "# the bound at the top",
            f"nelbo evaluate {path} --seed {seed}",
            "# the bound of few steps, on all test examples",
            f"nelbo evaluate {path} --steps 8 --seed {seed}",
            "# samples",
            f"nelbo sample {path} --n 64 --steps {SAMPLE_STEPS} --seed {seed} --out samples."
            + _kind_of_file(run.config.schema),
            *(
                ("# a file of the data", f"nelbo compress {path} DATA --out data.nlb")
                if not run.config.schema.density and not run.config.schema.condition
                else ()
            ),
            "# this page",
            f"nelbo report {path} --seed {seed}",
        )
    )
    versions = (
        f"nelbo {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    return section(
        "How to reproduce this page",
        f"{versions}.",
        f"<pre>{escape(commands)}</pre><h3>config.json</h3>"
        f"<pre>{escape(run.config.to_json().strip())}</pre>",
    )


def train_command(run: "Run") -> str:
    """Return the command that trains the run, with every option, independent of later presets."""
    config = run.config
    if config.train.grid:  # fine-tuned from another run, whose name is not recorded
        tuned = f"--steps-of-bound {len(config.train.grid)} --steps {config.train.steps}"
        return f"nelbo train --resume RUN {tuned} --out {shlex.quote(str(run.path))}"
    options: dict[str, object] = {"levels": config.schema.levels, "size": config.size}
    options |= config.model.to_dict() | config.train.to_dict()
    if config.model.network == CUSTOM:
        return _train_call(run, options)
    words = [shlex.join(["nelbo", "train", config.source, "--out", str(run.path)])]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] * value  # a flag, off by default
        # the absorbing process implies its only head and decoder
        elif value not in (None, (), "symbols", "categorical"):
            words.append(f"{option}\0{value}")
    words += [f"--condition\0{shlex.quote(label.name)}" for label in config.schema.condition]
    lines = textwrap.wrap(" ".join(words), 92, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\0", " ")


def _train_call(run: "Run", options: dict[str, object]) -> str:
    """Return the call that trains a run with a network of the user's own."""
    given = {k: v for k, v in options.items() if k not in ("network", *OF_NETWORKS)}
    given["condition"] = [label.name for label in run.config.schema.condition]
    words = [f"{name}={value!r}" for name, value in given.items() if value not in (None, (), [])]
    places = f"{run.config.source!r}, {str(run.path)!r}, network=module"
    call = f"nelbo.train({', '.join([places, *words])})"
    lines = textwrap.wrap(call, 92, break_long_words=False, break_on_hyphens=False)
    return "\n    ".join(lines)


def _kind_of_file(schema: Schema) -> str:
    return "png" if is_image(schema) else "csv" if schema.columns else "npz"
