"""P(x|c) of networks of classes and prompts: conditions reach them as they take them."""

import json
from inspect import signature

import numpy as np
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

from nelbo import evaluate
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.times import elbo
from nelbo.integrations import load
from nelbo.integrations.diffusers import build

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


KINDS = {
    "prompts": (text_unet, ddpm, lambda n: {"encoder_hidden_states": prompts(n)}),
    "prompts of a flow": (
        sd3,
        flow,
        lambda n: {
            "encoder_hidden_states": prompts(n),
            "pooled_projections": prompts(n)[:, 0, :5],
        },
    ),
    "classes": (dit, ddpm, lambda n: {"class_labels": torch.tensor([3, 0, 10][:n])}),
    "classes of a flow": (dit, flow, lambda n: {"class_labels": torch.tensor([3, 0, 10][:n])}),
    "prompts with a mask": (
        pixart,
        ddpm,
        lambda n: {
            "encoder_hidden_states": prompts(n),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]][:n]),
        },
    ),
    "prompts and sizes": (
        sdxl,
        ddpm,
        lambda n: {
            "encoder_hidden_states": prompts(n),
            "added_cond_kwargs.text_embeds": prompts(n)[:, 0, :5],
            "added_cond_kwargs.time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]),
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_gets_its_condition(kind):
    """Each example's own condition, under the network's names, in their shapes and types; and the
    bound of each is that with its condition alone."""
    make, scheduler, condition = KINDS[kind]
    network, x, given = make(), images(), condition(3)
    found = build(network, scheduler(), steps=3, condition=given)
    batch, _ = found.examples(x)
    model, told = found.model, []
    handle = network.register_forward_pre_hook(
        lambda _, inputs, named: told.append((inputs, named)), with_kwargs=True
    )
    z, t = torch.randn(3, 3, SIZE, SIZE).double(), torch.tensor([2 / 3] * 3, dtype=torch.float64)
    model.predict(z, t, batch.condition)
    handle.remove()
    (inputs, named), *_ = told
    for name, value in given.items():
        outer, _, inner = name.partition(".")
        got = named[outer][inner] if inner else named[outer]
        assert got.is_floating_point() == value.is_floating_point()
        torch.testing.assert_close(got, value.expand(3, *value.shape[1:]).to(got))
    time = named["timestep"] if "timestep" in named else inputs[1]
    assert time.shape == (3,) and inputs[0].shape == z.shape
    assert model.conditioned_on == ("class" if "classes" in kind else "embedding")
    with torch.no_grad(), seeded(3):
        all_of_them = elbo(model, batch, found.times).elbo
    for i in range(2):
        alone = {name: v[i : i + 1] if len(v) > 1 else v for name, v in given.items()}
        one = build(network, scheduler(), steps=3, condition=alone)
        whole, _ = one.examples(x)  # one condition for all
        with torch.no_grad(), seeded(3):
            got = elbo(one.model, whole, found.times).elbo
        torch.testing.assert_close(got[i], all_of_them[i], rtol=1e-5, atol=0)
        assert abs(got[2] - all_of_them[2]) > 1e-4
    result = evaluate((network, scheduler()), x, condition=given, steps=3, calls=4)
    assert result.given == model.conditioned_on


def test_a_column_of_labels_is_the_labels():
    network, x = dit(), images()
    labels, column = ([3, 0, 10], [[3], [0], [10]])
    found = [
        evaluate((network, ddpm()), x, condition=c, steps=3, calls=4) for c in (labels, column)
    ]
    assert found[0].nats == found[1].nats and found[0].given == found[1].given == "class"


@pytest.mark.parametrize("names", [np.array(["cat", "dog", "cat"]), np.array([["cat"]] * 3)])
def test_names_of_classes_are_asked_for_as_numbers(names):
    with pytest.raises(ValueError, match="got 'cat'; give classes as numbers"):
        evaluate((dit(), ddpm()), images(), condition=names, steps=3, calls=4)


def test_a_pair_is_said_to_be_taken_for_one_of_images():
    """The same shape may be that of latents, which neither of the two says."""
    found = evaluate((dit(), ddpm()), images(), condition=3, steps=3, calls=4)
    assert any("taken for one of the images themselves" in note for note in found.notes)


class Encoded:
    """A pipeline whose text encoder knows some prompts; parts as those of diffusers."""

    def __init__(self, network, scheduler):
        self.unet, self.scheduler = network, scheduler
        self.known, self.labels = {"a cat": 0, "a dog": 1, "": 2}, {"cat": 3, "dog": 0}
        self.components = {"unet": network, "scheduler": scheduler}

    def encode_prompt(self, prompt, prompt_2=0, *, do_classifier_free_guidance=True):
        assert not do_classifier_free_guidance and prompt_2 is None
        rows = [self.known[each] for each in prompt]
        pooled = prompts()[rows, 0, :5]
        return (prompts()[rows], None, pooled, None)


@pytest.mark.parametrize("kind", ["prompts", "prompts of a flow"])
def test_prompts_by_the_text_encoder_of_a_pipeline(kind):
    make, scheduler, condition = KINDS[kind]
    network, x = make(), images()
    pipeline = Encoded(network, scheduler())
    want = evaluate((network, scheduler()), x, condition=condition(3), steps=3, calls=4)
    got = evaluate(pipeline, x, condition=["a cat", "a dog", ""], steps=3, calls=4)
    assert got.nats == want.nats
    one = evaluate(pipeline, x, condition="a cat", steps=3, calls=4)
    assert one.nats != want.nats
    with pytest.raises(ValueError, match="has no encode_prompt; give embeddings"):
        evaluate((network, scheduler()), x, condition="a cat", steps=3)


@pytest.mark.parametrize(
    "pipeline",
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"],
)
def test_text_encoders_are_called_as_they_are_defined(pipeline):
    """The names by which `evaluate` calls them are those of the pipelines in diffusers."""
    takes = signature(getattr(diffusers, pipeline).encode_prompt).parameters
    assert {"prompt", "device", "do_classifier_free_guidance"} <= {*takes}
    required = {n for n, p in takes.items() if p.default is p.empty} - {"self"}
    assert required <= {
        "prompt", "prompt_2", "prompt_3", "device", "num_images_per_prompt",
        "do_classifier_free_guidance",
    }  # fmt: skip


def test_words_for_classes():
    class Words(Encoded):
        def get_label_ids(self, words):
            return [self.labels[word] for word in words]

    network, x = dit(), images()
    got = evaluate(Words(network, ddpm()), x, condition=["cat", "dog", "cat"], steps=3, calls=4)
    want = evaluate((network, ddpm()), x, condition=[3, 0, 3], steps=3, calls=4)
    assert got.nats == want.nats and got.given == "class"
    with pytest.raises(ValueError, match="no class 'cow'"):
        evaluate(Words(network, ddpm()), x, condition=["cow"] * 3, steps=3)


def test_a_folder_of_prompts(tmp_path):
    """Embeddings from a file after the path, as on the command line."""
    network, x = text_unet(), images()
    network.save_pretrained(tmp_path / "unet")
    ddpm().save_pretrained(tmp_path / "scheduler")
    np.save(tmp_path / "c.npy", prompts().numpy())
    found = load(f"diffusers:{tmp_path},condition={tmp_path / 'c.npy'}", steps=3)
    want = evaluate((network, ddpm()), x, condition=prompts(), steps=3, calls=4)
    assert evaluate(found, x, calls=4).nats == want.nats
    assert json.dumps(want.to_dict())
    with pytest.raises(ValueError, match="give the condition once"):
        load(f"diffusers:{tmp_path},condition={tmp_path / 'c.npy'}", condition=prompts())
    with pytest.raises(FileNotFoundError):
        load(f"diffusers:{tmp_path},condition={tmp_path / 'none.npy'}")


@pytest.mark.parametrize(
    ("kind", "condition", "words"),
    [
        ("prompts", None, r"P\(x\|prompt\): give condition=embeddings.*\(N, L, 12\)"),
        ("prompts", np.zeros((3, 4, 5)), r"must be \(N, L, 12\).*got \(3, 4, 5\)"),
        ("prompts", np.zeros((4, 12)), r"got \(4, 12\)"),
        ("prompts", {"encoder_hidden_states": prompts(), "style": [1]}, "no condition 'style'"),
        ("prompts of a flow", prompts(), "lacks pooled_projections"),
        ("prompts and sizes", prompts(), r"lacks added_cond_kwargs.text_embeds"),
        ("classes", prompts(), "class labels, integers"),
        ("classes", [11, 0, 0], "labels must be 0..10; got 11"),
        ("prompts", prompts(2), "has 2 values, and there are 3"),
        ("prompts", prompts() * np.inf, "has values that are not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(kind, condition, words):
    make, scheduler, _ = KINDS[kind]
    with pytest.raises(ValueError, match=words):
        evaluate((make(), scheduler()), images(), condition=condition, steps=3)


def test_guidance_is_no_likelihood():
    with pytest.raises(ValueError, match=r"guidance has no likelihood.*measure P"):
        evaluate((text_unet(), ddpm()), images(), condition=prompts(), guidance=4.0)
    with pytest.raises(ValueError, match="guidance has no likelihood"):
        evaluate("diffusers:folder", images(), guidance=4.0)
    with pytest.raises(ValueError, match="guidance scale"):
        build(text_unet(time_cond_proj_dim=4), ddpm(), condition=prompts(), scaling=Affine())
