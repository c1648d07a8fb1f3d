"""Folders of transformers with code of their own, what their type says, and options after them."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import nelbo_fails, run_ok
from support.known_models import Counted
from support.language_models import write, write_tokenizer, write_with_code

import nelbo
from nelbo import integrations
from nelbo._utils.numerics import seeded
from nelbo.diffusion.masked import BlockDiffusion, MaskedDiffusion
from nelbo.diffusion.uniform import UniformDiffusion
from nelbo.integrations import huggingface, text_folder
from nelbo.integrations.texts import TextReader
from nelbo.integrations.token_rows import SCORED


@pytest.mark.parametrize(
    ("kind", "shift", "told", "process"),
    [
        ("Dream", 1, False, MaskedDiffusion),
        ("mdlm", 0, True, MaskedDiffusion),
        ("llada", 0, False, MaskedDiffusion),
        ("udlm", 0, True, UniformDiffusion),
        ("DUO", 0, True, UniformDiffusion),
    ],
)
def test_trusted_code(tmp_path, capsys, kind, shift, told, process):
    """Code of a folder runs if it is trusted, after it is named; its kind sets shift, time and
    process."""
    home = write_with_code(tmp_path / "remote", kind)
    found = huggingface.load(home, trust_remote_code=True)
    assert "running code of" in capsys.readouterr().err
    assert found.model.shift == shift and (found.model.network.clock is not None) == told
    assert type(found.model.process) is process
    assert math.isfinite(nelbo.evaluate(found.model, [[4, 5, 6]], calls=8).nats)


def test_options_after_the_folder_say_what_its_type_does_not(tmp_path):
    """They are those of `load`; a folder of the type has the same model."""
    home = write_with_code(tmp_path / "m", "mdlm")
    plain = write(tmp_path / "p")

    def of(source):
        return integrations.load(source, trust_remote_code=True).model

    said = of(f"hf:{home},time=none,shift=1,length=7")
    assert said.network.clock is None and said.shift == 1 and said.length == 7
    assert of(f"hf:{home}").hash() == of(f"hf:{home},time=sigma,shift=0").hash() != said.hash()
    assert type(of(f"hf:{plain},process=uniform").process) is UniformDiffusion
    blocks = of(f"hf:{plain},block=2").process
    assert isinstance(blocks, BlockDiffusion) and blocks.block == 2
    for option, words in (
        ("shift=2", "shift after a path is given as shift=0 or shift=1 .*; got 'shift=2'"),
        ("clip=yes", "got 'clip=yes'"),
        ("never=9-5", "from the smaller to the larger; got '9-5'"),
        ("never=5-99", "ids of the module are 0..11; got .12, "),
        ("shown=99", r"ids of the module are 0..11; got \[99\] in shown"),
        ("length=11", "length must be at most 10, the model's number of positions; got 11"),
    ):
        with pytest.raises(ValueError, match=words):
            of(f"hf:{plain},{option}")


def test_a_mask_that_no_file_names(tmp_path):
    """It is declared; otherwise the folder is refused before its weights are read."""
    home = write(tmp_path / "m", mask=False)
    (weights,) = home.glob("*.safetensors")
    kept = weights.read_bytes()
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no mask token.*give its id: hf:.*m,mask=ID"):
        huggingface.load(home)
    weights.write_bytes(kept)
    found = integrations.load(f"hf:{home},mask=3")
    assert found.model.network.mask_id == 3
    with_mask = huggingface.load(write(tmp_path / "n"))
    assert found.model.hash() == with_mask.model.hash()


OLD = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OldConfig(PretrainedConfig):
    model_type = "mdlm"

class Old(PreTrainedModel):
    config_class = OldConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed, self.out = torch.nn.Embedding(12, 8), torch.nn.Linear(8, 12)
        self.scale = torch.arange(1, 9.0)
        POST
    def forward(self, input_ids, timesteps):
        h = self.embed(input_ids) * self.scale
        return self.out(h + h.mean(1, keepdim=True))
"""


@pytest.mark.parametrize("post", ["", "self.post_init()"])
@pytest.mark.parametrize("precision", [None, "float64"])
def test_code_of_transformers_4(tmp_path, post, precision):
    """As of BD3-LM and MDLM: without `post_init`, or with tensors that are not in the weights."""
    home, kind = tmp_path / "m", "with" if post else "without"
    home.mkdir()
    write_tokenizer(home, mask=False)
    (home / f"old_{kind}.py").write_text(OLD.replace("POST", post))
    with seeded(3):
        weights = {
            "embed.weight": torch.randn(12, 8),
            "out.weight": torch.randn(12, 8),
            "out.bias": torch.randn(12),
        }
    names = {"AutoConfig": f"old_{kind}.OldConfig", "AutoModelForMaskedLM": f"old_{kind}.Old"}
    config = {"model_type": "mdlm", "vocab_size": 12, "model_length": 10, "auto_map": names}
    (home / "config.json").write_text(json.dumps(config))

    def load():
        return huggingface.load(home, trust_remote_code=True, mask_id=3, precision=precision)

    save_file(weights, home / "model.safetensors")
    found = load()
    ids = torch.tensor([[4, 5, 3]])
    h = weights["embed.weight"][ids] * torch.arange(1, 9.0)
    want = (h + h.mean(1, keepdim=True)) @ weights["out.weight"].T + weights["out.bias"]
    got = found.model.network.module(ids, torch.ones(1))
    torch.testing.assert_close(got.float(), want)
    assert got.dtype == (torch.float64 if precision else torch.float32)
    assert found.model.length == 10
    save_file({k: v for k, v in weights.items() if k != "out.bias"}, home / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights of Old, which would be random: out.bias"):
        load()


# ---- block diffusion, by the command line


@pytest.fixture
def blocks(tmp_path):
    return write_with_code(tmp_path / "m", "bd3lm")


def measured(capsys, *command):
    run_ok(*command, "--trust-remote-code", "--json")
    out, err = capsys.readouterr()
    return json.loads(out), err


def enumerated(found, batch, steps):
    """The mean bound of so many steps in each block, by sums over all sets of hidden tokens, from
    logits of the module alone: the k-th step from the first hides each token of its block with
    probability k/T, and shows 1/k of those."""
    module, never, total = found.model.network.module.module, found.model.never, 0.0

    def cost(ids, end, hidden, share):
        z = ids[:end].clone()
        z[hidden] = 3
        sigma = -torch.tensor([1 - share]).clamp(min=1e-4).log()
        with torch.no_grad():
            logits = module(z[None], sigma, sample_mode=True).logits[0].double()
        logits[:, never] = -torch.inf
        return -logits.log_softmax(-1)[hidden, ids[hidden]].sum().item()

    for ids, condition in zip(batch.x, batch.condition, strict=True):
        scored = (condition == SCORED).nonzero().flatten().tolist()
        for end in range(4, len(ids) + 4, 4):
            places = [i for i in scored if end - 4 <= i < end]
            for size, k in itertools.product(range(1, len(places) + 1), range(1, steps + 1)):
                chance = (k / steps) ** size * (1 - k / steps) ** (len(places) - size)
                for hidden in map(list, itertools.combinations(places, size)):
                    total += chance * cost(ids, end, hidden, k / steps) / k
    return total / len(batch)


def test_steps_of_block_diffusion_on_the_command_line(tmp_path, capsys, blocks):
    """T steps are T/n in each of the n blocks of a text, as for any model of tokens."""
    (tmp_path / "a.txt").write_text("abcdab\ndcA")
    command = ["evaluate", f"hf:{blocks}", "--data", tmp_path / "a.txt", "--lines"]
    found, err = measured(capsys, *command, "--steps", 4, "--calls", 4000)
    assert found["steps"] == 4 and "block sampler" in err and "blocks of 4 tokens" in err
    loaded = huggingface.load(blocks, trust_remote_code=True)
    batch = loaded.texts(tmp_path / "a.txt", lines=True).batch
    wanted = enumerated(loaded, batch, 2)
    error = found["standard_error"]["monte_carlo"] * found["nats"] / found["bits_per_dim"]
    assert abs(found["nats"] - wanted) < 4 * error and error < 0.006 * wanted
    again = nelbo.evaluate(loaded, str(tmp_path / "a.txt"), lines=True, steps=4, calls=4000)
    assert again.nats == found["nats"]
    assert abs(wanted - enumerated(loaded, batch, 1)) > 20 * error  # of other steps
    line = nelbo_fails(capsys, *command, "--steps", 3, "--trust-remote-code")
    assert (
        "each step shows tokens of one of 2 blocks; steps must be a multiple of 2; got 3" in line
    )
    several, _ = measured(capsys, *command, "--steps", "2,4", "--calls", 4000)
    assert [each["steps"] for each in several["sweep"]] == [2, 4]
    assert several["sweep"][1]["nats"] == found["nats"]
    several = nelbo.sweep(loaded, [2, 4], ["abcdab", "dcA"], calls=4000)
    assert [each.steps for each in several] == [2, 4] and several[1].nats == found["nats"]
    with pytest.raises(ValueError, match=r"blocks of the texts, which are not known yet: give"):
        huggingface.load(blocks, trust_remote_code=True, steps=4)


def test_block_diffusion_is_measured_and_drawn_by_the_command_line(tmp_path, capsys, blocks):
    (tmp_path / "a.txt").write_text("abcdab\ndcA")
    command = ["evaluate", f"hf:{blocks}", "--data", tmp_path / "a.txt", "--lines"]
    found, _ = measured(capsys, *command, "--sampler", "greedy", "--save", tmp_path / "a.npz")
    assert found["nats"] > 0 and math.isfinite(found["in_order"]["nats"])
    assert np.load(tmp_path / "a.npz")["token_nats"].shape == (2, 8)
    loaded = huggingface.load(blocks, trust_remote_code=True)
    assert isinstance(loaded.model.process, BlockDiffusion)
    draw = ["sample", f"hf:{blocks}", "--trust-remote-code", "--n", 2, "--length", 6]
    run_ok(*draw, "--steps", 6, "--condition", "ab", "--out", tmp_path / "x.npz")
    assert "drawn in 6 steps" in capsys.readouterr().err
    x = np.load(tmp_path / "x.npz")["x"]
    assert x.shape == (2, 10) and (x[:, 1:3] == [4, 5]).all()
    # samples are ids, which are measured in turn
    found, err = measured(capsys, "evaluate", f"hf:{blocks}", "--data", tmp_path / "x.npz")
    assert "16 tokens of 2 texts are scored" in err and found["nats"] > 0
    plain = f"hf:{write(tmp_path / 'plain')}"
    _, err = measured(capsys, *command, "--surrogate", plain, "--masks", "two-levels")
    assert "the surrogate read" in err
    config = json.loads((blocks / "config.json").read_text())
    (blocks / "config.json").write_text(json.dumps(config | {"block_size": None}))
    with pytest.raises(ValueError, match="block_size must be"):
        huggingface.load(blocks, trust_remote_code=True)


@pytest.mark.parametrize("mixed", [True, False])
def test_block_diffusion_in_bfloat16(tmp_path, mixed):
    """The code of BD3-LM computes with times in float32, and fails in fewer bits: its weights are
    widened, with a note; other code computes in its own type."""
    home = write_with_code(tmp_path / "m", "bd3lm", dtype="bfloat16")
    (code,) = home.glob("code_of_*.py")
    if mixed:
        own = "        self.cls.predictions.transform.dense(timesteps[:, None].expand(-1, 8))\n"
        code.write_text(code.read_text().replace("        found =", f"{own}        found ="))
    weights = load_file(home / "model.safetensors")
    narrow = {k: v.bfloat16() for k, v in weights.items()}
    save_file(narrow, home / "model.safetensors", metadata={"format": "pt"})
    found = huggingface.load(home, trust_remote_code=True)
    told = "float32, exactly those of bfloat16, in which its code fails" if mixed else "bfloat16"
    assert f"its weights are {told}" in found.notes
    wide = huggingface.load(home, trust_remote_code=True, precision="float32")
    if mixed:
        with pytest.raises(ValueError, match=r"dtype.*; or leave --precision bf16 out"):
            huggingface.load(home, trust_remote_code=True, precision="bf16")
    texts = [[4, 5, 6, 7, 8, 4]]
    got = [nelbo.evaluate(model, texts, calls=8).nats for model in (found, wide)]
    assert (got[0] == got[1]) == mixed and math.isclose(*got, rel_tol=0.05)


# ---- mistakes cost no wait


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights, which takes minutes for a large model, is a failure."""

    def module(self, *args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(text_folder.TextFolder, "module", module)


PROMPT = json.dumps({"prompt": "abcdabcda", "answer": "b"})


@pytest.mark.parametrize(
    ("options", "name", "content", "words"),
    [
        ("", "none.txt", None, "does not exist, or is not a file"),
        ("", "a.txt", "abX", "the tokenizer does not give the text back, 'X' becomes 'a'"),
        ("", "a.txt", "", "is empty"),
        ("", "a.jsonl", json.dumps({"prompt": "a", "answer": ""}), "has an empty answer"),
        (
            "",
            "a.jsonl",
            PROMPT,
            "a.jsonl, line 1 has a prompt of 9 tokens, and the model's window",
        ),
        ("", "a.npy", [[4, 12]], "text 0 has id 12 at 1, beyond 0..11"),
        ("", "a.npy", [[4, 3]], "text 0 has id 3 at 1, the model's mask"),
        ("", "a.npy", [[1, 2]], "text 0 has no token to score"),
        ("", "a.npy", [[4] * 11], "11 tokens, and the model takes at most 10"),
        ("", "a.npy", np.zeros((0, 4), int), "there is no text to measure; give at least one"),
        (",never=4", "a.npy", [[4, 5]], "text 0 has id 4 at 0, never predicted"),
        (",shown=12", "a.npy", [[4, 5]], "ids of the module are 0..11; got [12] in shown"),
        (",block=0", "a.npy", [[4, 5]], "block must be at least 1; got 0"),
        (",process=uniform,block=2", "a.npy", [[4, 5]], "block diffusion is masked"),
        (",process=uniform,mask=3", "a.npy", [[4, 5]], "a uniform-state one has none"),
        ("", None, None, "comes without data; give some with --data"),
    ],
)
def test_data_are_read_before_weights(tmp_path, capsys, no_weights, options, name, content, words):
    home, data = write(tmp_path / "m"), []
    if name is not None:
        data = ["--data", tmp_path / name]
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    for command in (["evaluate"], ["score", "--out", tmp_path / "s.csv"]):
        line = nelbo_fails(capsys, *command, f"hf:{home}{options}", *data)
        assert words in line, line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calls", 1], "calls must be at least 2 per example"),
        (["--calls", 1, "--steps", "2,3"], "calls must be at least 2 per example"),
        (["--target-error", 0], "target_error must be positive; got 0"),
        (["--sampler", "greedy", "--tokens-per-step", 0], "tokens_per_step must be at least 1"),
    ],
)
def test_options_are_read_before_weights(tmp_path, capsys, no_weights, options, words):
    home = write(tmp_path / "m")
    np.save(tmp_path / "a.npy", [[4, 5]])
    line = nelbo_fails(capsys, "evaluate", f"hf:{home}", "--data", tmp_path / "a.npy", *options)
    assert words in line, line


def test_a_surrogate_of_other_symbols_is_refused_before_weights(tmp_path, no_weights):
    surrogate = integrations.wrap_tokens(Counted(4), 4)
    with pytest.raises(ValueError, match="symbols of the model, 12; got 6"):
        nelbo.evaluate(f"hf:{write(tmp_path / 'm')}", [[4, 5]], surrogate=surrogate)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--condition", "X"], "the tokenizer does not give the text back"),
        (["--condition", "abcdabcd"], "there is room for 0, and 1 must be drawn"),
        (["--condition", "a", "--condition", "b"], "one for each of 64 samples; got 2"),
        (["--n", 0], "number of samples must be at least 1; got 0"),
        (["--sampler", "greedy", "--tokens-per-step", 0], "must be at least 1; got 0"),
        (["--sampler", "greedy", "--steps", 4], "give tokens_per_step in place of steps"),
    ],
)
def test_prompts_and_samplers_are_read_before_weights(
    tmp_path, capsys, no_weights, options, words
):
    home = write(tmp_path / "m")
    assert words in nelbo_fails(capsys, "sample", f"hf:{home}", *options)


def test_what_is_read_ahead_is_read_once(tmp_path, monkeypatch):
    """Large files are not tokenised twice; and a loaded model reads a file again."""
    home, path, read = write(tmp_path / "m"), tmp_path / "a.txt", []
    path.write_text("abcd")
    chunks = TextReader._chunks
    monkeypatch.setattr(TextReader, "_chunks", lambda *args: read.append(1) or chunks(*args))
    nelbo.evaluate(f"hf:{home}", str(path), calls=8)
    assert len(read) == 1
    found = huggingface.load(home)
    nelbo.evaluate(found, str(path), calls=8)
    path.write_text("ab")
    assert len(found.texts(path).batch.x[0]) == 4 and len(read) == 3


def test_an_attention_mask_is_no_time(tmp_path):
    """BERT would take the time as one, and give numbers."""
    home = write(tmp_path / "m")
    with pytest.raises(ValueError, match="BertForMaskedLM takes attention_mask after the ids"):
        huggingface.load(home, time="sigma")
