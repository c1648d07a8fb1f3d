"""Text as tokens: byte pairs learned here, a tokenizer of a folder, and runs of them."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from integrations.test_huggingface import write_tokenizer
from support.commands import nelbo_fails, run_ok
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

import nelbo
from nelbo import data
from nelbo.data.readers.text import decode
from nelbo.data.tokenizer import Tokenizer, make, sizes_of
from nelbo.models.build import build
from nelbo.runs import config as run_config
from nelbo.training.presets import configure

WORDS = "the cat sat on the mat, the dog ate the cät — and so on.\n"
TEXT = "".join(f"{WORDS}{i} {WORDS[i % 9 :]}" for i in range(60))
SIZE = ("--size", 12, "--steps", 2, "--batch", 4, "--width", 32, "--depth", 1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def test_tokens_give_every_text_back(file):
    """Splits are read as tokens of the training split; any text comes back, whatever is in it."""
    found = data.load(file, tokenizer="bpe:300", size=12)
    tokenizer = found.schema.tokenizer
    assert found.schema.levels == tokenizer.count == 300 and found.schema.shape == (12,)
    assert found.schema.alphabet is None and found.schema.symbol == "token"
    assert any(f"tokenizer {tokenizer.sha256}" in note for note in found.notes)
    for text in ("", " x", "日本\r\n\t é \U0001f600", "\0 [MASK]", TEXT[:99]):
        assert tokenizer.decode(tokenizer.encode(text, "it").tolist()) == text
    tenth = len(TEXT) // 10
    assert "".join(decode(found.splits["test"].numpy(), tokenizer)) == TEXT[-tenth:]
    assert (found.splits["train"] < 300).all()  # chunks to train on are whole
    assert len(tokenizer.encode(TEXT, "it")) < len(TEXT.encode()) / 2
    assert make("bpe:300", TEXT[: -2 * tenth]) == tokenizer  # the training split's
    lines = data.load(TEXT.splitlines(), tokenizer="bpe:300", size=12)  # in memory
    assert lines.schema.tokenizer.count == 300
    again = data.load_like(file, found.schema)
    ids, every = tokenizer.encode(TEXT, "it"), again.splits["all"].flatten().numpy()
    assert (every[: len(ids)] == ids).all() and (every[len(ids) :] == 300).all()
    last = len(ids) % 12
    assert last > 0 and any(f"last chunk of {file} has {last} of 12 tok" in n for n in again.notes)
    (file.parent / "short.txt").write_text("the cat")
    short = data.load_like(file.parent / "short.txt", found.schema).splits["all"]
    assert len(short) == 1 and decode(short.numpy(), tokenizer) == ["the cat"]
    with pytest.raises(ValueError, match=r"the train split of .* too few for a chunk"):
        data.load(file.parent / "short.txt", tokenizer=tokenizer, size=12)


def test_the_characters_and_bytes_of_tokens(file):
    """Also where tokens divide characters; none where a token's text depends on its neighbours."""
    text = " x 日本\r\n\t é \U0001f600 the mat" + TEXT
    tokenizer = make("bpe:300", TEXT)
    ids = tokenizer.encode(text, "it").tolist()
    sizes = tokenizer.sizes()
    for end in range(len(ids) + 1):  # a part of a character counts in characters once it begins
        part = tokenizer.decode(ids[:end])
        characters, size = sizes[ids[:end]].sum(0).tolist()
        assert characters == len(part)
        assert size == len(part.encode()) or part.endswith("\ufffd")
    schema = data.load(file, tokenizer="bpe:300", size=12).schema
    x = torch.full((2, 12), 300)
    x.flatten()[:20] = torch.tensor(ids[:20])
    found = schema.sizes(x)
    assert found["token"].tolist() == [12, 8]
    assert found["byte"].tolist() == [sizes[some, 1].sum() for some in (ids[:12], ids[12:20])]
    assert data.load(file, size=12).schema.sizes(x[:1] % 30)["character"].tolist() == [12]
    assert data.load("digits").schema.sizes(x) == {}
    for pieces, joined in ((decoders.Fuse(), True), (decoders.Metaspace(), False)):
        library = Library(models.WordLevel({"a": 0, "▁b": 1, "日本": 3}, "a"))
        library.decoder = pieces
        sizes = sizes_of(library)
        assert sizes is None if not joined else sizes.tolist() == [[1, 1], [2, 4], [0, 0], [2, 6]]


def test_a_run_of_tokens(tmp_path, file, capsys):
    """Train, evaluate per token, character and byte, sample, score, compress."""
    run = tmp_path / "run"
    run_ok("train", file, "--out", run, "--tokenizer", "bpe:300", *SIZE)
    assert "bits/token" in capsys.readouterr().err
    kept = nelbo.load(run).config.schema.tokenizer
    assert kept.count == 300
    run_ok("evaluate", run, "--calls", 8, "--json")
    found = json.loads(capsys.readouterr().out)
    (test,) = [nelbo.load(run).examples("test")]
    text, bits = TEXT[-(len(TEXT) // 10) :], found["nats"] / math.log(2) * len(test)
    whole = len(kept.encode(text, "it"))
    assert (test < 300).sum() == whole < test.numel()  # the last chunk is shorter
    assert math.isclose(found["bits_per_token"], bits / whole)
    assert math.isclose(found["bits_per_character"], bits / len(text))
    assert math.isclose(found["bits_per_byte"], bits / len(text.encode()))
    assert found["bits_per_byte"] < found["bits_per_character"] < found["bits_per_token"] < 9
    (tmp_path / "other.txt").write_text(WORDS + "neu: 日本\n")
    other = ("--data", tmp_path / "other.txt")
    run_ok("evaluate", run, "--calls", 8, *other, "--sampler", "greedy")
    out = capsys.readouterr().out
    assert "bits per byte" in out and "greedy, 1 at a time" in out
    assert "bits/token" in out and "bits/dim" not in out
    run_ok("sample", run, "--n", 3, "--steps", 2, "--grid", "uniform")
    assert len(capsys.readouterr().out.split("\n" + "-" * 72 + "\n")) == 4
    assert all(isinstance(s, str) for s in nelbo.load(run).sample(2, sampler="entropy"))
    run_ok("score", run, "--out", tmp_path / "s.csv", "--calls", 8)
    with (tmp_path / "s.csv").open() as stream:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    for unit, size in (("token", whole), ("character", len(text)), ("byte", len(text.encode()))):
        assert sum(row[f"{unit}s"] for row in rows) == size
        for row in rows:
            for name, value in (("", row["nats"]), ("_error", row["standard_error"])):
                wanted = value / row[f"{unit}s"] / math.log(2)
                assert math.isclose(row[f"bits_per_{unit}{name}"], wanted, rel_tol=1e-4)
    assert len(rows) == len(test) and "bits_per_dim" not in rows[0]
    capsys.readouterr()
    run_ok("compress", run, tmp_path / "other.txt", "--out", tmp_path / "o.nlb", "--steps", 2)
    coded = kept.encode((tmp_path / "other.txt").read_text(), "it")
    bits = 8 * (tmp_path / "o.nlb").stat().st_size / len(coded)  # of its own tokens
    size = 8 * (tmp_path / "o.nlb").stat().st_size / (tmp_path / "other.txt").stat().st_size
    said = f"{bits:.3f} bits/token, {size:.3f} bits/byte of the text, in all"
    assert len(coded) % 12 and said in capsys.readouterr().err
    report = nelbo.inspect(tmp_path / "o.nlb")
    assert report.bits_per_dim == bits and report.dimension == "token"
    run_ok("inspect", tmp_path / "o.nlb")
    out = capsys.readouterr().out
    assert f"{bits:.4f} bits/token in all" in out and "bits/dim" not in out
    assert report.blocks[0].bits_per_dim == 8 * report.blocks[0].size / len(coded)
    run_ok("decompress", run, tmp_path / "o.nlb", "--out", tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_bytes() == (tmp_path / "other.txt").read_bytes()


@pytest.mark.slow
def test_the_report_of_tokens(tmp_path, file):
    run = nelbo.train(str(file), tmp_path / "run", tokenizer="bpe:300", size=12, steps=1, width=32)
    assert "bits" in run.report(tmp_path / "page.html").read_text()


def test_the_network_embeds_tokens():
    """No feature per token: the network gets codes, and its output depends on all of them."""
    tokenizer = make("bpe:300", TEXT)
    schema = data.Schema("levels", (6,), 300, tokenizer=tokenizer)
    model = build(configure(schema, 100, width=32, depth=1)[0], schema)
    assert model.process.channels == 1 and model.head.log_prior.shape == (300,)
    torch.nn.init.normal_(model.network.last.weight)
    z = torch.tensor([[1, 2, 300, 4, 5, 300], [1, 9, 300, 4, 5, 300]])
    log_p = model.predict(z, torch.full((2,), 0.5)).symbols(z, 300).log_prob(torch.tensor(7))
    assert (log_p[0, 2] != log_p[1, 2]).all() and log_p[0, 0] == -math.inf
    with pytest.raises(ValueError, match="tokens take the network transformer"):
        build(configure(schema, 100, network="mlp")[0], schema)


def test_a_tokenizer_of_a_folder(tmp_path, file):
    """Its tokenizer.json is read; one that lowers case, or lacks characters, is refused."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(make("bpe:280", TEXT).content)
    assert data.load(file, tokenizer=str(folder), size=12).schema.levels == 280
    lower = tmp_path / "lower"
    write_tokenizer(lower, lower=True)
    (tmp_path / "a.txt").write_text("abcdA \n" * 99)
    with pytest.raises(ValueError, match=r"not give .*a\.txt back, it lowers case: 'A .*bpe:4096"):
        data.load(tmp_path / "a.txt", tokenizer=str(lower), size=4)
    with pytest.raises(ValueError, match=r"does not give the train split of .* back, 'the"):
        data.load(file, tokenizer=str(lower), size=4)


def test_what_is_refused(tmp_path, file, capsys):
    for spec, why in {
        "bpe:256": "more than the 256 bytes",
        "bpe:70000": "at most 65536",
        "bpe:x": "bpe:N learns N tokens",
        "nowhere": "a tokenizer is bpe:N",
    }.items():
        line = nelbo_fails(capsys, "train", file, "--out", tmp_path / "r", "--tokenizer", spec)
        assert why in line and not (tmp_path / "r").exists()
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    line = nelbo_fails(capsys, "train", file, "--out", tmp_path / "r", "--tokenizer", file)
    assert "book.txt is no tokenizer (no tokenizer of the library" in line and "bpe:4096" in line
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is no tokenizer \(no tokenizer of the li"
    ):
        data.load(file, tokenizer=str(tmp_path))
    np.save(tmp_path / "x.npy", np.zeros((9, 3), np.int64))
    with pytest.raises(ValueError, match=r"a tokenizer is for text, and .*x\.npy is not text"):
        data.load(tmp_path / "x.npy", tokenizer="bpe:300")
    with pytest.raises(ValueError, match="leave --levels out"):
        data.load(file, tokenizer="bpe:300", levels=256)
    with pytest.raises(ValueError, match="does not have its hash"):
        Tokenizer("0" * 16, make("bpe:300", TEXT).content)
    assert Library.from_str(make("bpe:300", TEXT).content).get_vocab_size() == 300


def test_a_changed_run_is_refused(tmp_path, file):
    run = nelbo.train(str(file), tmp_path / "run", tokenizer="bpe:300", size=12, steps=1, width=32)
    path = run.path / run_config.CONFIG
    document = json.loads(path.read_text())
    document["data"]["schema"]["tokenizer"]["content"] += " "
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="does not have its hash"):
        nelbo.load(run.path)
