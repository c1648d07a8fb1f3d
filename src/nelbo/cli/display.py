"""Results as text on the terminal, and as arrays in a file."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from nelbo._utils.terminal import Terminal
from nelbo.codec.files import Report
from nelbo.data.inspection import Inspection
from nelbo.evaluation.result import (
    BoundEstimate,
    ColumnCosts,
    Evaluation,
    FlowDetails,
    ImportanceDetails,
    Measurement,
)

BLOCKS = 8  # characters of a curve in a table, which then fits into 80 columns


def sweep(found: Sequence[Evaluation]) -> None:
    """Print bounds of several numbers of steps: their terms, and the diffusion over time."""
    first, console = found[0], Terminal()
    title = f"{_bound(first)}, {escape(first.split)}, by number of steps"
    table = Table(title=title, title_justify="left")
    terms = list(vars(first.terms))
    for name in ("steps", first.unit, "standard\nerror", *terms):
        table.add_column(name, justify="right")
    table.add_column("over t,\n0 to 1")
    for each in found:
        value = each.value
        table.add_row(
            str(each.steps),
            f"[bold]{value:.4f}",
            _error(each.standard_error.total),
            *(f"{term:.4f}" for term in vars(each.terms).values()),
            _blocks(_heights(each, BLOCKS)),
        )
    console.print(table)
    console.print(
        f"{first.examples} examples of {first.dims} dimensions; network calls per example:"
        f" {', '.join(f'{each.calls_per_example:.4g}' for each in found)}; seed {first.seed};"
        f" weights: {first.weights}; {first.precision}; data {first.data_hash}",
        highlight=False,
        markup=False,
    )


def _rates(found: Measurement, before: str = "") -> str:
    """Return the bound per token, character and byte in words, "" where it is not of text."""
    line = ", ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in found.rates.items())
    return line and before + line


def result(found: Evaluation | BoundEstimate) -> None:
    """Print a bound: a table, its curve or convergence, and everything needed to reproduce it."""
    console = Terminal()
    table = _table(_title(found), found)
    if isinstance(found, Evaluation):
        for name, term in vars(found.terms).items():
            table.add_row(name, f"{term:.4f}", "")
        if (exact := found.in_order) is not None:
            value = exact.value
            table.add_section()
            error = _error(exact.standard_error.total)
            table.add_row(f"[bold]{exact.name}", f"[bold]{value:.4f}", error)
    console.print(table)
    if isinstance(found, Evaluation) and (exact := found.in_order) is not None:
        console.print(
            f"{exact.name}: the exact -log P(x) of {exact.of}, {exact.nats:.3f} nats per"
            f" example, without a Monte Carlo error; {exact.calls_per_example:.4g} network calls"
            f" per example{_rates(exact, '; ')}",
            highlight=False,
        )
    if found.rates:
        console.print(_rates(found), highlight=False)
    line = _sparkline(found) if isinstance(found, Evaluation) else _convergence(found)
    console.print(line, highlight=False)
    backward = "" if isinstance(found, Evaluation) else found.backward_calls_per_example
    visited = found.visited if isinstance(found, Evaluation) else found.examples
    which = "each once" if visited == found.examples else f"a random sample of {visited} used"
    console.print(
        f"{found.nats:.3f} nats per example; {found.examples} examples of {found.dims}"
        f" dimensions, {which}; {found.calls_per_example:.4g} network calls per example"
        f"{f' and {backward:.4g} backward' if backward else ''};"
        f" seed {found.seed}; weights: {found.weights}; {found.precision};"
        f" model {found.model_hash}, data {found.data_hash}",
        highlight=False,
        markup=False,
    )
    if line := _no_error(found):
        console.print(line, highlight=False, markup=False)


def _no_error(found: Evaluation | BoundEstimate) -> str:
    """Return why the error is not known, and what to do; "" if it is known."""
    if not math.isfinite(found.nats):
        return "an example has probability 0 or its bound is not a number: the mean has no error"
    if isinstance(found, Evaluation) and math.isnan(found.standard_error.monte_carlo):
        return (
            "the draws are too few or too similar to estimate a Monte Carlo error; try more"
            " --calls"
        )
    return ""


def columns(found: ColumnCosts) -> None:
    """Print the mean cost of each column of a table, the most expensive first."""
    cost = found.nats
    mean = cost.mean(0)
    error = (cost.var(0) / len(cost)).sqrt() if len(cost) > 1 else torch.full_like(mean, math.nan)
    title = f"by column, {len(cost)} examples, {found.steps} steps"
    table = Table(title=title, title_justify="left")
    for name in ("column", "nats", "standard error"):
        table.add_column(name, justify="left" if name == "column" else "right")
    for i in mean.argsort(descending=True).tolist():
        table.add_row(escape(found.names[i]), f"{mean[i]:.4f}", _error(error[i].item()))
    table.add_section()
    table.add_row("[bold]all", f"[bold]{mean.sum():.4f}", "")
    Terminal().print(table)


def npz(found: Evaluation | BoundEstimate) -> bytes:
    """Return a NumPy file of arrays (N,), nats, in the order of the data; `about` is JSON."""
    arrays: dict[str, Any] = {"about": np.array(json.dumps(found.to_dict()))}
    if isinstance(found, Evaluation):
        arrays |= found.to_arrays()
    else:
        arrays["nats"] = -found.per_example.numpy()
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def compressed(name: str, report: Report) -> None:
    """Print the header and the blocks of a compressed file."""
    console, header = Terminal(), report.header
    title = f"{name}: {header.examples} examples in {report.size} bytes"
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table()
    unit = f"bits/{report.dimension}"
    for column in ("examples", "by", "seeds", "batches", "bytes", escape(unit)):
        table.add_column(column, justify="left" if column == "by" else "right")
    for block in report.blocks:
        place = f"{block.first}..{block.first + block.count - 1}"
        numbers = map(str, (block.seeds, block.batches, block.size))
        table.add_row(place, block.mode, *numbers, f"{block.bits_per_dim:.4f}")
    console.print(table)
    shape = " x ".join(map(str, header.shape))
    bound = "none was coded by the model" if report.bound is None else f"{report.bound:.4f}"
    versions = ", ".join(f"{of} {version}" for of, version in header.versions.items())
    lines = (
        f"{report.bits_per_dim:.4f} {unit} in all; bound on the coded latents: {bound}",
        f"examples of {shape} numbers with {header.levels} levels; {len(header.steps) - 1}"
        f" steps; effort {header.effort}; network in {header.precision} on {header.device}",
        f"model {header.model}, weights: {header.weights}; {versions}",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _title(found: Evaluation | BoundEstimate) -> str:
    if isinstance(found, Evaluation):
        how = "continuous time" if found.steps is None else f"{found.steps} steps"
        return f"{_bound(found)}, {escape(found.split)}, {how}"
    if isinstance(found.how, ImportanceDetails):
        how = f"{found.how.samples} importance-weighted samples of {found.how.steps} steps"
    else:
        how = f"probability flow, {found.how.dequantiser} dequantisation"
    return f"{_bound(found)}, {escape(found.split)}, {how}"


def _bound(found: Evaluation | BoundEstimate) -> str:
    return f"bound on -log P(x|{escape(found.given)})" if found.given else "bound on -log P(x)"


def _table(title: str, found: Evaluation | BoundEstimate) -> Table:
    error, unit = found.standard_error, found.unit
    table = Table(title=title, title_justify="left")
    for column in ("", unit, "standard error"):
        table.add_column(column, justify="left" if not column else "right")
    value = found.value
    table.add_row("[bold]bound", f"[bold]{value:.4f}", _error(error.total))
    table.add_row("  data error", "", _error(error.data))
    table.add_row("  Monte Carlo error", "", _error(error.monte_carlo), end_section=True)
    return table


def _error(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.4f}"


def _sparkline(found: Evaluation) -> str:
    """Return the diffusion term over time, one block character per bin."""
    heights = _heights(found)
    top = max(heights, default=0.0)
    if not top > 0:
        return "diffusion over t: none"
    blocks = _blocks(heights)
    return f"diffusion over t: 0 {blocks} 1, at most {top:.3g} {found.unit} per unit of t"


def _heights(found: Evaluation, most: int = 1000) -> list[float]:
    """Return the diffusion term per unit of time in each bin that is known, in `most` at most."""
    points = [point for point in found.curve if not math.isnan(point.value)]
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [sum(p.value for p in g) / (g[-1].t_to - g[0].t_from) for g in groups]


def _blocks(heights: Sequence[float]) -> str:
    top = max(heights, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[max(0, min(7, int(8 * h / top)))] for h in heights if top > 0)


def _convergence(found: BoundEstimate) -> str:
    """Return the evidence that a tighter bound has converged."""
    if isinstance(found.how, FlowDetails):
        how = found.how
        of_probes = how.probe_error
        error = "" if of_probes is None else f", the error of its probes alone is {of_probes:.2g}"
        return (
            f"at tolerance {how.tolerance:g}; at {how.loose_tolerance:g} it is {how.loose:.4f}"
            f" {found.unit}, no example differs by more than {how.largest_change:.2g};"
            f" trace {how.trace}{error}"
        )
    return (
        f"the effective sample size of the {found.how.samples} samples is"
        f" {found.how.weight_share * found.how.samples:.2g} on average"
    )


def inspection(found: Inspection) -> None:
    """Print an inspection."""
    console = Terminal()
    if found.columns:
        table = Table(title=f"{escape(found.source)}: {found.rows} rows", title_justify="left")
        for heading in ("column", "kind", "values", "distinct", "missing"):
            table.add_column(heading, justify="right" if heading[-1] in "tg" else "left")
        for c in found.columns:
            missing = "some" if c.missing is None else str(c.missing or "")
            distinct = "" if c.distinct is None else str(c.distinct)
            row = (c.name, c.kind, c.values, distinct, missing)
            table.add_row(*map(escape, row))
        console.print(table)
    else:
        sizes = ", ".join(f"{count} {name}" for name, count in found.splits.items())
        console.print(f"{found.source}: {sizes}", highlight=False, markup=False)
    schema = found.schema
    if schema is not None and all(column.column for column in found.columns):
        unit = "a density, in nats" if schema.density else "a probability, in bits"
        shape = " x ".join(map(str, schema.shape))
        levels = f" with {schema.levels} levels" if schema.levels else ""
        line = f"examples are {shape} numbers{levels}; a model of them has {unit}"
        console.print(line, highlight=False)
    for warning in found.warnings:
        console.print(f"note: {warning}", highlight=False, markup=False)
