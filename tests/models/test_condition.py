"""P(x|c): each example is measured and drawn under its own condition, and completed exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.files import arrays_in
from support.runs import TINY
from torch import nn

from nelbo import data
from nelbo._utils.numerics import seeded
from nelbo.cli import main
from nelbo.data import Label, Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Categorical, GaussianDensity
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import SymbolLogits, XPrediction
from nelbo.diffusion.reverse import Optimal, Posterior
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.times import TimeGrid, elbo
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.grid_search import best_grid, measure_errors
from nelbo.evaluation.importance_bound import evaluate_importance
from nelbo.evaluation.per_dimension import by_dimension
from nelbo.evaluation.probability_flow import evaluate_flow
from nelbo.models.conditioning import Guided, drop, encode, features, guided, parse
from nelbo.runs import own_data
from nelbo.runs.loading import load as load_run
from nelbo.runs.train import resume, train
from nelbo.sampling.samplers import ancestral, complete

LOW, HIGH, S = -8.0, 8.0, 0.5
MIXED = 64.0  # nats more that an example costs, at least, under the condition of another
SCHEMA = Schema(
    "levels", (2,), 5, (Label("class", ("a", "b", "c")), Label("y", mean=2.0, spread=4.0))
)


class Denoiser(nn.Module):
    """The best one of x ~ N(c, S²) in each dimension; without c, of c = 0."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, gamma, condition=None):
        mean = torch.zeros_like(z[:, :1]) if condition is None else condition
        signal = torch.sigmoid(-gamma)[:, None].sqrt()
        gain = signal * S**2 / (signal**2 * S**2 + torch.sigmoid(gamma)[:, None])
        return self.one * (mean + gain * (z - signal * mean))


def model(step=None):
    """P(x|c) = N(c, S²) in two dimensions, but for the prior term."""
    spread = math.sqrt(1 / (1 / S**2 + math.exp(-LOW)))
    decoder = GaussianDensity(Affine(), spread).requires_grad_(False)
    process = GaussianDiffusion(Linear(LOW, HIGH), Affine())
    step = step or Posterior()
    return Model(Denoiser(), process, XPrediction(), step, decoder, (2,), conditioned_on="class")


@pytest.fixture
def pairs():
    """Examples and conditions that do not fit one another if rows are mixed up."""
    with seeded(0):
        c = 4.0 * torch.randint(-1, 2, (70, 1)).double()
        return c + S * torch.randn(70, 2, dtype=torch.float64), c


def exact(x, c):
    """-log N(x; c, S²), shape (N,)."""
    return ((x - c) ** 2 / (2 * S**2)).sum(1) + math.log(2 * math.pi * S**2)


def test_the_bound_is_of_each_example_given_its_own(pairs):
    x, c = pairs
    options = {"calls": 32, "per_example": True, "variates": True}
    result = evaluate(model(), Batch(x, c, "class"), **options)
    want = exact(x, c)
    assert result.given == "class"
    assert abs(result.nats - want.mean()) < 0.02 + 4 * result.standard_error.monte_carlo
    torch.testing.assert_close(-result.per_example.elbo, want, rtol=0, atol=MIXED / 8)
    # the same numbers, one class after another
    for value in c.unique():
        mine = c[:, 0] == value
        of_class = evaluate(model(), Batch(x, c)[mine], calls=32)
        error = 4 * of_class.standard_error.monte_carlo
        assert abs(of_class.nats - want[mine].mean()) < 0.02 + error
    assert evaluate(model().unconditional(), x).nats > result.nats + 10


def test_other_measures_keep_rows_together(pairs):
    x, c = pairs
    given, batch, want = model(), Batch(x, c), exact(x, c)
    few, fine = slice(0, 12), TimeGrid.uniform(128)
    with seeded(1), torch.no_grad():
        bound = elbo(given, batch, fine)
    torch.testing.assert_close(-bound.elbo, want, rtol=0, atol=MIXED / 8)
    (parts,) = by_dimension(given, batch, fine, ())
    torch.testing.assert_close(sum(parts).sum(1), want, rtol=0, atol=MIXED / 8)
    by_paths = evaluate_importance(given, batch[few], times=fine, samples=3, replicates=2, seed=1)
    torch.testing.assert_close(-by_paths.per_example, want[few], rtol=0, atol=MIXED / 8)
    by_flow = evaluate_flow(given, batch[few], samples=2, trace="exact", tolerance=1e-3)
    torch.testing.assert_close(-by_flow.per_example, want[few], rtol=0, atol=MIXED / 8)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, x: evaluate(model, x, calls=4),
        lambda model, x: elbo(model, x, TimeGrid.uniform(3)),
        lambda model, x: evaluate_importance(model, x, times=TimeGrid.uniform(3), samples=2),
        lambda model, x: evaluate_flow(model, x, samples=2),
        lambda model, x: best_grid(model, x, 4),
        lambda model, x: by_dimension(model, x, TimeGrid.uniform(3)),
        lambda model, x: ancestral(
            model, len(x), TimeGrid.uniform(3), condition=Batch.of(x).condition
        ),
    ],
    ids=["evaluate", "elbo", "importance", "flow", "grid", "dimensions", "ancestral"],
)
def test_conditions_of_other_examples_are_refused(pairs, measure):
    """Neither a slice of the examples nor more of them, under the labels of other rows."""
    x, c = pairs
    for some in (x[20:40], x.repeat(2, 1)):
        with pytest.raises(ValueError, match=f"got 70 conditions of {len(some)} examples"):
            measure(model(), Batch(some, c))
    with pytest.raises(ValueError, match=r"\(N, F\).*got the shape \(70,\)"):
        measure(model(), Batch(x, c[:, 0]))
    with pytest.raises(ValueError, match=r"one of P\(x\|class\), but the examples come without"):
        measure(model(), x)
    with pytest.raises(ValueError, match=r"one of P\(x\), but the examples come with conditions"):
        measure(model().unconditional(), Batch(x, c))


def test_grids_and_errors_are_measured_on_pairs(pairs, drawn_by_places):
    """Neither the best grid nor v(t) depends much on a shift in x and c together."""
    x, c = pairs
    grid = best_grid(model(), Batch(x, c), 4)
    assert grid.times.equal(best_grid(model(), Batch(x - c, 0 * c), 4).times)
    one = model(Optimal())
    measure_errors(one, Batch(x, c))
    assert one.step.errors.max() < 2 * S**2  # 16 or so if rows were mixed up


def test_samples_follow_their_conditions(pairs):
    _, c = pairs
    c = c.repeat(20, 1)
    x = ancestral(model(), len(c), TimeGrid.uniform(64), condition=c)
    for value in c.unique():
        mine = x[c[:, 0] == value]
        assert (mine.mean(0) - value).abs().max() < 0.1
        assert (mine.std(0) - S).abs().max() < 0.1


def test_guidance_counts_the_condition(pairs):
    _, c = pairs
    z, t = torch.ones(70, 2).double(), torch.full((70,), 0.5).double()
    given = model()
    with torch.no_grad():
        with_c, without = (given.predict(z, t, each).e_hat for each in (c, 0 * c))
        for g in (0.0, 0.5, 2.0):
            output = guided(given, g).predict(z, t, c).e_hat
            torch.testing.assert_close(output, without + g * (with_c - without))
    assert guided(given, 1.0) is given
    assert not isinstance(given.network, Guided)
    with pytest.raises(ValueError, match="guidance is for conditional runs"):
        guided(model().unconditional(), 2.0)
    with pytest.raises(ValueError, match="guidance must be finite; got inf"):
        guided(given, math.inf)


# Labels as numbers


def test_conditions_tell_labels_apart():
    labels = torch.tensor([[0.0, 2.0], [2.0, 6.0], [1.0, -2.0]]).double()
    told = encode(labels, SCHEMA)
    assert told.shape == (3, features(SCHEMA))
    assert told.tolist() == [[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, -1, 1]]
    with seeded(0):
        kept = drop(told.repeat(4000, 1), 0.1).any(1)
    assert abs(kept.double().mean() - 0.9) < 0.01
    assert drop(told, 0.0).equal(told)


def test_what_a_user_types():
    assert parse(["class=b", "y=3.5"], SCHEMA).tolist() == [[1, 3.5]]
    one = Schema("levels", (2,), 5, (Label("class", ("0", "1")),))
    assert parse(["1"], one).tolist() == parse(["class=1"], one).tolist() == [[1]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["class=d", "y=1"], r"'d' is out of range: class is one of a, b, c"),
        (["class=a", "y=x"], r"'x' is out of range: y is a number"),
        (["class=a", "y=nan"], r"'nan' is out of range"),
        (["class=a"], r"--condition y=VALUE is missing"),
        (["a", "y=1"], r"'a' is no label of the run; its labels are class, y"),
        (["class=a", "class=b", "y=1"], r"'class=b' is given twice"),
    ],
)
def test_what_no_label_is(texts, message):
    with pytest.raises(ValueError, match=message):
        parse(texts, SCHEMA)


# Completion


def test_masked_symbols_are_completed_exactly():
    """With the true conditionals of a joint of three symbols, those of what is missing."""
    with seeded(4):
        joint = torch.rand(3, 3, 3, dtype=torch.float64) ** 3
    joint = joint / joint.sum()
    table = torch.zeros(4, 4, 4, 3, 3, dtype=torch.float64)
    for state in itertools.product(range(4), repeat=3):
        p = joint[tuple(slice(None) if k == 3 else slice(k, k + 1) for k in state)]
        for i in range(3):
            if state[i] == 3:
                table[(*state, i)] = p.sum([j for j in range(3) if j != i])

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, features, level):
            z = features.unflatten(1, (3, 4)).argmax(2)
            return table[z[:, 0], z[:, 1], z[:, 2]].log().clamp(min=-1e3) + self.zero

    process = MaskedDiffusion(PowerAlpha(1.0), 3)
    of_table = Model(Table(), process, SymbolLogits(3), Posterior(), Categorical(), (3,))
    n = 20_000
    x = torch.tensor([[0, 2, 1]]).expand(n, 3)
    known = torch.tensor([False, True, False])
    drawn = complete(of_table, x, known, TimeGrid.uniform(64), seed=1)
    assert drawn[:, 1].eq(2).all()
    found = torch.bincount(3 * drawn[:, 0] + drawn[:, 2], minlength=9).double() / n
    want = joint[:, 2] / joint[:, 2].sum()
    # two symbols are unmasked in one step of 64 now and then
    assert (found - want.flatten()).abs().max() < 4 * math.sqrt(0.25 / n) + 0.01


def test_gaussian_completion_nears_the_conditional_law():
    """x_2 = ρ x_1 + ..: the more rounds, the nearer E[x_2|x_1] = ρ x_1; what is known stays."""
    rho = 0.9
    cov = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    class Best(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, z, gamma):
            alpha, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
            total = alpha[:, None, None] * cov + noise[:, None, None] * torch.eye(2)
            right = torch.linalg.solve(total, z[..., None])[..., 0]
            return self.one * alpha[:, None].sqrt() * right @ cov

    decoder = GaussianDensity(Affine(), 0.02).requires_grad_(False)
    best = Model(
        Best(),
        GaussianDiffusion(Linear(LOW, 6.0), Affine()),
        XPrediction(),
        Posterior(),
        decoder,
        (2,),
    )
    n = 2000
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(n, 2)
    known = torch.tensor([True, False])
    means = []
    for rounds in (1, 8):
        drawn = complete(best, x, known, TimeGrid.uniform(48), seed=2, rounds=rounds)
        assert drawn[:, 0].eq(2.0).all()
        means.append(drawn[:, 1].mean().item())
    spread = math.sqrt(1 - rho**2)
    assert abs(means[1] - 2 * rho) < abs(means[0] - 2 * rho) + 0.02
    assert abs(means[1] - 2 * rho) < 0.1
    assert abs(drawn[:, 1].std().item() - spread) < 0.1


# From the command line


def call(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A finished run of P(x|class); do not change it."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    return train("digits", path, condition=["class"], **TINY).path


def test_a_conditional_run(conditional, tmp_path, capsys):
    run = load_run(conditional)
    (label,) = run.config.schema.condition
    assert label.classes == tuple("0123456789")
    batch, _ = run.batch()
    x, labels = batch.x, own_data.load(run.config).labels["test"]
    assert batch.condition.equal(encode(labels, run.config.schema))
    assert len(x) == len(labels)
    call(["evaluate", str(conditional), "--calls", "1"])
    assert "log P(x|class)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"take the examples from run\.batch"):
        evaluate(run.model, x)
    with pytest.raises(
        ValueError, match=r"conditions of 11 numbers, \(N, 11\), .* got \(\d+, 3\)"
    ):
        evaluate(run.model, Batch(x, torch.zeros(len(x), 3)), calls=4)
    assert evaluate(run.model.unconditional(), x[:10], calls=4).given == ""
    some = evaluate(run.model, batch[5:15], calls=4)
    assert some.given == "class" and some.examples == 10
    names = [tmp_path / f"{name}.npz" for name in ("three", "four", "mixed", "guided")]
    sample = ["sample", str(conditional), "--n", "4", "--steps", "2", "--grid", "uniform"]
    call([*sample, "--condition", "3", "--out", str(names[0])])
    call([*sample, "--condition", "class=4", "--out", str(names[1])])
    call([*sample, "--out", str(names[2])])
    capsys.readouterr()
    call([*sample, "--condition", "3", "--guidance", "3", "--out", str(names[3])])
    assert "not draws from the model that evaluate measures" in capsys.readouterr().err
    assert all(arrays_in(name)["x"].shape == (4, 1, 8, 8) for name in names)


def test_a_conditional_run_is_continued_on_its_labels(conditional, tmp_path):
    """Labels that were changed since are found out, and unchanged ones are not."""
    np.savez(tmp_path / "x.npz", x=np.arange(120).reshape(30, 4) % 5, y=np.arange(30) % 3)
    train(str(tmp_path / "x.npz"), tmp_path / "run", condition=["class"], **TINY | {"steps": 2})
    assert resume(tmp_path / "run", steps=3).config.train.steps == 3
    np.savez(tmp_path / "x.npz", x=np.arange(120).reshape(30, 4) % 5, y=np.arange(30)[::-1] % 3)
    with pytest.raises(ValueError, match=r"changed since the run was trained"):
        resume(tmp_path / "run", steps=4)


def test_networks_learn_what_they_are_given(tmp_path):
    """x is its class: P(x|class) soon costs less than P(x), and samples are of the class asked."""
    y = np.arange(400) % 2
    np.savez(tmp_path / "x.npz", x=np.repeat(3 * y[:, None], 4, 1), y=y)
    options = {"steps": 120, "lr": 1e-2, "warmup": 10, "batch": 64, "width": 32, "depth": 1}
    run = train(str(tmp_path / "x.npz"), tmp_path / "run", condition=["class"], **options)
    batch, _ = run.batch()
    free = evaluate(run.model.unconditional(), batch.x)
    assert evaluate(run.model, batch).nats < free.nats - 0.4
    for name, value in (("0", 0), ("1", 3)):
        labels = parse([name], run.config.schema).expand(50, 1)
        drawn = ancestral(run.model, 50, TimeGrid.uniform(8), condition=run.conditions(50, labels))
        assert drawn.eq(value).double().mean() > 0.9


def test_an_image_is_completed(conditional, tmp_path, capsys):
    x = load_run(conditional).examples()[0, 0]
    Image.fromarray(np.rint(x.numpy() * (255 / 16)).astype(np.uint8)).save(tmp_path / "x.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "out.npz"
    command = ["sample", str(conditional), "--n", "3", "--steps", "3", "--grid", "uniform"]
    command += ["--condition", "3", "--out", str(out), "--inpaint", str(tmp_path / "x.png")]
    call([*command, "--mask", str(tmp_path / "mask.png"), "--rounds", "2"])
    drawn = arrays_in(out)["x"]
    assert (drawn[:, 0, :, :4] == x[:, :4].numpy()).all()
    assert (drawn[:, 0, :, 4:] != x[:, 4:].numpy()).any()
    Image.fromarray(mask[:5]).save(tmp_path / "mask.png")
    with pytest.raises(SystemExit):
        main([*command, "--mask", str(tmp_path / "mask.png")])
    assert "mask.png has the shape (1, 5, 8) where (1, 8, 8)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "RUN", "--condition", "3"], "the run is not conditional"),
        (["sample", "RUN", "--guidance", "2"], "guidance is for conditional runs"),
        (["sample", "RUN", "--rounds", "2"], "--inpaint, --mask and --rounds go together"),
        (["sample", "RUN", "--inpaint", "x.png"], "--inpaint, --mask and --rounds go together"),
        (["sample", "GIVEN", "--condition", "12"], "'12' is out of range: class is one of 0, 1"),
    ],
)
def test_sampling_refused(trained, conditional, tmp_path, capsys, command, message):
    of = {"RUN": str(trained), "GIVEN": str(conditional)}
    with pytest.raises(SystemExit) as stop:
        main([of.get(word, word) for word in command] + ["--out", str(tmp_path / "x.npz")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_columns_of_a_table_are_conditions(tmp_path):
    """They leave the examples, in the other rows' order; words are classes, numbers numbers."""
    pytest.importorskip("polars")
    with seeded(3):
        a, b = torch.randn(40).tolist(), torch.randn(40).tolist()
    colour = ["red", "blue", "", "red"] * 10
    lines = [f"{x:.9f},{c},{y:.9f}" for x, c, y in zip(a, colour, b, strict=True)]
    source = tmp_path / "x.csv"
    source.write_text("\n".join(["a,colour,b", *lines]))
    run = train(str(source), tmp_path / "run", condition=["colour", "b"], **TINY)
    of_colour, of_b = run.config.schema.condition
    assert of_colour.classes == ("blue", "red") and not of_b.classes
    assert [column.name for column in run.config.schema.columns] == ["a"]
    notes = data.load(str(source), condition=["colour", "b"]).notes
    assert not any("left out" in note for note in notes)  # the labels are used, not left out
    batch, _ = run.batch(str(source))
    assert batch.x[:, 0].tolist() == pytest.approx(a, abs=1e-8)
    place = {"blue": 0.0, "red": 1.0, "": math.nan}  # an empty cell is no class
    want = torch.tensor([[place[c], y] for c, y in zip(colour, b, strict=True)])
    torch.testing.assert_close(batch.condition, encode(want.double(), run.config.schema))
    assert math.isfinite(evaluate(run.model, run.batch()[0], calls=4).nats)
    labels = parse(["colour=blue", "b=0.5"], run.config.schema).expand(3, 2)
    condition = run.conditions(3, labels)
    drawn = ancestral(run.model, 3, TimeGrid.uniform(2), condition=condition)
    assert drawn.shape == (3, 1)
    assert resume(run.path, steps=5).config.schema == run.config.schema
    with pytest.raises(ValueError, match=r"x\.csv has no column 'c'; it has 'a', 'colour', 'b'"):
        train(str(source), tmp_path / "other", condition=["c"], **TINY)
