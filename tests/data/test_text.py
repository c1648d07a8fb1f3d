"""Text: chunks that partition it, an alphabet of the training split, bits per character."""

import json

import numpy as np
import pytest
import torch
from support.commands import nelbo_fails, run_ok

import nelbo
from nelbo import data
from nelbo._utils.numerics import LOG_2
from nelbo.cli import main
from nelbo.data import Schema
from nelbo.data.readers import text
from nelbo.diffusion.parametrization import log_frequencies
from nelbo.evaluation.evaluate import evaluate
from nelbo.models.build import build
from nelbo.training.presets import configure

LENGTH = 16
SAID = "the cat sat on the mat, and the dog sat on the log. " * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "said.txt"
    path.write_text(SAID)
    return path


def words(dataset, split):
    return text.decode(dataset.splits[split].numpy(), dataset.schema.alphabet)


def test_a_text_is_cut_in_order(file):
    length = LENGTH - 1  # 13 chunks, and 13 characters
    found = data.load(file, size=length)
    assert found.schema == Schema(
        "levels", (length,), len(set(SAID)) + 1, alphabet="".join(sorted({*SAID}))
    )
    n = len(SAID) // 10
    ends = {"validation": SAID[-2 * n : -n], "test": SAID[-n:]}
    for split, end in ends.items():
        assert "".join(words(found, split)) == end and n % length == 13
        assert {len(chunk) for chunk in words(found, split)[:-1]} == {length}
    train = words(found, "train")
    assert train == [SAID[i : i + length] for i in range(len(SAID) - 2 * n - length + 1)]


def test_longer_chunks_to_train_on_begin_anywhere_sixteen_to_a_length(tmp_path):
    """Also where the text has a period that the strides have: each phase is learned as often."""
    (tmp_path / "fixed.txt").write_text("".join(map(chr, range(97, 97 + 16))) * 4000)
    found = data.load(tmp_path / "fixed.txt", size=128)  # a stride is 8, the period 16
    first = torch.bincount(found.splits["train"][:, 0].long(), minlength=16).double()
    train = len(found.splits["train"])
    assert train == pytest.approx(0.8 * 64000 / 8, rel=0.01)
    each = train / 16  # binomial, 4.5 errors
    assert ((first - each).abs() < 4.5 * each**0.5).all()
    again = data.load(tmp_path / "fixed.txt", size=128).splits["train"]
    other = data.load(tmp_path / "fixed.txt", size=128, seed=1).splits["train"]
    assert torch.equal(found.splits["train"], again) and not torch.equal(again, other)


def test_characters_and_bytes_come_back():
    for content in ("äöü 文字 \n\t𝛼", "plain"):
        alphabet = "".join(sorted(set(content)))
        codes = text.encode(content, alphabet)
        assert text.decode(codes[None], alphabet) == [content]
        codes = text.encode(content.encode(), "")
        assert text.decode(codes[None], "") == [content]


def test_bytes_are_asked_for_or_follow_from_many_characters(tmp_path, file):
    found = data.load(file, size=LENGTH, levels=256)
    assert (found.schema.levels, found.schema.alphabet) == (256, "")
    assert words(found, "test")[0] == SAID[-(len(SAID) // 10) :][:LENGTH]
    many = tmp_path / "many.txt"
    many.write_text("".join(map(chr, range(0x4E00, 0x4F00))) * 10)
    found = data.load(many, size=LENGTH)
    assert (found.schema.levels, found.schema.alphabet) == (256, "")
    assert any("read as bytes" in note for note in found.notes)


def test_the_files_of_a_folder_are_its_splits(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "train.txt").write_text("ab" * 50)
    (tmp_path / "val" / "1.txt").write_text("a" * 20)
    (tmp_path / "val" / "2.txt").write_text("b" * 20)
    (tmp_path / "notes.txt").write_text("nothing")
    found = data.load(tmp_path, size=10)
    assert words(found, "validation") == ["a" * 10] * 2 + ["b" * 10] * 2
    assert words(found, "test") == ["ab" * 5]  # the last tenth of the training text
    assert len(found.splits["train"]) == 81
    assert any("1 files outside" in note for note in found.notes)


def test_characters_that_training_did_not_see_are_one_symbol(tmp_path, file):
    schema = data.load(file, size=LENGTH).schema
    other = tmp_path / "other.txt"
    other.write_text("\ufeffthe XXX sat on Z" + "rest")
    found = data.load_like(other, schema)
    assert words(found, "all") == ["the \ufffd\ufffd\ufffd sat on \ufffd", "\ufffdest"]
    assert (found.splits["all"] == schema.levels - 1).sum() == 5
    assert (found.splits["all"] == schema.absent).sum() == LENGTH - 4
    assert any("5 characters" in note for note in found.notes)
    assert any("4 of 16 characters; lengths are given" in note for note in found.notes)


def test_a_model_that_says_nothing_pays_the_entropy_of_its_frequencies(file):
    """... and a character it never saw has a probability."""
    found = data.load(file, size=LENGTH)
    config, _ = configure(found.schema, 1, width=32, depth=1)
    assert (config.process, config.network) == ("absorbing", "transformer")
    model = build(config, found.schema)
    x, train = found.splits["test"].clone(), found.splits["train"]
    model.head.fit_statistics(train)
    result = evaluate(model, x, calls=512)
    table = log_frequencies(train, found.schema.levels)
    exact = -table.expand(len(x), -1, -1).gather(-1, x.long()[..., None]).sum().item() / len(x)
    error = result.standard_error.monte_carlo * model.dims * LOG_2
    assert abs(result.nats - exact) < 4 * error < 0.05 * exact
    x[0, 0] = found.schema.levels - 1
    assert evaluate(model, x, calls=64).nats < exact + 20


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "empty"),
        (b" \n", {}, "empty"),
        ("Grüße".encode("latin-1") * 99, {}, "not UTF-8: byte 0xfc at 2"),
        (b"short text", {}, "too few for a chunk of 128"),
        (b"abc" * 999, {"levels": 9}, "3 different characters"),
        (b"a" * 9999, {}, "are the same"),
    ],
)
def test_bad_texts_are_refused_in_a_sentence(tmp_path, content, options, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(path, **options)


def test_the_size_that_is_proposed_fits_every_split(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("some words, and a few more")
    with pytest.raises(ValueError, match=r"try --size \d+$") as error:
        data.load(path)
    data.load(path, size=int(str(error.value).split()[-1]))


def test_what_a_model_fixes_is_not_proposed(file, tmp_path):
    """The symbols of a model are characters, whatever is measured."""
    schema = data.load(file, size=LENGTH).schema
    path = tmp_path / "other.txt"
    path.write_bytes("Grüße".encode("latin-1") * 99)
    with pytest.raises(ValueError, match="save it as UTF-8") as error:
        data.load_like(path, schema)
    assert "--" not in str(error.value)


def test_a_text_is_not_for_a_model_of_vectors(file):
    with pytest.raises(ValueError, match="is text, but the model is not one of text"):
        data.load_like(file, Schema("levels", (LENGTH,), 256))


def test_a_folder_without_training_text_is_refused(tmp_path):
    (tmp_path / "test.txt").write_text("ab" * 50)
    with pytest.raises(ValueError, match="no training text"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "levels", "alphabet"),
    [((4,), 3, "ba"), ((4,), 4, "ab"), ((4,), 255, ""), ((1, 2, 2), 3, "ab"), ((4,), 4, "aab")],
)
def test_an_alphabet_fits_its_levels(shape, levels, alphabet):
    with pytest.raises(ValueError, match="alphabet"):
        Schema("levels", shape, levels, alphabet=alphabet)


def test_the_alphabet_is_saved():
    schema = Schema("levels", (4,), 4, alphabet='\n"ä')
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("levels", [None, 256], ids=["characters", "bytes"])
def test_a_run_measures_a_text_of_any_length(tmp_path, capsys, process, levels):
    """All of the test split counts, in one chunk and a half; texts shorter than a chunk too, and
    they come back from a file to the byte."""
    path, run = tmp_path / "said.txt", tmp_path / "run"
    path.write_text(SAID[:1200])
    small = {"size": 80, "steps": 2, "batch": 4, "width": 32, "depth": 1}
    made = nelbo.train(str(path), run, levels=levels, process=process, **small)
    test = made.examples("test")
    absent = made.config.schema.absent
    assert test.shape == (2, 80) and (test != absent).sum() == 120
    found = nelbo.evaluate(run, calls=16)
    assert found.bits_per_dim == pytest.approx(found.nats * 2 / 120 / LOG_2)
    symbol = "character" if levels is None else "byte"
    assert found.unit == f"bits/{symbol}"
    scored = made.score(calls=8)
    assert scored.sizes[symbol].tolist() == [80, 40] and scored.bits is None
    short = tmp_path / "short.txt"
    short.write_text("the cat; Ä")
    run_ok("evaluate", run, "--data", short, "--calls", 32, "--json")
    of_short, told = capsys.readouterr()
    symbols = 10 if levels is None else 11
    assert f"has {symbols} of 80" in told and "lengths are given, not coded" in told
    of_short = json.loads(of_short)
    assert of_short["bits_per_dim"] == pytest.approx(of_short["nats"] / symbols / LOG_2)
    for file in (path, short):
        coded, back = tmp_path / f"{file.stem}.nlb", tmp_path / f"back-{file.name}"
        run_ok("compress", run, file, "--out", coded, "--steps", 2)
        run_ok("decompress", run, coded, "--out", back)
        assert back.read_bytes() == file.read_bytes()


def test_a_model_of_values_takes_whole_chunks(tmp_path, file, capsys):
    """Levels that noise of Gauss blurs have no code that says that there is none; it is said."""
    small = ("--steps", 1, "--batch", 4, "--width", 32, "--depth", 1, "--size", 15)
    run_ok("train", file, "--out", tmp_path / "run", "--process", "gaussian", *small)
    assert "takes whole chunks" in capsys.readouterr().err
    made = nelbo.load(tmp_path / "run")
    assert len(made.examples("test")) == made.evaluate(calls=2).examples == 13
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(ValueError, match="shorter than a chunk of 15"):
        made.evaluate(tmp_path / "short.txt")


def test_text_from_the_command_line(tmp_path, file, capsys):
    run = str(tmp_path / "run")
    sizes = ["--size", "16", "--steps", "2", "--batch", "4", "--width", "32", "--depth", "1"]
    run_ok("train", str(file), "--out", run, *sizes)
    capsys.readouterr()
    run_ok("evaluate", run, "--calls", "2", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_character"] == found["bits_per_dim"]
    assert found["perplexity"] == 2 ** found["bits_per_dim"]
    rates = nelbo.evaluate(run, calls=2).rates
    assert rates.keys() == {"bits_per_character", "perplexity"} <= found.keys()
    assert rates["perplexity"] == found["perplexity"]
    run_ok("evaluate", run, "--calls", "2")
    assert "bits per character" in capsys.readouterr().out
    run_ok("sample", run, "--n", "3", "--steps", "4", "--grid", "uniform")
    printed = capsys.readouterr().out
    samples = printed.split("\n" + "-" * 72 + "\n")
    assert [len(sample) for sample in samples] == [LENGTH] * 3 + [0]
    out = tmp_path / "samples.txt"
    run_ok("sample", run, "--n", "3", "--steps", "4", "--grid", "uniform", "--out", str(out))
    assert out.read_text() == printed
    with pytest.raises(SystemExit):
        main(["sample", run, "--out", str(tmp_path / "samples.png")])
    assert "ends in .txt or .npz" in capsys.readouterr().err
    some = ("--sampler", "greedy", "--tokens-per-step", "4")
    run_ok("evaluate", run, "--calls", "2", *some)
    assert "greedy, 4 at a time: the exact -log P(x)" in capsys.readouterr().out
    run_ok("sample", run, "--n", "2", *some)
    printed = capsys.readouterr().out
    assert [len(each) for each in printed.split("\n" + "-" * 72 + "\n")] == [LENGTH] * 2 + [0]
    assert nelbo.sample(run, 2, sampler="greedy", tokens_per_step=4) == [
        printed[:LENGTH],
        printed[-74 - LENGTH : -74],
    ]
    for more, why in {
        ("--steps", "4"): "give tokens_per_step in place of steps",
        ("--grid", "uniform"): "greedy has no steps; leave it out",
    }.items():
        assert why in nelbo_fails(capsys, "sample", run, *some, *more)


def test_what_is_no_text_is_not_printed():
    from nelbo.report.images import saver

    for shape, hint in (((1, 4, 4), "png"), ((4,), "npz")):
        with pytest.raises(ValueError, match=hint):
            saver(None, Schema("levels", shape, 3))


def test_codes_of_any_text_are_levels():
    rng = np.random.default_rng(0)
    points = rng.integers(32, 0x2000, 500)
    content = "".join(map(chr, points))
    alphabet = "".join(sorted({chr(p) for p in points[:200]}))
    codes = text.encode(content, alphabet)
    back = text.decode(codes[None], alphabet)[0]
    assert all(
        a == b or (b == text.OTHER and a not in alphabet)
        for a, b in zip(content, back, strict=True)
    )


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        *((f"utf-16-{end}", "UTF-16") for end in ("le", "be")),
        *((f"utf-32-{end}", "UTF-32") for end in ("le", "be")),
        ("utf-16", "UTF-16"),
        ("utf-32", "UTF-32"),
    ],
)
def test_wide_characters_are_no_bytes(tmp_path, encoding, kind):
    source = tmp_path / "wide.txt"
    source.write_bytes((SAID * 9).encode(encoding))
    with pytest.raises(ValueError, match=rf"looks like {kind}.* save it as UTF-8, or .* 256"):
        data.load(source)
    with pytest.raises(ValueError, match=rf"looks like {kind}.* save it as UTF-8$"):
        data.load_like(source, Schema("levels", (4,), 3, alphabet="ab"))
    assert data.load(source, levels=256, size=8).schema.levels == 256


def test_a_text_has_no_zeros(tmp_path):
    source = tmp_path / "zero.txt"
    source.write_text(SAID * 9 + "\0" + SAID)
    with pytest.raises(ValueError, match=r"zero\.txt is not text: byte 0x00 at \d+; save"):
        data.load(source)
