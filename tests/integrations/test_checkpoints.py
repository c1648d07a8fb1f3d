"""Weights of training scripts are found under their prefixes, and none are mistaken for others."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nelbo._utils.numerics import seeded
from nelbo.integrations import load_weights


class Network(nn.Module):
    """Parameters of equal shapes, one of them frozen, and a buffer."""

    def __init__(self, width=3):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("table", torch.randn(4))


def made(seed, **options):
    with seeded(seed):
        return Network(**options)


RAW, EMA = made(1), made(2)


def named(prefix, network):
    return {f"{prefix}{name}": w.clone() for name, w in network.state_dict().items()}


def dotless(prefix, network):
    """As LitEma of latent diffusion names the trained parameters."""
    return {
        prefix + name.replace(".", ""): w.detach().clone()
        for name, w in network.named_parameters()
    }


def same(network, other, names=None):
    a, b = network.state_dict(), other.state_dict()
    return all(torch.equal(a[name], b[name]) for name in names or a)


def loaded(path, weights=None):
    network = made(3)
    found, notes = load_weights(network, path, weights)
    return network, found, notes


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "module.", "state_dict.model.", "_orig_mod.module.", "model.diffusion."],
)
def test_any_prefix_is_left_out_and_said(tmp_path, prefix):
    others = {"optimizer.state.0.exp_avg": torch.zeros(3)} if prefix else {}
    save_file(named(prefix, RAW) | others, tmp_path / "x.safetensors")
    network, found, notes = loaded(tmp_path / "x.safetensors")
    assert same(network, RAW) and found.prefix == prefix and not found.averaged
    assert len(notes) == 1 and (repr(prefix) if prefix else "without a prefix") in notes[0]


@pytest.mark.parametrize(
    ("raw", "ema"),
    [
        ("model.", "ema_model."),
        ("state_dict.model.", "state_dict.ema."),
        ("online_model.", "ema."),
    ],
)
def test_an_average_is_taken_by_name(tmp_path, raw, ema):
    path = tmp_path / "last.safetensors"
    save_file(named(raw, RAW) | named(ema, EMA) | {"step": torch.zeros(1)}, path)
    for weights, right in (("ema", EMA), ("raw", RAW), (ema, EMA), (raw, RAW)):
        network, found, notes = loaded(path, weights)
        assert same(network, right) and found.averaged == (right is EMA)
        assert "not used: those under" in notes[1]
    with pytest.raises(ValueError, match=r"several sets .*EMA.*raw.*choose one: weights=.ema"):
        loaded(path)
    with pytest.raises(ValueError, match="no weights 'old'; it has those under"):
        loaded(path, "old")


def test_lightning(tmp_path):
    """A checkpoint of plain values is read where it is; LitEma's names have no dots, and no
    buffers, which are those beside it."""
    weights = named("model.diffusion_model.", RAW) | named("first_stage.", made(5, width=2))
    weights |= dotless("model_ema.diffusion_model", EMA)
    weights |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    path = tmp_path / "last.ckpt"
    torch.save(
        {
            "epoch": 3,
            "state_dict": weights,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            "hyper_parameters": {"lr": 1e-4},
        },
        path,
    )
    with pytest.raises(ValueError, match="several sets"):
        loaded(path)
    network, found, _ = loaded(path, "raw")
    assert same(network, RAW) and found.prefix == "state_dict.model.diffusion_model."
    network, found, notes = loaded(path, "ema")
    parameters = [name for name, _ in EMA.named_parameters()]
    assert found.averaged and "without dots" in str(found)
    assert same(network, EMA, parameters) and same(network, RAW, ["table"])
    assert "for table, which they lack: those under 'state_dict.model.diffusion" in notes[-1]


@pytest.mark.parametrize("trained_alone", [True, False])
def test_shadow_parameters(tmp_path, trained_alone):
    """Lists in the order of the parameters, all (diffusers) or those that are trained."""
    shadow = [p.detach() for p in EMA.parameters() if p.requires_grad or not trained_alone]
    path = tmp_path / "custom_checkpoint_0.pkl"
    torch.save({"decay": 0.999, "shadow_params": shadow}, path)
    network, found, notes = loaded(path)
    names = [n for n, p in EMA.named_parameters() if p.requires_grad or not trained_alone]
    assert same(network, EMA, names) and found.averaged and "in order" in str(found)
    assert same(network, made(3), {*network.state_dict()} - {*names})
    assert "table, which they lack: as the module had them" in notes[-1]


def test_averaged_model_of_torch(tmp_path):
    average = AveragedModel(RAW, use_buffers=True)
    average.update_parameters(RAW)
    torch.save(average.state_dict(), tmp_path / "ema.pt")
    network, found, _ = loaded(tmp_path / "ema.pt")
    assert same(network, RAW) and found.prefix == "module." and found.averaged  # by the file


def test_a_folder_of_accelerate(tmp_path):
    """model and model_1 are two modules, not shards; shards are those of an index."""
    save_file(named("", RAW), tmp_path / "model.safetensors")
    save_file(named("", EMA), tmp_path / "model_1.safetensors")
    with pytest.raises(ValueError, match=r"several .*model\.safetensors.*model_1\.safetensors"):
        loaded(tmp_path)
    network, found, _ = loaded(tmp_path, "model_1")
    assert same(network, EMA) and found.file == "model_1.safetensors"
    save_file(named("", made(4, width=5)), tmp_path / "model_1.safetensors")
    assert same(loaded(tmp_path)[0], RAW)  # the other has another size
    weights = list(named("module.", EMA).items())
    index = {}
    for i, part in enumerate((dict(weights[:2]), dict(weights[2:]))):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(part, tmp_path / name)
        index |= dict.fromkeys(part, name)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model_1.safetensors").unlink()
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    for place in (tmp_path, file):
        network, found, _ = loaded(place)
        assert same(network, EMA) and found.file == file.name and found.prefix == "module."


def test_weights_are_whole(tmp_path):
    """A name too many or too few, or another size, is another network."""
    path = tmp_path / "x.safetensors"
    weights = named("model.", RAW)
    save_file(weights | {"model.third.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"an unknown weight third\.weight"):
        loaded(path)
    del weights["model.second.bias"]
    save_file(weights, path)
    words = r"no whole set .*under 'model\.' it has 5 of 6 names, and lacks second\.bias; was"
    with pytest.raises(ValueError, match=words):
        loaded(path)
    save_file(named("", made(1, width=4)), path)
    with pytest.raises(
        ValueError, match=r"frozen in .* has the shape \(4,\), and in the model \(3,\)"
    ):
        loaded(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match="no whole set of weights of this Network; was the module made"
    ):
        loaded(path)


def test_the_nearest_name_is_no_other_part(tmp_path):
    """'my_first' does not end with the name 'first', and a part of a module is not the module."""
    save_file({f"my_{k}": w for k, w in named("", RAW).items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no whole set"):
        loaded(tmp_path / "x.safetensors")
    ema_like = {f"schema.{k}": w for k, w in named("", RAW).items()}
    save_file(ema_like, tmp_path / "non_ema.safetensors")
    assert not loaded(tmp_path / "non_ema.safetensors")[1].averaged


class Code:
    def __reduce__(self):
        return print, ("code was run",)


def test_no_code_is_run(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": named("model.", RAW), "hyper_parameters": Code()}, path)
    with pytest.raises(ValueError, match=r"of tensors only .* as safetensors") as error:
        loaded(path)
    assert "code was run" not in capsys.readouterr().out and "\n" not in str(error.value)
    loop = {"state_dict": named("model.", RAW)}
    loop["again"] = loop
    torch.save(loop, path)
    with pytest.raises(ValueError, match="nests its values too deep"):
        loaded(path)
    with pytest.raises(FileNotFoundError, match="give a file of weights"):
        loaded(tmp_path / "none")
    with pytest.raises(ValueError, match="module must be a torch Module; got 'm'"):
        load_weights("m", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no safetensors"):
        loaded(tmp_path / "empty")


def test_the_module_is_measured_with_them(tmp_path):
    """From the file to the number, with the weights in the record."""
    from nelbo import evaluate

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, y, time):
            return self.inner(y)

    with seeded(4):
        right, network = Small(), Small()
        x = torch.randint(256, (3, 1, 4, 4))
    save_file({f"ema.{k}": w for k, w in right.state_dict().items()}, tmp_path / "x.safetensors")
    found, _ = load_weights(network, tmp_path / "x.safetensors")
    told = {"betas": torch.linspace(0.05, 0.95, 8), "calls": 8}
    got = evaluate(network, x, weights=str(found), **told)
    assert got.nats == evaluate(copy.deepcopy(right), x, **told).nats
    assert got.weights == "those under 'ema.' in x.safetensors (averaged, EMA)"
