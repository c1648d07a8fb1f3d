"""Prompts are read by the text encoders of a pipeline, in memory or in its folder, as they are."""

import json

import pytest
import torch
from support.conditional import ddpm, dit, flow, images, sd3, text_unet
from support.transformers import POOLED, WIDTH, text_encoder
from torch.nn.functional import pad

from nelbo import evaluate
from nelbo._utils.numerics import seeded
from nelbo.integrations import load

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]
PROMPTS = ["a cat", "a dog", ""]


def written(folder, kind, network, scheduler, **parts):
    """Write a folder as a pipeline does, with an index of its parts."""
    name = "unet" if kind.startswith("StableDiffusionPipeline") else "transformer"
    network.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": kind, "vae": [None, None], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return f"diffusers:{folder}"


def stable_diffusion(folder):
    encoder, tokenizer = text_encoder(folder)
    network = text_unet()
    source = written(
        folder,
        "StableDiffusionPipeline",
        network,
        ddpm(),
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        requires_safety_checker=True,
    )
    return source, network, encoder, tokenizer


def ids(tokenizer, prompts=PROMPTS):
    found = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    return found.input_ids


def test_a_folder_of_stable_diffusion(tmp_path):
    """Each prompt of a folder, of a file of lines and of a pipeline in memory is the embedding
    that the encoder gives of its tokens."""
    source, network, encoder, tokenizer = stable_diffusion(tmp_path)
    x = images()
    with torch.no_grad():
        embeddings = encoder(ids(tokenizer))[0]
    want = evaluate((network, ddpm()), x, condition=embeddings, steps=3, calls=4)
    assert evaluate(source, x, condition=PROMPTS, steps=3, calls=4).nats == want.nats
    lines = tmp_path / "prompts.txt"
    lines.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    found = load(f"{source},condition={lines}", steps=3)
    assert evaluate(found, x, calls=4).nats == want.nats and found.condition.word == "embedding"
    one = evaluate(source, x, condition="a cat", steps=3, calls=4)
    other = embeddings[:1].expand(3, -1, -1)
    assert one.nats == evaluate((network, ddpm()), x, condition=other, steps=3, calls=4).nats
    assert one.nats != want.nats


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_a_pipeline_of_stable_diffusion(tmp_path):
    """One of diffusers itself, whose scheduler it changes."""
    _, network, encoder, tokenizer = stable_diffusion(tmp_path)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=network,
        scheduler=ddpm(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        embeddings = encoder(ids(tokenizer))[0]
    got = evaluate(pipeline, images(), condition=PROMPTS, steps=3, calls=4)
    parts = network, pipeline.scheduler
    assert got.nats == evaluate(parts, images(), condition=embeddings, steps=3, calls=4).nats


def test_a_folder_of_stable_diffusion_3(tmp_path):
    """Two encoders side by side, beside zeros for the third, which was left out."""
    network, widths = sd3(), (2, POOLED - 2)
    encoders = [
        text_encoder(tmp_path, name, pooled=pooled, seed=pooled, width=4)
        for name, pooled in zip(("text_encoder", "text_encoder_2"), widths, strict=True)
    ]
    clip = {
        f"text_encoder{i}": ["transformers", "CLIPTextModelWithProjection"] for i in ("", "_2")
    }
    clip |= {f"tokenizer{i}": ["transformers", "CLIPTokenizer"] for i in ("", "_2")}
    none = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    source = written(tmp_path, "StableDiffusion3Pipeline", network, flow(), **clip, **none)
    with torch.no_grad():
        found = [
            encoder(ids(tokenizer), output_hidden_states=True) for encoder, tokenizer in encoders
        ]
    rows = torch.cat([each.hidden_states[-2] for each in found], -1)
    given = {
        "encoder_hidden_states": pad(rows, (0, WIDTH - rows.shape[-1], 0, 256)),
        "pooled_projections": torch.cat([each.text_embeds for each in found], -1),
    }
    want = evaluate((network, flow()), images(), condition=given, steps=3, calls=4)
    got = evaluate(source, images(), condition=PROMPTS, steps=3, calls=4)
    assert got.nats == want.nats


def test_words_for_the_classes_of_a_folder(tmp_path):
    """DiT calls its classes by words, which stand in the index."""
    network = dit()
    source = written(
        tmp_path, "DiTPipeline", network, ddpm(), id2label={"0": "dog, hound", "3": "cat"}
    )
    got = evaluate(source, images(), condition=["cat", "hound", "cat"], steps=3, calls=4)
    want = evaluate((network, ddpm()), images(), condition=[3, 0, 3], steps=3, calls=4)
    assert got.nats == want.nats and got.given == "class"
    with pytest.raises(ValueError, match="no class 'cow'"):
        load(source, condition=["cow"])


def changed(folder, **change):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_what_is_not_known_is_refused(tmp_path):
    """One sentence each, and no class but those of diffusers and transformers is made."""
    source, *_ = stable_diffusion(tmp_path)

    def refused(words, condition=PROMPTS, kind=ValueError, of=source):
        with pytest.raises(kind, match=words) as error:
            load(of, condition=condition)
        assert "\n" not in str(error.value)

    changed(tmp_path, text_encoder=["evil", "Encoder"])
    refused(r"holds a Encoder; known are CLIPTextModel, .*give embeddings")
    changed(tmp_path, text_encoder=["transformers", "CLIPTextModel"])
    changed(tmp_path, _class_name="AutoencoderKL")
    refused("names AutoencoderKL, no pipeline of diffusers")
    changed(tmp_path, _class_name="StableDiffusionPipeline")
    lines = tmp_path / "prompts.txt"
    lines.write_bytes(b"")
    refused(r"prompts\.txt is empty; give a prompt", None, of=f"{source},condition={lines}")
    lines.write_bytes(b"\xff\xfe\xfd")
    refused("not UTF-8 text", None, of=f"{source},condition={lines}")
    refused("none.txt", None, FileNotFoundError, of=f"{source},condition={tmp_path / 'none.txt'}")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused("holds no CLIPTextModel that can be read")
    weights.unlink()
    refused("holds no CLIPTextModel that can be read")
    (tmp_path / "model_index.json").unlink()
    refused("prompts are read for a whole pipeline", kind=FileNotFoundError)


def test_an_encoder_without_all_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    source, *_ = stable_diffusion(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "k_proj.weight" in name)
    save_file({k: w for k, w in weights.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights of its CLIPTextModel, such as .*{name}"):
        load(source, condition="a cat")


def test_prompts_do_not_depend_on_chance(tmp_path):
    source, *_ = stable_diffusion(tmp_path)
    found = []
    for seed in (1, 2):
        with seeded(seed):
            found.append(load(source, condition="a cat").condition.values["encoder_hidden_states"])
    assert torch.equal(*found)
