"""Scores of single examples under other libraries' models, and ranks among others."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from support.commands import nelbo_fails, run_ok
from support.language_models import write, write_with_code
from support.tokens import MASK, Tiny

import nelbo
from nelbo._utils.numerics import LOG_2, seeded
from nelbo.integrations import huggingface, wrap_tokens

ROWS = [{"prompt": "ab", "answer": "cAd"}, {"text": "a"}, {"text": "abcdA"}]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def table(path):
    with path.open() as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def test_the_bits_of_each_text(tmp_path, capsys, data):
    """Those of `evaluate --save`, per token, character and byte, with their errors."""
    home, out = write(tmp_path / "m"), tmp_path / "s.csv"
    run_ok("score", f"hf:{home}", "--data", data, "--out", out, "--calls", 16)
    err = capsys.readouterr().err
    assert "9 tokens of 3 texts are scored" in err and "3 examples, without ranks" in err
    found = table(out)
    run_ok("evaluate", f"hf:{home}", "--data", data, "--save", tmp_path / "e.npz", "--calls", 16)
    saved = np.load(tmp_path / "e.npz")
    for row, nats, error, size in zip(
        found, saved["nats"], saved["standard_error"], (3, 1, 5), strict=True
    ):
        assert math.isclose(row["nats"], nats, rel_tol=1e-4) and row["score"] == row["nats"]
        assert row["tokens"] == row["characters"] == row["bytes"] == size
        for unit in ("token", "character", "byte"):
            assert math.isclose(row[f"bits_per_{unit}"], nats / size / LOG_2, rel_tol=1e-4)
            wanted = error / size / LOG_2
            assert math.isclose(row[f"bits_per_{unit}_error"], wanted, rel_tol=1e-4, abs_tol=1e-9)
    assert not {"rank", "percentile", "bits_per_dim"} & found[0].keys()
    scored = nelbo.score(huggingface.load(home), str(data), calls=16)
    assert torch.allclose(scored.nats, torch.from_numpy(saved["nats"]))
    with pytest.raises(ValueError, match="need examples to compare with: give against="):
        _ = scored.rank


class OfPython:
    """A tokenizer that does not say what text its tokens are."""

    def __init__(self, tokenizer):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode


def test_characters_are_those_of_the_scored_text_alone(tmp_path):
    """Not those of prompts; of chunks, where the text of tokens is that of each."""
    found = huggingface.load(write(tmp_path / "m"))
    (tmp_path / "a.txt").write_text("abcd" * 5)
    sizes = nelbo.score(found, str(tmp_path / "a.txt"), calls=8).sizes
    for unit in ("token", "character", "byte"):
        assert sizes[unit].tolist() == [8, 8, 4]
    slow = replace(found.reader, tokenizer=OfPython(found.reader.tokenizer))
    assert not slow.read(tmp_path / "a.txt").sizes
    assert nelbo.score(found, [[1, 4, 5, 2]], calls=8).sizes.keys() == {"token"}
    sizes = nelbo.score(found, ROWS, calls=8).sizes
    assert {k: v.tolist() for k, v in sizes.items()} == {
        "token": [3, 1, 5],
        "character": [3, 1, 5],
        "byte": [3, 1, 5],
    }


def test_ranks_among_examples_of_the_usual_kind(tmp_path, capsys, data):
    home, out, usual = write(tmp_path / "m"), tmp_path / "s.csv", tmp_path / "usual.jsonl"
    usual.write_text("\n".join(json.dumps({"text": "dAbcda"[:k]}) for k in (1, 2, 4, 6)))
    command = ["score", f"hf:{home}", "--data", data, "--out", out, "--calls", 16]
    run_ok(*command, "--against", usual, "--figure", tmp_path / "s.png")
    assert f"of 3 examples score above 95 % of {usual}" in capsys.readouterr().err
    assert (tmp_path / "s.png").stat().st_size > 1000
    found = table(out)
    alone = nelbo.score(f"hf:{home}", str(usual), calls=2000).nats
    for row in found:
        assert row["rank"] == 1 + (alone > row["nats"]).sum()
        assert row["percentile"] == 100 * (alone < row["nats"]).double().mean()
    options = {"against": str(usual), "calls": 16}
    bounds = nelbo.score(f"hf:{home}", ROWS, **options)
    typical = nelbo.score(f"hf:{home}", ROWS, score="typicality", **options)
    assert torch.allclose(typical.score, (bounds.nats - bounds.reference.mean()).abs())
    assert len(typical.reference) == 4
    line = nelbo_fails(capsys, *command, "--score", "typicality")
    assert "give examples of the usual kind with --against" in line
    line = nelbo_fails(capsys, *command, "--score", "complexity")
    assert "lossless code, which ids of tokens do not have" in line


def test_texts_of_one_kind_have_scores_of_one_distribution():
    """As both sets are measured by draws that one pilot allots, with noise that is not small."""
    with seeded(4):
        model = wrap_tokens(Tiny(), MASK, length=7)
        lengths = torch.randint(4, 8, (400,)).tolist()
        texts = [torch.randint(0, MASK, (n,)).tolist() for n in lengths]
    found = nelbo.score(model, texts[:200], against=texts[200:], calls=8)
    assert found.standard_error.mean() > 0.2
    assert ks_2samp(found.score, found.reference).pvalue > 0.01


def test_block_diffusion_is_scored_by_the_command_line(tmp_path, data):
    home, out = write_with_code(tmp_path / "m", "bd3lm"), tmp_path / "s.csv"
    command = ["score", f"hf:{home}", data, "--out", out, "--trust-remote-code"]
    run_ok(*command)
    continuous = table(out)
    run_ok(*command, "--steps", 4)
    assert all(
        row["nats"] > 0 and row["standard_error"] >= 0 for row in [*continuous, *table(out)]
    )
    assert table(out)[2]["nats"] != continuous[2]["nats"]


def test_refusals(tmp_path, capsys, data):
    home, out = write(tmp_path / "m"), tmp_path / "s.csv"
    command = ["score", f"hf:{home}", "--out", out]
    assert "comes without data; give some with --data" in nelbo_fails(capsys, *command)
    line = nelbo_fails(capsys, *command, "--data", data, "--device-map", "auto", "--device", "cpu")
    assert "leave --device cpu out" in line
    line = nelbo_fails(capsys, "score", tmp_path / "run", "--out", out, "--lines")
    assert "are for other libraries' models; leave them out" in line
    line = nelbo_fails(capsys, "score", tmp_path / "run", "--out", out, "--against", "others")
    assert "must be one of the run's splits, train, validation, test; got 'others'" in line
    for verb in (nelbo.impute, nelbo.explain):
        with pytest.raises(ValueError, match=r"is another library's model, and no run; other"):
            verb(f"hf:{home}", str(data))
    with pytest.raises(ValueError, match=r"got TokenModel; other models than nelbo's runs"):
        nelbo.impute(wrap_tokens(Tiny(), MASK, length=6), str(data))
