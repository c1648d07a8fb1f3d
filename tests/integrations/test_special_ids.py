"""What ids mean in arrays of them: shown, padding, never predicted, scored."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from support.commands import nelbo_fails, run_ok
from support.language_models import write

import nelbo
from nelbo import integrations
from nelbo.integrations import huggingface

PAD, CLS, SEP, MASK = range(4)
IDS = np.array([[CLS, 4, 5, 6, SEP, PAD], [CLS, 7, 8, SEP, PAD, PAD]])


@pytest.fixture
def home(tmp_path):
    return write(tmp_path / "m")


def measured(capsys, source, data):
    run_ok("evaluate", source, "--data", data, "--json", "--calls", 8)
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_by_default_they_are_those_of_the_tokenizer(tmp_path, capsys, home):
    """The same number as of the texts of these tokens, by command line and in Python."""
    np.save(tmp_path / "ids.npy", IDS)
    (tmp_path / "a.txt").write_text("abc\ndA")
    found, err = measured(capsys, f"hf:{home}", tmp_path / "ids.npy")
    assert "5 tokens of 2 texts are scored; 4 show" in err
    assert "in these rows ids 0, 1, 2 show wherever they are (by the tokenizer" in err
    assert "id 0 at either end of a row is padding, which the model never gets" in err
    assert (
        "ids 0, 1, 2 can never be predicted (by the tokenizer; never= declares others); nor" in err
    )
    loaded = huggingface.load(home)
    texts = nelbo.evaluate(loaded, str(tmp_path / "a.txt"), lines=True, calls=8)
    assert texts.nats == found["nats"]
    assert nelbo.evaluate(loaded, IDS, calls=8).nats == found["nats"]
    assert (
        nelbo.evaluate(loaded, [[CLS, 4, 5, 6, SEP], [CLS, 7, 8, SEP]], calls=8).nats
        == (found["nats"])
    )


def test_other_meanings_are_declared(tmp_path, capsys, home):
    """SEP as a token that is predicted, as LLaDA predicts its end of text; by hand."""
    np.save(tmp_path / "ids.npy", IDS)
    source = f"hf:{home},shown=1,never=0:1:11,pad=0"
    found, err = measured(capsys, source, tmp_path / "ids.npy")
    assert "7 tokens of 2 texts are scored; 2 show" in err
    assert "note: ids 0, 1, 11 can never be predicted\n" in err and "by the tokenizer" not in err
    module = huggingface.load(home).model.network.module
    model = integrations.wrap_tokens(module, MASK, never={0, 1, 11}, length=10)
    rows = [row[row != PAD].tolist() for row in IDS]
    shown = torch.zeros(2, 5, dtype=torch.bool)
    shown[:, 0] = True
    assert nelbo.evaluate(model, model.batch(rows, shown), calls=8).nats == found["nats"]
    in_python = huggingface.load(home, shown=[1], never=[0, 1, 11], pad_id=0)
    assert nelbo.evaluate(in_python, IDS, calls=8).nats == found["nats"]
    none = integrations.load(f"hf:{home},shown=none,never=none,pad=none")
    assert none.model.never.tolist() == [MASK, 11]  # 11 is no id of the tokenizer
    line = nelbo_fails(capsys, "evaluate", f"hf:{home},shown=1", "--data", tmp_path / "ids.npy")
    assert "text 0 has id 2 at 4, never predicted; let it show, or leave it out" in line


def test_a_folder_without_a_tokenizer_takes_ids_that_are_declared(tmp_path, capsys, home):
    """With the same number as with a tokenizer; texts, and less than all, are refused."""
    np.save(tmp_path / "ids.npy", IDS)
    (tmp_path / "a.txt").write_text("abc")
    source = f"hf:{home},mask=3,shown=0-2,never=0-2:11,pad=0"
    with_it, _ = measured(capsys, source, tmp_path / "ids.npy")
    for file in home.glob("tokenizer*"):
        file.unlink()
    found, err = measured(capsys, source, tmp_path / "ids.npy")
    assert found["nats"] == with_it["nats"] and "by the tokenizer" not in err
    line = nelbo_fails(capsys, "evaluate", source, "--data", tmp_path / "a.txt")
    assert "has no tokenizer, so it takes no text, 'abc': give ids, in a .npy file" in line
    line = nelbo_fails(capsys, "evaluate", f"hf:{home},mask=3", "--data", tmp_path / "ids.npy")
    assert "or give ids, and say what they mean: hf:FOLDER,mask=3,shown=0:1," in line
    line = nelbo_fails(capsys, "sample", source, "--n", 1, "--length", 4)
    assert "has no tokenizer" in line


def test_padding_that_is_the_end_of_text_too_is_not_guessed(tmp_path, capsys, home):
    """Where it stands at an end of a row: the number of the two readings differs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    tokenizer.pad_token = tokenizer.sep_token
    tokenizer.save_pretrained(home)
    rows = np.array([[CLS, 4, 5, SEP], [CLS, 4, 5, 6]])
    np.save(tmp_path / "ids.npy", rows)
    line = nelbo_fails(capsys, "evaluate", f"hf:{home}", "--data", tmp_path / "ids.npy")
    assert "text 0 has id 2 at an end, which to the tokenizer is padding and sep" in line
    assert "pad=2 for padding" in line and "pad=none for a token" in line
    found = {
        pad: measured(capsys, f"hf:{home},pad={pad}", tmp_path / "ids.npy")[0]["nats"]
        for pad in (2, "none")
    }
    assert found[2] != found["none"] and all(map(math.isfinite, found.values()))
    assert nelbo.evaluate(huggingface.load(home), rows[1:], calls=8).nats > 0  # unambiguous


def test_padding_below_zero(tmp_path, capsys, home):
    """-2, as samples have after the end of a text, is padding where it is declared."""
    np.savez(tmp_path / "x.npz", x=[[CLS, 4, 5, 6, SEP], [CLS, 4, SEP, -2, -2]])
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "x.npz"]
    assert "id -2 at 3, which is none; below 0 there is only" in nelbo_fails(capsys, *command)
    _, err = measured(capsys, f"hf:{home},pad=-2", tmp_path / "x.npz")
    assert "4 tokens of 2 texts are scored" in err
    np.savez(tmp_path / "two.npz", x=[[4]], y=[[4]])
    line = nelbo_fails(capsys, "evaluate", f"hf:{home}", "--data", tmp_path / "two.npz")
    assert "must have one array, the ids; it has x, y" in line
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    line = nelbo_fails(capsys, "evaluate", f"hf:{home}", "--data", tmp_path / "bad.npy")
    assert "bad.npy" in line
