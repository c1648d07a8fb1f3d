"""`nelbo evaluate` and its twin in Python: the same options, the same numbers, one reading."""

import inspect
import json

import pytest
import torch
from support.commands import nelbo_fails, run_ok

import nelbo
from nelbo.cli.evaluate import evaluate as command
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.per_dimension import by_column, by_dimension
from nelbo.runs import own_data


def test_each_option_of_the_command_is_one_of_the_function():
    function = inspect.signature(nelbo.evaluate).parameters
    options = inspect.signature(command).parameters
    assert {*options} - {*function} == {"save", "json", "figure"}  # which write the result
    for name, option in options.items():
        if name in function and name != "device":  # auto, where nobody has put the model
            assert option.default == function[name].default, name


def test_the_method_of_a_run_has_each_option_that_a_run_takes():
    function = inspect.signature(nelbo.evaluate).parameters
    method = inspect.signature(nelbo.Run.evaluate).parameters
    foreign = {"run", "condition", "times", "known", "reading"}
    foreign |= {"lines", "prompt_field", "answer_field"}
    foreign |= {"trust_remote_code", "precision", "device_map"}
    assert {*function} - {*method} == foreign | {"device"}
    assert all(method[name].default == function[name].default for name in {*method} - {"self"})


def test_several_numbers_of_steps_read_the_data_once(trained, monkeypatch, capsys):
    run, read = nelbo.load(trained), []
    monkeypatch.setattr(nelbo.Run, "grid", lambda run, steps, track=iter: TimeGrid.uniform(steps))
    one_by_one = [run.evaluate(steps=steps, calls=2) for steps in (2, 3)]
    load = own_data.load
    monkeypatch.setattr(own_data, "load", lambda config: read.append(1) or load(config))
    found = nelbo.sweep(run, [2, 3], calls=2)
    assert len(read) == 1 and [each.steps for each in found] == [2, 3]
    run_ok("evaluate", trained, "--steps", "2,3", "--calls", 2, "--json")
    printed = json.loads(capsys.readouterr().out)["sweep"]
    assert [each["nats"] for each in printed] == [each.nats for each in one_by_one]


def test_the_samples_of_the_model_are_between_two_ends(trained, capsys):
    own = nelbo.evaluate(trained, steps=2, grid="uniform", importance_samples=2, own_samples=5)
    assert own.examples == 5 and own.gap > 0
    steps = ("--steps", 2, "--grid", "uniform", "--importance-samples", 2, "--own-samples", 5)
    run_ok("evaluate", trained, *steps, "--json")
    assert json.loads(capsys.readouterr().out)["nats"] == own.nats
    assert "give both" in nelbo_fails(capsys, "evaluate", trained, "--own-samples", 5)


def test_the_costs_of_columns_are_those_of_their_dimensions(of_words):
    run, _ = of_words
    grid = TimeGrid.uniform(3)
    found = run.evaluate(steps=3, grid="uniform", calls=4, columns=True).columns
    batch, _ = run.batch()
    (bound,) = by_dimension(run.model, batch[:1000], grid)
    expected = by_column(-bound.elbo, run.config.schema.columns)
    assert found.steps == 3 and torch.equal(found.nats, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lines": True}, "lines, prompt_field and answer_field are for a model of tokens"),
        ({"columns": True}, "of a run's table"),
        ({"grid": "uniform"}, "give steps too"),
        ({"own_samples": 3}, "give both"),
        ({"ode": True, "columns": True}, "stated beside the plain bound"),
    ],
)
def test_an_option_that_does_nothing_is_refused(trained, options, words):
    with pytest.raises(ValueError, match=words):
        nelbo.evaluate(trained, **options)
