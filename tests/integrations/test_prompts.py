"""Prompts are read by the text encoders of a pipeline, in memory or in its folder, as they are."""

import json

import pytest
import torch
from support.conditional import (
    SIZE,
    ddpm,
    dit,
    flow,
    images,
    pixart,
    prompts,
    sd3,
    sdxl,
    text_unet,
)
from support.transformers import POOLED, WIDTH, t5, text_encoder
from torch.nn.functional import pad

from nelbo import evaluate
from nelbo._utils.numerics import seeded
from nelbo.integrations import load
from nelbo.integrations.diffusers_network import sizes_of

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]
PROMPTS = ["a cat", "a dog", ""]


def written(folder, kind, network, scheduler, **parts):
    """Write a folder as a pipeline does, with an index of its parts."""
    name = (
        "unet"
        if kind in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
        else "transformer"
    )
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


def test_stable_diffusion_3_with_all_three(tmp_path):
    """The third is a T5, whose tokens follow those of the others."""
    network, widths = sd3(), (2, POOLED - 2)
    encoders = [
        text_encoder(tmp_path, name, pooled=pooled, seed=pooled, width=4)
        for name, pooled in zip(("text_encoder", "text_encoder_2"), widths, strict=True)
    ]
    encoders.append(t5(tmp_path, "text_encoder_3"))
    names = zip(("", "_2", "_3"), encoders, strict=True)
    parts = {
        f"{k}{i}": v
        for i, e in names
        for k, v in zip(("text_encoder", "tokenizer"), e, strict=True)
    }
    index = {name: ["transformers", type(part).__name__] for name, part in parts.items()}
    source = written(tmp_path, "StableDiffusion3Pipeline", network, flow(), **index)
    pipeline = diffusers.StableDiffusion3Pipeline(
        vae=None, transformer=network, scheduler=flow(), **parts
    )
    with torch.no_grad():
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False
        )
    given = {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
    want = evaluate((network, flow()), images(), condition=given, steps=3, calls=4)
    assert evaluate(source, images(), condition=PROMPTS, steps=3, calls=4).nats == want.nats
    assert evaluate(pipeline, images(), condition=PROMPTS, steps=3, calls=4).nats == want.nats
    parts |= {"text_encoder_3": None, "tokenizer_3": None}
    two = diffusers.StableDiffusion3Pipeline(
        vae=None, transformer=network, scheduler=flow(), **parts
    )
    assert evaluate(two, images(), condition=PROMPTS, steps=3, calls=4).nats != want.nats


def test_stable_diffusion_xl(tmp_path):
    """Two encoders side by side, the second's embedding of the whole prompt, and the sizes of a
    whole image; no prompt is zeros where the folder says so."""
    network = sdxl()
    first, tokenizer = text_encoder(tmp_path, width=4)
    second, tokenizer_2 = text_encoder(tmp_path, "text_encoder_2", pooled=POOLED, width=8)
    source = written(
        tmp_path,
        "StableDiffusionXLPipeline",
        network,
        ddpm(),
        text_encoder=["transformers", "CLIPTextModel"],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        force_zeros_for_empty_prompt=True,
    )
    with torch.no_grad():
        found = [
            encoder(ids(of), output_hidden_states=True)
            for encoder, of in ((first, tokenizer), (second, tokenizer_2))
        ]
    side = SIZE * 8.0  # of the image whose latents the network would model
    given = {
        "encoder_hidden_states": torch.cat([each.hidden_states[-2] for each in found], -1),
        "added_cond_kwargs.text_embeds": found[1].text_embeds,
        "added_cond_kwargs.time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]]),
    }
    want = evaluate((network, ddpm()), images(), condition=given, steps=3, calls=4)
    loaded = load(source, condition=PROMPTS, steps=3)
    assert evaluate(loaded, images(), calls=4).nats == want.nats
    none = loaded.nothing().values
    assert not none["encoder_hidden_states"].any()
    assert not none["added_cond_kwargs.text_embeds"].any()
    assert none["added_cond_kwargs.time_ids"].any()


def test_pixart(tmp_path):
    """A T5, and the mask of its tokens."""
    network = pixart()
    encoder, tokenizer = t5(tmp_path)
    source = written(
        tmp_path,
        "PixArtAlphaPipeline",
        network,
        ddpm(),
        text_encoder=["transformers", "T5EncoderModel"],
        tokenizer=["transformers", "T5Tokenizer"],
    )
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=120, return_tensors="pt")
    with torch.no_grad():
        embeddings = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    given = {
        "encoder_hidden_states": embeddings,
        "encoder_attention_mask": tokens.attention_mask,
    }
    want = evaluate((network, ddpm()), images(), condition=given, steps=3, calls=4)
    loaded = load(source, condition=PROMPTS, steps=3)
    assert evaluate(loaded, images(), calls=4).nats == want.nats
    assert set(loaded.nothing().values) == set(given)
    whole = {"encoder_hidden_states": embeddings}
    other = evaluate((network, ddpm()), images(), condition=whole, steps=3, calls=4)
    assert other.nats != want.nats


def test_sizes_of_a_large_pixart():
    """The published ones of 1024 pixels take the size of the image, which must not be left out."""
    about = {"caption_channels": 4096, "sample_size": 128, "num_embeds_ada_norm": 1000}
    assert sizes_of(about, 1024.0) == {
        "added_cond_kwargs.resolution": [1024.0, 1024.0],
        "added_cond_kwargs.aspect_ratio": [1.0],
    }
    assert sizes_of({**about, "use_additional_conditions": False}, 1024.0) == {}
    assert sizes_of({**about, "sample_size": 64}, 512.0) == {}


def test_a_network_of_packed_latents_is_refused():
    """Flux: with the family and the way that is left."""
    network = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    for condition in (None, prompts()):
        with pytest.raises(
            ValueError, match=r"FluxTransformer2DModel takes packed.*wrap"
        ) as error:
            evaluate((network, flow()), images(), condition=condition, steps=3)
        assert "\n" not in str(error.value)


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
