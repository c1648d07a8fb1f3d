"""A network of the user's own is trained, saved, continued and measured as any other."""

import copy
import shutil

import numpy as np
import pytest
import torch
from support.runs import assert_same_run, killed_after
from torch import nn

import nelbo
from nelbo.cli import main
from nelbo.data import load
from nelbo.nn.mlp import MLP
from nelbo.report.reproduce import train_command
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

SMALL = {"steps": 4, "batch": 16, "evaluate_every": 2}


class Net(nn.Module):
    """Takes z and the log-SNR of vectors, or of images, flat; draws dropout while it trains."""

    def __init__(self, shape=(6,), outputs=1, conditions=0, width=8):
        super().__init__()
        self.shape, self.outputs = shape, outputs
        size = int(np.prod(shape))
        self.layers = nn.Sequential(
            nn.Linear(size + 1 + conditions, width),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Linear(width, size * outputs),
        )

    def forward(self, z, log_snr, condition=None):
        given = [] if condition is None else [condition]
        output = self.layers(torch.cat([z.flatten(1), log_snr[:, None] / 10, *given], 1))
        return output.reshape(len(z), *self.shape, *[self.outputs][: self.outputs > 1])


def rows(count=60, levels=3):
    return np.random.default_rng(0).integers(0, levels, (count, 6)).astype(np.uint8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run; do not change it, copy it."""
    return nelbo.train(rows(), tmp_path_factory.mktemp("own") / "run", network=Net, **SMALL)


def test_it_is_measured_and_drawn_as_any_other(whole):
    run = nelbo.load(whole.path, network=Net)
    assert run.config.model.head == "noise" and run.config.model.network == "custom"
    assert run.evaluate(calls=8).nats == whole.evaluate(calls=8).nats
    assert run.sample(3, steps=2).shape == (3, 6)
    call = train_command(run)
    assert call.startswith("nelbo.train('") and "network=module, " in call and "width" not in call


@pytest.mark.parametrize("head", ["velocity", "levels"])
def test_it_is_trained_as_a_network_of_ours_is(head, tmp_path):
    """To the bit, if it is the same."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MLP((6,), 1, 3 if head == "levels" else 1, 8, 1, 0.1)

        def forward(self, z, log_snr):
            return self.network(z, -log_snr)

    options = {"lr": 0.01, "dropout": 0.1, "head": head, **SMALL}
    ours = nelbo.train(rows(), tmp_path / "ours", network="mlp", width=8, depth=1, **options)
    del options["dropout"]
    own = nelbo.train(rows(), tmp_path / "own", network=Same, **options)
    assert own.evaluate(calls=8).nats == ours.evaluate(calls=8).nats
    assert own.metrics[-1]["validation"] == ours.metrics[-1]["validation"]


@pytest.mark.parametrize("head", ["noise", "data", "velocity", "levels"])
def test_the_bounds_of_all_examples_add_up_to_at_most_one(head, tmp_path):
    net = Net((2,), 3 if head == "levels" else 1)
    x = np.random.default_rng(0).integers(0, 3, (60, 2)) // 2 * 2
    run = nelbo.train(x, tmp_path / "run", network=net, head=head, **SMALL)
    every = np.stack(np.meshgrid(range(3), range(3)), -1).reshape(-1, 2)
    found = run.elbo(every, calls=400)
    total, error = found.elbo.exp().sum(), (found.elbo.exp() * found.standard_error).norm()
    assert 0 < total < 1 + 4 * error


@pytest.mark.parametrize("way", ["function", "module"])
def test_continued_to_the_bit(way, tmp_path):
    """A module is left as it is, and its initial weights are those that are trained."""
    module = Net()
    network, before = (Net if way == "function" else module), copy.deepcopy(module.state_dict())
    data = str(tmp_path / "x.npy")
    np.save(data, rows())
    whole = nelbo.train(data, tmp_path / "whole", network=network, **SMALL)
    with killed_after(3):
        nelbo.train(data, tmp_path / "part", network=network, **SMALL)
    part = nelbo.resume(tmp_path / "part", network=Net)  # its weights are those of the state
    assert_same_run(whole.path, part.path)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    if way == "module":
        other = nelbo.train(data, tmp_path / "other", network=Net(), **SMALL)
        assert other.evaluate(calls=8).nats != whole.evaluate(calls=8).nats


def test_its_average_is_the_moving_average():
    data, options = (
        load(rows()),
        {"network": "custom", "ema": 0.15, "warmup": 1, "lr": 0.05, **SMALL},
    )
    model, train = configure(data.schema, 48, **options)
    trainer = Trainer(model, train, data, network=Net)
    name = "network.network.layers.0.weight"
    wanted = None
    for step in range(3):
        trainer.step()
        now = trainer.model.state_dict()[name].clone()
        decay = min(0.15, (1 + step) / (10 + step))
        wanted = now if wanted is None else decay * wanted + (1 - decay) * now
    found = trainer.average.state_dict()[name]
    assert torch.allclose(found, wanted, atol=1e-7) and not torch.allclose(found, now, atol=1e-5)


def test_no_file_brings_it(whole, capsys):
    path = str(whole.path)
    for call in (nelbo.load, nelbo.resume, nelbo.evaluate, nelbo.sample):
        with pytest.raises(ValueError, match=r"a module of your own.*nelbo\.load\('.*', network="):
            call(path)
    for line in (["evaluate", path], ["train", "--resume", path], ["report", path]):
        with pytest.raises(SystemExit):
            main(line)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "which a run does not store: give it in Python" in error
    with pytest.raises(SystemExit):
        main(["train", "digits", "--out", path + "-2", "--network", "custom"])
    assert "module of your own" in capsys.readouterr().err
    assert not (whole.path.parent / "run-2").exists()


@pytest.mark.parametrize("call", [nelbo.load, nelbo.resume])
def test_another_network_is_refused(call, whole, tmp_path):
    path = shutil.copytree(whole.path, tmp_path / "run")
    files = {p: p.read_bytes() for p in path.rglob("*.*s*") if p.is_file()}
    other = "the network given is not the one that was trained"
    for network in (Net(width=9), nn.Sequential(Net()), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=other if call is nelbo.load else "network"):
            call(path, network=network)
    assert files == {p: p.read_bytes() for p in path.rglob("*.*s*") if p.is_file()}


def test_a_network_is_not_for_a_run_that_has_one(trained):
    with pytest.raises(ValueError, match=r"the network of .* is nelbo's own, conv"):
        nelbo.load(trained, network=Net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": lambda: None}, "which returned NoneType"),
        ({"network": nn.Flatten}, "the network Flatten has no weights to train"),
        ({"network": Net((5,))}, r"failed on z \(2, 6\), log_snr \(2,\).*forward\(z, log_snr\)"),
        ({"network": Net(outputs=2)}, r"must give \(2, 6\) for EpsPrediction; got \(2, 6, 2\)"),
        ({"network": Net, "width": 8}, "width is for nelbo's own networks"),
        ({"network": Net, "preset": "best"}, "the preset best is for nelbo's own networks"),
        ({"network": Net, "process": "absorbing", "head": "symbols"}, "the process gaussian"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        nelbo.train(rows(), tmp_path / "run", **SMALL, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_network_is_told_the_log_snr_and_the_condition(tmp_path):
    calls = []

    class Spy(Net):
        def forward(self, z, log_snr, condition=None):
            calls.append((log_snr.detach(), condition))
            return super().forward(z, log_snr, condition)

    data = {"x": rows(), "y": np.arange(60) % 4}
    run = nelbo.train(
        data, tmp_path / "run", network=Spy(conditions=5), condition=["class"], **SMALL
    )
    assert all(condition.shape == (len(level), 5) for level, condition in calls)
    seen = torch.cat([condition for _, condition in calls])[:, 1:]
    assert set(seen.sum(1).tolist()) == {0.0, 1.0}  # some labels are dropped
    calls.clear()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    run.model.predict(torch.zeros(2, 6), t, torch.zeros(2, 5))
    assert torch.allclose(calls[0][0], -run.model.process.schedule(t).float())
    assert calls[0][0].tolist() == [7.0, -6.0]
    assert run.evaluate(calls=8).given == "class" and run.sample(2, steps=2, condition=3).size


def test_the_logits_of_an_image_may_be_channels(tmp_path):
    x = np.random.default_rng(0).integers(0, 3, (40, 3, 5, 6)).astype(np.uint8)

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 9, 3, padding=1)

        def forward(self, z, log_snr):
            return self.layer(z)

    run = nelbo.train(x, tmp_path / "run", network=Channels, head="levels", **SMALL)
    z, level = torch.randn(2, 3, 5, 6), torch.zeros(2)
    flat, found = run.model.network.network(z, level), run.model.network(z, level)
    assert found.shape == (2, 3, 5, 6, 3)
    assert torch.equal(found[:, 1, :, :, 2], flat[:, 5])


def unet(**options):
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        **options,
    )


def test_a_unet_of_diffusers(tmp_path):
    """Its times are 0..1000 over the range of gamma, its last class is no label."""
    x = np.random.default_rng(0).integers(0, 5, (40, 4, 4)).astype(np.uint8)
    labels = {"x": x, "y": np.arange(40) % 3}
    run = nelbo.train(
        labels,
        tmp_path / "run",
        network=lambda: unet(num_class_embeds=4),
        condition=["class"],
        **SMALL,
    )
    times, network = [], run.model.network.network
    network.network.register_forward_hook(
        lambda _, inputs, given, output: times.append((inputs[1], given["class_labels"])),
        with_kwargs=True,
    )
    z, t = torch.zeros(3, 1, 4, 4), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    condition = torch.zeros(3, 4)
    condition[0, 1] = condition[2, 3] = 1
    run.model.predict(z, t, condition)
    assert times[0][0].tolist() == [0, 500, 1000] and times[0][1].tolist() == [0, 3, 2]
    again = nelbo.load(run.path, network=unet(num_class_embeds=4))
    assert again.evaluate(calls=8).nats == run.evaluate(calls=8).nats
    assert again.sample(2, steps=2, condition=1).shape == (2, 4, 4)
    for made, message in (
        (unet(), r"must have num_class_embeds=4, for 3 classes, and one more for no label"),
        (unet(time_embedding_type="fourier"), "time_embedding_type='positional'"),
    ):
        with pytest.raises(ValueError, match=message):
            nelbo.train(labels, tmp_path / "no", network=made, condition=["class"], **SMALL)
    with pytest.raises(ValueError, match="no input for augmentation"):
        nelbo.train(x, tmp_path / "no", network=unet(), augment=0.5, **SMALL)


def test_a_table_has_a_network_of_its_own(tmp_path):
    pl = pytest.importorskip("polars")
    with pytest.raises(ValueError, match="a table takes nelbo's own network"):
        nelbo.train(pl.DataFrame({"a": range(40)}), tmp_path / "run", network=Net, **SMALL)


def test_fine_tuned(whole, tmp_path):
    from nelbo.runs.finetune import fine_tune

    tuned = fine_tune(whole.path, 2, tmp_path / "tuned", steps=2, network=Net)
    assert tuned.evaluate(steps=2, calls=8).steps == 2
