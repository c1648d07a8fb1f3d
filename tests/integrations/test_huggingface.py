"""Folders of transformers, written here with random tiny weights, and texts for them."""

import itertools
import json
import logging
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.commands import nelbo_fails, run_ok
from support.language_models import KINDS, write, write_tokenizer

import nelbo
from nelbo import integrations
from nelbo.cli import main
from nelbo.integrations import huggingface, is_foreign, text_folder, wrap_tokens
from nelbo.integrations.token_rows import SCORED

EMBEDDED = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_of_transformers(tmp_path, kind):
    """The logits are those of one real forward pass, renormalised over the possible ids."""
    home = write(tmp_path / kind, kind)
    found = huggingface.load(home)
    (tmp_path / "a.txt").write_text("abcA d")
    texts = found.texts(str(tmp_path / "a.txt"))
    batch, model = texts.batch, found.model
    assert batch.condition.tolist() == [[1, *[SCORED] * 6, 2]]
    z = torch.where(batch.condition == SCORED, 12, batch.x)
    t = torch.ones(1, dtype=torch.float64)
    got = model.predict(z, t, batch.condition).symbols(z, 12).log_prob(batch.x)[0, 1:-1]
    plain = transformers.AutoModelForMaskedLM.from_pretrained(home).eval()
    with torch.no_grad():
        logits = plain(torch.where(z == 12, 3, z)).logits[0, 1:-1]
    logits[:, [0, 1, 2, 3, 11]] = -torch.inf
    wanted = logits.double().log_softmax(-1).gather(1, batch.x[0, 1:-1, None])[:, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted != wanted[0]).any()
    assert model.length == (9 if kind in ("roberta", "esm") else 10)


def test_texts_of_every_kind(tmp_path):
    """Chunks, lines, prompts and FASTA: what is scored, and its characters and bytes."""
    found = huggingface.load(write(tmp_path / "m"))

    def read(name, text, **options):
        (tmp_path / name).write_text(text)
        return found.texts(str(tmp_path / name), **options)

    def scored(texts):
        return (texts.batch.condition == SCORED).sum(1).tolist()

    chunks = read("a.txt", "abcd" * 5)
    assert scored(chunks) == [8, 8, 4] and chunks.characters == chunks.size == 20
    assert "3 chunks of 8 tokens, the last of 4" in chunks.notes[0]
    lines = read("a.txt", "ab\n\nabc\n", lines=True)
    assert scored(lines) == [2, 3] and lines.characters == 5
    assert "2 lines, without their line breaks; 2 are empty" in lines.notes[0]
    rows = [{"prompt": "ab", "answer": "cA"}, {"text": "abc"}]
    pairs = read("a.jsonl", "\n".join(map(json.dumps, rows)))
    assert scored(pairs) == [2, 3] and pairs.batch.condition[0].tolist() == [1, 4, 5, -1, -1, 2]
    assert scored(read("a.fasta", ">one\nab\ncd\n>two\na\n")) == [4, 1]
    result = nelbo.evaluate(found.model, pairs.batch, calls=8)
    rates = pairs.rates(result.nats)
    assert math.isclose(rates["bits_per_token"], result.bits_per_dim)
    assert math.isclose(rates["bits_per_byte"] * 5, result.nats * 2 / math.log(2))


def test_ids_of_a_tokenizer_with_a_gap(tmp_path):
    """Those that it has can be scored, also beyond their number; one that it lacks has no mass."""
    home = write(tmp_path / "m")
    path = home / "tokenizer.json"
    made = json.loads(path.read_text())
    ids = made["model"]["vocab"]
    (moved,) = [token for token, i in ids.items() if i == 10]
    made["model"]["vocab"] = ids | {moved: 11}
    path.write_text(json.dumps(made))
    found = huggingface.load(home)
    texts = found.texts([f"a{moved}"])
    assert texts.batch.x[0].tolist()[1:3] == [4, 11]
    assert found.model.never.tolist() == [0, 1, 2, 3, 10]
    assert nelbo.evaluate(found.model, texts.batch, calls=8).nats > 0


def test_bad_input_on_the_command_line(tmp_path, capsys):
    """One sentence each, and no traceback."""
    home = write(tmp_path / "m")
    decoder = write(tmp_path / "decoder")
    config = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    (tmp_path / "a.txt").write_text("abcd")
    np.save(tmp_path / "ids.npy", np.array([[4, 12, 5]]))
    np.save(tmp_path / "mask.npy", np.array([[4, 3, 5]]))
    np.save(tmp_path / "long.npy", np.full((1, 11), 4))
    rows = {"prompt": "abcdabcda", "answer": "b"}
    (tmp_path / "long.jsonl").write_text(json.dumps(rows))
    (tmp_path / "empty.jsonl").write_text(json.dumps(rows | {"answer": ""}))
    for folder, data, words in (
        (home, "ids.npy", "text 0 has id 12 at 1, beyond 0..11"),
        (home, "mask.npy", "text 0 has id 3 at 1, the model's mask"),
        (home, "long.npy", "11 tokens, and the model takes at most 10; divide it into chunks"),
        (home, "long.jsonl", "long.jsonl, line 1 has a prompt of 9 tokens"),
        (home, "empty.jsonl", "has an empty answer"),
        (decoder, "a.txt", "it reads from left to right"),
        (write(tmp_path / "low", lower=True), "A.txt", "does not exist"),
    ):
        line = nelbo_fails(capsys, "evaluate", f"hf:{folder}", "--data", tmp_path / data)
        assert words in line, line


def test_bad_folders_and_texts_are_refused(tmp_path):
    """One sentence each."""
    home = write(tmp_path / "m")

    def refused(words, folder=home, name=None, text="", **options):
        if name is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            huggingface.load(folder).texts(str(tmp_path / str(name)), **options)

    refused("is not a folder", tmp_path / "none")
    refused("has no mask token", write(tmp_path / "nomask", mask=False))
    refused(
        "it lowers case: .A. becomes .a.",
        write(tmp_path / "low", lower=True),
        "a.txt",
        "abA",
    )
    for low, prompt, words in (
        (False, "xyz!", "back, 'xyz!' becomes 'aaaa'"),
        (True, "AAAA", "it lowers case: 'AAAA' becomes 'aaaa'"),
    ):
        refused(
            words,
            write(tmp_path / "prompts", lower=low),
            "a.jsonl",
            json.dumps({"prompt": prompt, "answer": "b"}),
        )
    one = json.dumps({"prompt": "ab", "answer": "c"})
    refused(
        "line 3 has a prompt of 9 tokens, and the model's window is 10",
        name="a.jsonl",
        text=f"{one}\n\n" + json.dumps({"prompt": "abcdabcda", "answer": "b"}),
    )
    refused(
        "line 3 has 12 tokens, and the model takes at most 10; divide it$",
        name="a.jsonl",
        text=f"{one}\n\n" + json.dumps({"prompt": "abcdabcd", "answer": "ab"}),
    )
    refused(
        "line 1 has an empty answer",
        name="a.jsonl",
        text=json.dumps({"prompt": "ab", "answer": ""}),
    )
    refused(
        "line 3 has 14 tokens, .* at most 10; divide it, or leave --lines out for chunks",
        name="a.txt",
        text="ab\n\n" + "abcd" * 3,
        lines=True,
    )
    refused("is not UTF-8|does not exist", name=None)
    config = json.loads((home / "config.json").read_text())
    remote = tmp_path / "remote"
    write(remote)
    (remote / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}})
    )
    (remote / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(r"would run code of its own \(AutoModel: evil.Model\)", remote)
    assert not (tmp_path / "ran").exists()
    binary = write(tmp_path / "bin")
    (binary / "model.safetensors").rename(binary / "pytorch_model.bin")
    refused("must be safetensors; got pytorch_model.bin", binary)
    damaged = write(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    refused(r"the weights in .*damaged are damaged \(.*restore them", damaged)
    bare = write(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused(r"has no tokenizer: .* tokenizer.save_pretrained\(folder\)", bare)


def test_warnings_of_transformers_are_said_in_our_words(tmp_path):
    """Long texts, weights that are left out, missing or of another size, decoders, padding: nelbo
    says these itself; and the user's own calls of transformers warn as before."""
    heard, logger = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)

    def of(name, change=None, **config):
        home = write(tmp_path / name)
        weights = load_file(home / "model.safetensors")
        if change is not None:
            change(weights)
        save_file(weights, home / "model.safetensors", metadata={"format": "pt"})
        known = json.loads((home / "config.json").read_text())
        (home / "config.json").write_text(json.dumps(known | config))
        return home

    try:
        home = of("more", lambda weights: weights.update({"bert.pooler.x": torch.zeros(2)}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(home)
        tokenizer.model_max_length = 10
        tokenizer.save_pretrained(home)
        (tmp_path / "long.txt").write_text("abcd" * 20)
        found = nelbo.evaluate(f"hf:{home}", str(tmp_path / "long.txt"), calls=8)
        assert "1 weights in the folder are none of the model: bert.pooler.x" in found.notes
        assert any("80 tokens of 10 texts are scored" in note for note in found.notes)
        for name, words, change, config in (
            ("less", "lacks weights of BertForMaskedLM", lambda w: w.pop(EMBEDDED), {}),
            (
                "other",
                r"word_embeddings.weight is \(12, 8\), and .* \(14, 8\)",
                None,
                {"vocab_size": 14},
            ),
            ("causal", "reads from left to right", None, {"is_decoder": True}),
        ):
            with pytest.raises(ValueError, match=words):
                huggingface.load(of(name, change, **config))
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 10}
        sizes |= {"pad_token_id": 4, "bos_token_id": 1, "eos_token_id": 2}
        module = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=12, **sizes))
        nelbo.evaluate(wrap_tokens(module, 3, block=1), [[4, 5, 6]], calls=8)
        assert not heard
        transformers.AutoTokenizer.from_pretrained(home).encode("abcd" * 20)
        assert "longer than the specified maximum" in heard[0] and not handler.filters
    finally:
        logger.removeHandler(handler)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    """In a sentence, not as a bug."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcd")
    monkeypatch.setattr(text_folder, "find_spec", lambda name: None)
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--device-map", "auto"]
    line = nelbo_fails(capsys, *command)
    assert line.endswith("nelbo: device_map needs accelerate: pip install accelerate")


def test_sources():
    """hf: is a kind of foreign source."""
    assert is_foreign("hf:folder")


def test_the_command(tmp_path, capsys):
    """`nelbo evaluate hf:FOLDER` prints the rates and says what is scored."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcd\nab\n")
    command = ["evaluate", f"hf:{home}", "--data", str(tmp_path / "a.txt"), "--lines", "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--calls", "8"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    found = json.loads(out)
    assert math.isclose(found["nats_per_token"] * 6, found["nats"] * 2)
    assert math.isclose(found["bits_per_byte"], found["bits_per_token"])
    assert "6 tokens of 2 texts are scored" in err and "any-order sampler" in err


def bound_of_steps(model, batch, steps):
    """The mean bound when each step shows L/T tokens: a share k/T is hidden at the k-th, which
    shows 1/k of these. All sets of hidden tokens, one call of the module for each."""
    module, mask, total = model.network.module, model.network.mask_id, 0.0
    for ids, condition in zip(batch.x, batch.condition, strict=True):
        scored = (condition == SCORED).nonzero().flatten().tolist()
        for size in range(1, len(scored) + 1):
            for hidden in map(list, itertools.combinations(scored, size)):
                z = ids.clone()
                z[hidden] = mask
                with torch.no_grad():
                    logits = module(z[None]).logits[0].double()
                logits[:, model.never] = -torch.inf
                cost = -logits.log_softmax(-1)[hidden, ids[hidden]].sum().item()
                for k in range(1, steps + 1):
                    share = k / steps
                    chance = share**size * (1 - share) ** (len(scored) - size)
                    total += chance * cost / k
    return total / len(batch)


def test_steps_are_those_of_one_model_however_it_is_given(tmp_path):
    """With steps of equal time it would be 0.26 nats more."""
    home, texts = write(tmp_path / "m", "eurobert"), ["abcdA ab", "dcba dca"]
    found = integrations.load(f"hf:{home}")
    model, batch = found.model, found.texts(texts).batch
    never = set(model.never.tolist())
    module, mask = model.network.module, model.network.mask_id
    ways = [
        (f"hf:{home}", texts),
        (found, texts),
        (model, batch),
        (wrap_tokens(module, mask, never=never, shown=never), batch.x),
    ]
    bounds = [nelbo.evaluate(*way, calls=4000, steps=2, variates=True) for way in ways]
    assert len({bound.nats for bound in bounds}) == 1
    error = bounds[0].standard_error.monte_carlo * 8 * math.log(2)
    assert abs(bounds[0].nats - bound_of_steps(model, batch, 2)) < 4 * error
    assert error < 0.035


def test_a_model_in_memory_with_its_tokenizer(tmp_path):
    """The numbers are those of its folder, for texts and for what the tokenizer returns."""
    home, texts = write(tmp_path / "m"), ["abcdA ab", "dcb"]
    module = transformers.AutoModelForMaskedLM.from_pretrained(home)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    pair = module, tokenizer
    wanted = nelbo.evaluate(f"hf:{home}", texts, calls=3)
    padded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    for given in (texts, padded, dict(padded), tokenizer(texts), padded["input_ids"]):
        found = nelbo.evaluate(pair, given, calls=3)
        assert found.nats == wanted.nats
        assert found.notes[0].startswith("BertForMaskedLM in memory: the bound of its any-order")
    assert nelbo.evaluate(pair, texts, calls=3, surrogate=pair).nats == wanted.nats
    assert nelbo.score(pair, texts, calls=4).nats.shape == (2,)
    assert [text[:2] for text in nelbo.sample(pair, 2, length=3, condition="ab")] == ["ab"] * 2
    assert integrations.load(pair).name == nelbo.evaluate(pair, texts).weights == "BertForMaskedLM"
    bare = wrap_tokens(module, 3, never={0, 1, 2, 11}, shown={1, 2})
    assert nelbo.evaluate(bare, padded, calls=3).nats == wanted.nats
    with pytest.raises(ValueError, match=r"^BertForMaskedLM comes without data"):
        nelbo.evaluate(pair)
    with pytest.raises(ValueError, match="in a precision and place of its own"):
        nelbo.evaluate(pair, texts, precision="bf16")
    with pytest.raises(ValueError, match=r"BertForMaskedLM is a model of tokens.*give both"):
        nelbo.evaluate(module, padded)
    with pytest.raises(ValueError, match="Linear has no config of transformers"):
        nelbo.evaluate((torch.nn.Linear(2, 2), tokenizer), texts)
    padded["attention_mask"][0, 3] = 0
    with pytest.raises(ValueError, match="0 for padding at its ends alone"):
        nelbo.evaluate(pair, padded)


def test_the_sampler_that_people_use(tmp_path, capsys):
    """`--sampler` states its exact -log P(x) beside the bound, per token and byte too."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcd\nab\n")
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--lines", "--calls", 8]
    ordered = [*command, "--sampler", "greedy", "--tokens-per-step", 3]
    run_ok(*ordered, "--json", "--save", tmp_path / "a.npz")
    found = json.loads(capsys.readouterr().out)
    exact = found["in_order"]
    assert exact["calls_per_example"] == 1.5 and exact["standard_error"]["monte_carlo"] == 0
    saved = np.load(tmp_path / "a.npz")["sampler_nats"]
    assert math.isclose(saved.mean(), exact["nats"])
    assert math.isclose(found["in_order"]["bits_per_byte"] * 3, exact["nats"] / math.log(2))
    assert exact["nats"] != found["nats"]
    run_ok(*ordered)
    assert "greedy, 3 at a time: the exact -log P(x) of another" in capsys.readouterr().out
    again = nelbo.evaluate(f"hf:{home}", str(tmp_path / "a.txt"), calls=8, sampler="margin")
    assert "margin, 1 at a time" in repr(again) and again.in_order.calls_per_example == 8
    assert "margin, 1 at a time" in again._repr_html_()
    assert {"nats_per_token", "bits_per_byte"} <= again.rates.keys() <= found.keys()
    ratio = again.in_order.rates["bits_per_byte"] / again.rates["bits_per_byte"]
    assert math.isclose(ratio, again.in_order.nats / again.nats)
    run_ok(*command, "--sampler", "random", "--json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "random order takes 18 network calls, 2^L - 1 for L symbols" in err
    assert found["in_order"]["calls_per_example"] == (2**4 + 2**2) / 2 - 1
    line = nelbo_fails(capsys, *command, "--sampler", "confidence")
    assert 'Choose from: "left-to-right", "greedy"' in line
    assert "belongs to a sampler" in nelbo_fails(capsys, *command, "--tokens-per-step", 2)
    line = nelbo_fails(capsys, *command[:-2], "--ode", "--sampler", "greedy")
    assert "--sampler is stated beside the plain bound" in line


def test_a_surrogate_on_the_command_line(tmp_path, capsys):
    """`--surrogate hf:FOLDER` reads most of the masks, and the notes say how many."""
    home, other = write(tmp_path / "m"), write(tmp_path / "s")
    (tmp_path / "a.txt").write_text("abcd\nab\n")
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--lines"]
    run_ok(*command, "--calls", 8, "--surrogate", f"hf:{other}", "--masks", "two-levels")
    assert "the surrogate read" in capsys.readouterr().err
    line = nelbo_fails(capsys, *command, "--surrogate", f"hf:{other}", "--steps", 2)
    assert "a surrogate is for a masked model in continuous time" in line


def test_the_model_s_own_texts_from_both_sides(tmp_path, capsys):
    """`--own-samples` prints an interval, of texts of the lengths of the data."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcd\nab\n")
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--lines", "--steps", 2]
    own = [*command, "--importance-samples", 16, "--own-samples", 5]
    run_ok(*own, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 5 and found["calls_per_example"] == 2 * 17
    assert math.isclose(found["gap"], found["nats"] - found["at_least"])
    run_ok(*own)
    assert "5 samples of the model itself is between" in capsys.readouterr().out
    assert "--importance-samples K and --steps T" in nelbo_fails(
        capsys, *command, "--own-samples", 5
    )


def test_the_precision_of_the_weights(tmp_path, capsys):
    """`--precision bf16`: weights and logits are bfloat16, sums float64, and the record says so;
    a folder of bfloat16 stays as it is stored."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcd\nab\n")
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--lines", "--calls", 8]
    run_ok(*command, "--json")
    wide = json.loads(capsys.readouterr().out)
    run_ok(*command, "--json", "--precision", "bf16")
    out, err = capsys.readouterr()
    narrow = json.loads(out)
    assert narrow["precision"] == "float64 around bfloat16" != wide["precision"]
    assert narrow["model_hash"] != wide["model_hash"] and "weights are bfloat16" in err
    assert 0 < abs(narrow["nats"] - wide["nats"]) < 0.02 * wide["nats"]
    found = huggingface.load(home, precision="bf16")
    logits = found.model.network.module(torch.tensor([[1, 4, 2]])).logits
    assert logits.dtype == torch.bfloat16
    batch = found.texts(tmp_path / "a.txt", lines=True).batch
    assert nelbo.evaluate(found.model, batch, calls=8).nats == narrow["nats"]
    stored = tmp_path / "stored"
    found.model.network.module.save_pretrained(stored)
    write_tokenizer(stored)
    assert nelbo.evaluate(huggingface.load(stored).model, batch, calls=8).nats == narrow["nats"]
    with pytest.raises(ValueError, match=r"precision must be bf16, fp16, .*; got 'int8'"):
        huggingface.load(home, precision="int8")
    line = nelbo_fails(capsys, "evaluate", tmp_path / "run", "--precision", "bf16")
    assert "are for other libraries' models" in line
    line = nelbo_fails(capsys, *command, "--device-map", "auto", "--device", "cpu")
    assert "--device-map places the weights; leave --device cpu out" in line


def test_a_device_map(tmp_path, monkeypatch):
    """It goes to `from_pretrained` and needs accelerate; nothing moves the weights after it."""
    home = write(tmp_path / "m")
    if find_spec("accelerate") is None:
        with pytest.raises(ImportError, match="pip install accelerate"):
            huggingface.load(home, device_map="cpu")
        monkeypatch.setattr(text_folder, "find_spec", lambda name: name)
        make, given = transformers.AutoModelForMaskedLM.from_pretrained, {}

        def without(*args, device_map, **options):
            given["device_map"] = device_map
            return make(*args, **options)

        monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", without)
    found = integrations.load(f"hf:{home}", device_map="cpu", precision="bf16")
    assert found.placed and "weights are bfloat16 on cpu (device_map cpu)" in found.notes[-1]
    assert math.isfinite(nelbo.evaluate(found, ["abc"], calls=8).nats)
    with pytest.raises(ValueError, match="is for hf:FOLDER, and this is openai:"):
        integrations.load("openai:x", device_map="auto")
