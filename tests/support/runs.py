"""Small settings of runs, what ends them and evaluations early, and when two runs are the same."""

from contextlib import contextmanager

import pytest
import torch

from nelbo._utils import tensor_files
from nelbo.runs import config as run_config
from nelbo.training.trainer import Trainer

TINY = {"steps": 4, "batch": 16, "width": 8, "depth": 1, "evaluate_every": 2}


#: flags of a small network of OpenAI's
OPENAI = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
    "num_heads": 2,
    "learn_sigma": True,
    "diffusion_steps": 10,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}


class Killed(BaseException):
    """An end that no handler of errors is meant for, as by SIGKILL."""


@contextmanager
def killed_after(last):
    """Inside, a training ends by being killed after this step."""
    step = Trainer.step

    def some(self):
        if self.at.step == last:
            raise Killed
        step(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", some)
        yield


class StoppedError(Exception):
    """The end of an evaluation at a call of the network."""


def stopping(model, calls):
    """Let the network of a model stop after some calls."""
    left = [calls]

    def hook(*args):
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    return model.network.register_forward_hook(hook)


def assert_same_run(a, b):
    """Bit for bit, but for the clock."""
    for name in (run_config.WEIGHTS, run_config.STATE):
        (left, about_left), (right, about_right) = (
            tensor_files.read_tensors(p / name) for p in (a, b)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left), name
        if name == run_config.WEIGHTS:
            assert about_left == about_right
            assert (a / name).read_bytes() == (b / name).read_bytes()
    events = [run_config.read_metrics(p) for p in (a, b)]
    for event in (*events[0], *events[1]):
        del event["seconds"]
    assert events[0] == events[1]
