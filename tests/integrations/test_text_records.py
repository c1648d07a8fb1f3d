"""Texts and prompts by the names of fields and columns, from files and in memory."""

import json
import math

import datasets
import numpy as np
import pytest
from integrations.test_huggingface import write
from support.commands import nelbo_fails, run_ok

import nelbo
from nelbo.integrations import huggingface
from nelbo.integrations.prompts import read_prompts
from nelbo.integrations.text_records import TextForm, of_fasta, of_json
from nelbo.integrations.token_rows import SCORED

ROWS = {"q": ["ab", "d"], "a": ["cA", "abc"], "text": ["abcd", "d"], "n": [1, 2]}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def found(home):
    return huggingface.load(home)


def scored(texts):
    return (texts.batch.condition == SCORED).sum(1).tolist()


def test_json_lines_with_named_fields(tmp_path, found):
    """Fields by name, with and without a prompt; the usual names by default."""
    path = tmp_path / "a.jsonl"
    rows = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    pairs = found.texts(path, prompt_field="q", answer_field="a")
    assert scored(pairs) == [2, 3] and pairs.characters == pairs.size == 5
    assert pairs.batch.condition[0].tolist() == [1, 4, 5, -1, -1, 2]
    assert scored(found.texts(path, answer_field="a")) == [2, 3]
    assert scored(found.texts(path)) == [4, 1]
    with pytest.raises(ValueError, match="line 1 has no text 'b'; its texts are q, a, text"):
        found.texts(path, answer_field="b")
    with pytest.raises(ValueError, match="line 1 has no text 'n'; its texts are q, a"):  # a number
        found.texts(path, answer_field="n")
    path.write_text(json.dumps({"prompt": "a", "answer": "b", "text": "c"}))
    with pytest.raises(ValueError, match="has text and answer; choose one with --answer-field"):
        found.texts(path)
    path.write_text(json.dumps({"a": "b"}))
    with pytest.raises(
        ValueError, match="must have texts prompt and answer, or text; its texts are a;"
    ):
        found.texts(path)
    path.write_text(json.dumps(["a"]))
    with pytest.raises(ValueError, match="line 1 must be an object of named texts"):
        found.texts(path)
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(ValueError, match=r"a\.txt has none: leave them out"):
        found.texts(tmp_path / "a.txt", answer_field="a")


def test_a_column_of_a_data_set(tmp_path, found):
    """Open, saved in a folder, or by name with hub:; a split is named where there are several."""
    rows = datasets.Dataset.from_dict(ROWS)
    rows.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    for source in (rows, str(tmp_path / "one"), f"hub:{tmp_path / 'one'}"):
        texts = found.texts(source, prompt_field="q", answer_field="a")
        assert scored(texts) == [2, 3] and "column a is scored; q shows" in texts.notes[0]
        assert scored(found.texts(source)) == [4, 1]
    assert scored(found.texts(both, split="test")) == [1]
    with pytest.raises(ValueError, match="has the splits train, test; got none; name one"):
        found.texts(both)
    with pytest.raises(
        ValueError, match="among its columns of texts, has no text 'n'; its texts are q, a, t"
    ):
        found.texts(rows, answer_field="n")
    empty = datasets.Dataset.from_dict({"text": ["a", ""]})
    with pytest.raises(ValueError, match="row 1 of the data set has an empty text"):
        found.texts(empty)


def test_lists_and_ids_in_memory(found):
    """A text or a mapping each; ids are tokens, and have no characters."""
    assert scored(found.texts(["ab", "abc"])) == [2, 3]
    assert scored(found.texts([{"prompt": "ab", "answer": "c"}])) == [1]
    ids = found.texts(np.array([[4, 5, 6]]))
    assert scored(ids) == [3] and ids.characters is None
    bound = nelbo.evaluate(found, ["ab", "abc"], calls=8)
    assert math.isclose(bound.rates["bits_per_byte"] * 5, bound.nats * 2 / math.log(2))
    other = nelbo.evaluate(found, [[4, 5, 6, 4]], calls=8)  # of other tokens than the texts
    assert list(other.rates) == ["nats_per_token", "bits_per_token"]
    assert math.isclose(other.rates["nats_per_token"] * 4, other.nats)


def test_on_the_command_line(tmp_path, home, capsys):
    """`--prompt-field`, `--answer-field` and `--split`."""
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(ROWS) for name in ("train", "test")}
    ).save_to_disk(tmp_path / "both")
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "both", "--calls", 8]
    run_ok(*command, "--answer-field", "a", "--prompt-field", "q", "--split", "test", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["split"].startswith("test of hub:") and "5 tokens of 2 texts" in err
    assert "has the splits train, test" in nelbo_fails(capsys, *command)
    line = nelbo_fails(capsys, "evaluate", "openai:x", "--data", "y", "--answer-field", "a")
    assert "does not exist" in line or "--answer-field" in line


def test_what_has_no_fields_or_lines(tmp_path, found):
    """They are refused, with the data named."""
    with pytest.raises(ValueError, match="an array of ids has none"):
        TextForm(answer_field="a").check("an array of ids")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab"}))
    (tmp_path / "a.fasta").write_text(">one\nab\n")
    np.save(tmp_path / "a.npy", [[4, 5]])
    rows = datasets.Dataset.from_dict({"text": ["ab"]})
    files = [tmp_path / f"a.{kind}" for kind in ("jsonl", "fasta", "npy")]
    for source in (*files, rows, ["ab"], [[4, 5]]):
        assert scored(found.texts(source)) == [2]
        with pytest.raises(ValueError, match="has examples of its own: leave it out"):
            found.texts(source, lines=True)


def test_lines_end_with_a_line_feed_alone(tmp_path, found):
    """JSON, prompts and texts may have the other characters that end a line for Python."""
    for character in "\u2028\x85\x0b\x1c":
        text = f"a{character}b"
        row = {"prompt": "a", "answer": text}
        line = json.dumps(row, ensure_ascii=False)
        places = [f"{tmp_path}, line {i}" for i in (1, 2)]
        assert list(of_json(tmp_path, f"{line}\r\n{line}")) == [(p, row) for p in places]
        [(_, found_text)] = of_fasta(tmp_path, f">one {character} more\r\n{text}\r\nc\r\n")
        assert found_text == f"{text}c"
        (tmp_path / "prompts.txt").write_text(f"{text}\n\nb\n")
        assert read_prompts(tmp_path / "prompts.txt") == [text, "", "b"]
    (tmp_path / "a.txt").write_bytes(b"ab\r\n\r\nc")
    lines = found.texts(tmp_path / "a.txt", lines=True)
    assert scored(lines) == [2, 1] and lines.characters == 3


def test_a_byte_order_mark_is_no_text(tmp_path, found):
    for name, text in (
        ("a.txt", "ab"),
        ("a.jsonl", json.dumps({"text": "ab"})),
        ("a.fasta", ">one\nab"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        texts = found.texts(tmp_path / name)
        assert scored(texts) == [2] and texts.size == 2


def test_records_that_are_no_text(tmp_path, home, capsys):
    """One sentence each on the command line."""
    for name, text, words in (
        ("half.jsonl", r'{"text": "a\ud800"}', r"line 1 has '\ud800', half of a character"),
        ("half.jsonl", r'{"prompt": "\ud800", "answer": "a"}', "half of a character"),
        ("deep.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is not JSON: "),
        ("long.jsonl", "9" * 5000, "line 1 is not JSON: Exceeds"),
        ("a.fasta", ">one\nab\n>two\n>three\nc\n", "record 1 ('two') has no sequence"),
        ("a.fasta", ">one\nab\n>\n", "record 1 ('') has no sequence"),
    ):
        (tmp_path / name).write_text(text)
        line = nelbo_fails(capsys, "evaluate", f"hf:{home}", "--data", tmp_path / name)
        assert words in line, line
    with pytest.raises(ValueError, match=r"example 1 has .*half of a character"):
        huggingface.load(home).texts(["ab", "a\udc00"])
