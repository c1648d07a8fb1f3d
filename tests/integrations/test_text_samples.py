"""Samples of other people's models of tokens, on the command line and in Python."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from support.commands import nelbo_fails, run_ok
from support.language_models import LETTERS, SPECIAL, write, write_with_code

import nelbo
from nelbo.diffusion.times import grid_of
from nelbo.diffusion.unmasking import UnmaskingOrder
from nelbo.integrations import huggingface, text_folder, wrap_tokens
from nelbo.report.images import RULE
from nelbo.sampling.samplers import ancestral
from nelbo.sampling.unmasking import in_order

ORDERS = ["left-to-right", "greedy", "margin", "entropy"]
CLS, SEP = 1, 2


def ids(text):
    return [len(SPECIAL) + LETTERS.index(letter) for letter in text]


def shown(prompt, length):
    """The condition of a text after a prompt, written by hand."""
    return torch.tensor([[CLS, *ids(prompt), *[-1] * length, SEP]])


def texts_of(x):
    """The texts of ids between the special tokens."""
    return ["".join(LETTERS[i - len(SPECIAL)] for i in row[1:-1]) for row in x.tolist()]


def model_for(home, condition):
    model = huggingface.load(home).model
    model.batch([[4] * condition.shape[1]])  # takes the length of the texts
    return model


def samples_in(content):
    return content.split(f"\n{RULE}\n")[:-1]


@pytest.mark.parametrize("sampler", ORDERS)
def test_an_order_draws_what_evaluate_measures(tmp_path, capsys, sampler):
    """The texts are those of `in_order` with the prompt and the special tokens as what shows."""
    home, out = write(tmp_path / "m"), tmp_path / "x.txt"
    command = ["sample", f"hf:{home}", "--n", 4, "--condition", "ab", "--length", 5]
    command += ["--sampler", sampler, "--tokens-per-step", 2]
    run_ok(*command, "--seed", 3, "--out", out)
    err = capsys.readouterr().err
    assert f"5 tokens after what shows (--length, length=), drawn {sampler}, 2 at a time" in err
    condition = shown("ab", 5).expand(4, -1)
    order = UnmaskingOrder(sampler, 2)
    want = in_order(model_for(home, condition), 4, order, 3, condition=condition)
    assert samples_in(out.read_text()) == texts_of(want)
    run_ok(*command)
    printed = samples_in(capsys.readouterr().out)
    assert len(printed) == 4 and all(text.startswith("ab") for text in printed)
    assert printed != texts_of(want)  # of another seed


@pytest.mark.parametrize("steps", [None, 3])
def test_steps_draw_the_model_of_so_many_steps(tmp_path, steps):
    """Without an order a step shows equal numbers of tokens, as `evaluate --steps` measures."""
    home, out = write(tmp_path / "m"), tmp_path / "x.txt"
    options = [] if steps is None else ["--steps", steps]
    run_ok("sample", f"hf:{home}", "--n", 3, "--out", out, *options)
    condition = shown("", 8).expand(3, -1)  # all of the ten places
    times = huggingface.load(home, steps=steps or 32).times
    want = ancestral(model_for(home, condition), 3, times, condition=condition)
    assert samples_in(out.read_text()) == texts_of(want)
    assert nelbo.sample(f"hf:{home}", 3, steps) == texts_of(want)


def test_prompts_of_several_lengths(tmp_path):
    """Each sample follows its own prompt; ids after the end of a text are -2."""
    home, out = write(tmp_path / "m"), tmp_path / "x.npz"
    command = ["sample", f"hf:{home}", "--n", 2, "--length", 3, "--sampler", "greedy"]
    run_ok(*command, "--condition", "abc", "--condition", "d", "--out", out)
    x = np.load(out)["x"]
    assert x[0, :4].tolist() == [CLS, *ids("abc")] and x[0, 7] == SEP
    assert x[1, :2].tolist() == [CLS, *ids("d")] and x[1, 5:].tolist() == [SEP, -2, -2]
    options = {"length": 3, "sampler": "greedy", "condition": ["abc", "d"]}
    texts = nelbo.sample(f"hf:{home}", 2, **options)
    assert texts == [*texts_of(x[:1]), *texts_of(x[1:, :6])]
    assert [len(text) for text in texts] == [6, 4]


def test_a_prompt_that_its_tokens_do_not_give_back_is_refused(tmp_path, capsys):
    """As a text that is measured: the samples would follow another prompt."""
    home, low = write(tmp_path / "m"), write(tmp_path / "low", lower=True)
    line = nelbo_fails(capsys, "sample", f"hf:{low}", "--n", 1, "--condition", "abA")
    assert "the tokenizer does not give the text back, it lowers case: 'A' becomes 'a'" in line
    with pytest.raises(ValueError, match="back, 'xy' becomes 'aa'"):
        nelbo.sample(f"hf:{home}", 2, condition=["ab", "xy"], length=2)


def test_prompts_of_sequences_come_back_with_spaces_between_letters(tmp_path):
    """As the tokenizers of ESM write them."""
    home = write(tmp_path / "m", spaced=True)
    found = huggingface.load(home)
    assert found.to_draw(["ab"], 2).condition.tolist() == [[CLS, *ids("ab"), -1, -1, SEP]]
    with pytest.raises(ValueError, match="back, 'x' becomes ' a'"):
        found.to_draw(["ax"], 2)


def test_a_window_without_end_gives_samples_of_128_tokens(tmp_path):
    found = huggingface.load(write(tmp_path / "m"))
    found.model.length = None
    assert (found.to_draw(["ab"]).condition == -1).sum() == 128


def test_code_of_a_folder_runs_if_it_is_trusted(tmp_path, capsys):
    """A uniform-state model is sampled in steps, and has no order of unmasking."""
    home = write_with_code(tmp_path / "m", "udlm")
    command = ["sample", f"hf:{home}", "--n", 2]
    assert "would run code of its own" in nelbo_fails(capsys, *command)
    run_ok(*command, "--trust-remote-code", "--steps", 2, "--precision", "float64")
    out, err = capsys.readouterr()
    assert len(samples_in(out)) == 2 and "running code of" in err and "are float64" in err
    options = {"trust_remote_code": True, "precision": "float64"}
    assert nelbo.sample(f"hf:{home}", 2, 2, **options) == samples_in(out)
    line = nelbo_fails(capsys, *command, "--trust-remote-code", "--sampler", "greedy")
    assert "the sampler greedy needs a masked model" in line


def test_block_diffusion_takes_equal_steps_in_each_block(tmp_path, capsys):
    home = write_with_code(tmp_path / "m", "bd3lm")
    command = ["sample", f"hf:{home}", "--n", 2, "--trust-remote-code"]
    run_ok(*command)
    assert "drawn in 33 steps" in capsys.readouterr().err  # 10 places are 3 blocks
    run_ok(*command, "--sampler", "entropy")
    line = nelbo_fails(capsys, *command, "--steps", 4)
    assert "steps must be a multiple of 3; got 4" in line
    model = huggingface.load(home, trust_remote_code=True, length=8).model
    model.batch([[4] * 8])
    half = math.sqrt(0.5)  # α_τ = 1 - τ² is a half there
    want = torch.tensor([half / 2, 0.5, (1 + half) / 2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(model.even_times(4), want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", 0], "length must be at least 1; got 0"),
        (
            ["--length", 9],
            "beside 2 special ones and a prompt of 0 there is room for 8, and 9 must",
        ),
        (["--condition", "abcdabcd"], "a prompt of 8 there is room for 0, and 1 must be drawn"),
        (["--condition", "a", "--condition", "b"], "one prompt, or one for each of 4 samples"),
        (["--steps", 0], "steps must be at least 1; got 0"),
        (["--steps", 4, "--sampler", "greedy"], "give tokens_per_step in place of steps"),
        (["--tokens-per-step", 2], "tokens_per_step belongs to a sampler"),
        (["--sampler", "flow"], "a deterministic path needs a Gaussian process"),
        (["--guidance", 2], "guidance needs a condition that means none"),
        (["--out", "x.png"], "a file --out that ends in .txt or .npz; got 'x.png'"),
        (["--grid", "best"], "not for another library's model; leave them out"),
        (["--device-map", "auto", "--device", "cpu"], "leave --device cpu out"),
        (["--device-map", "auto"], "device_map needs accelerate: pip install accelerate"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_folder, "find_spec", lambda name: None)
    home = write(tmp_path / "m")
    assert words in nelbo_fails(capsys, "sample", f"hf:{home}", "--n", 4, *options)


def test_refusals_in_python(tmp_path):
    home = write(tmp_path / "m")
    with pytest.raises(ValueError, match=r"is a prompt, a text, or one for each .*; got 3"):
        nelbo.sample(f"hf:{home}", 2, condition=3)
    with pytest.raises(ValueError, match="number of samples must be at least 1; got 0"):
        nelbo.sample(f"hf:{home}", 0)
    with pytest.raises(ValueError, match="tokens_per_step and length are for a model of tokens"):
        nelbo.sample("diffusers:x", length=3)


# ---- --device-map


def with_accelerate(monkeypatch, change=lambda module: module):
    """Let transformers place weights on the CPU as if accelerate were there."""
    monkeypatch.setattr(text_folder, "find_spec", lambda name: object())
    load = transformers.AutoModelForMaskedLM.from_pretrained

    def placed(*args, device_map, **options):
        module, found = load(*args, **options)
        return change(module), found

    monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", placed)


@pytest.mark.parametrize("place", ["auto", "cpu"])
def test_weights_that_are_placed_stay(tmp_path, monkeypatch, capsys, place):
    """The number and the samples are those without a map."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcd\nab\n")
    measure = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--lines", "--json"]
    draw = ["sample", f"hf:{home}", "--n", 2]

    def printed(*command):
        run_ok(*command)
        return capsys.readouterr()

    nats, texts = json.loads(printed(*measure, "--calls", 8).out)["nats"], printed(*draw).out
    with_accelerate(monkeypatch)
    out, err = printed(*measure, "--calls", 8, "--device-map", place)
    assert json.loads(out)["nats"] == nats
    assert f"float32 on cpu (device_map {place})" in err
    assert printed(*draw, "--device-map", place).out == texts
    with pytest.raises(ValueError, match="device_map places the weights; leave the device cpu"):
        nelbo.sample(f"hf:{home}", 2, device_map=place, device="cpu")


@pytest.mark.parametrize("place", ["nonsense", "meta", "disk", "cuda:99"])
def test_a_map_that_is_none(tmp_path, monkeypatch, place):
    with_accelerate(monkeypatch)
    with pytest.raises(ValueError, match=rf"device_map is auto, .* or a device; got '{place}'"):
        huggingface.load(write(tmp_path / "m"), device_map=place)


def test_weights_that_do_not_fit_on_the_devices(tmp_path, monkeypatch):
    """Where accelerate keeps weights in memory or on disk, the module has none of them."""
    with_accelerate(monkeypatch, lambda module: module.to("meta"))
    with pytest.raises(ValueError, match="does not fit on the devices, and device_map auto"):
        huggingface.load(write(tmp_path / "m"), device_map="auto")


# ---- models in memory


def test_a_loaded_model_is_sampled_as_its_folder(tmp_path):
    home = write(tmp_path / "m")
    found = huggingface.load(home)
    options = {"condition": "ab", "length": 3, "seed": 2}
    assert nelbo.sample(found, 3, 2, **options) == nelbo.sample(f"hf:{home}", 3, 2, **options)
    with pytest.raises(ValueError, match="are for a model that is read from files; got hf:"):
        nelbo.sample(found, 3, precision="bf16")


def test_a_wrapped_module_gives_ids_after_prompts_of_ids(tmp_path):
    """Rows of ids, one prompt for all or one for each; -2 after the end of a text."""
    found = huggingface.load(write(tmp_path / "m"))
    model = wrap_tokens(found.model.network.module, 3, never=[0, 1, 2], length=10)
    x = nelbo.sample(model, 4, 6, condition=[1, 4, 5], length=3, seed=2)
    condition = torch.tensor([[1, 4, 5, -1, -1, -1]]).expand(4, -1)
    want = ancestral(model, 4, grid_of(model, 6), seed=2, condition=condition)
    assert x.dtype == np.int64 and torch.equal(torch.from_numpy(x), want)
    x = nelbo.sample(model, 2, condition=[[1, 4, 5], [1]], length=2, sampler="greedy")
    assert x[:, 0].tolist() == [1, 1] and x[1, 3:].tolist() == [-2, -2]
    assert nelbo.sample(model, 2).shape == (2, 10)
    with pytest.raises(ValueError, match="a prompt, a row of ids, or one for each sample; got 'a"):
        nelbo.sample(model, 2, condition="ab")
