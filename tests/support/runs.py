"""Small settings of runs, and when two runs are the same."""

import torch

from nelbo._utils import files
from nelbo.runs import config as run_config

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


def assert_same_run(a, b):
    """Bit for bit, but for the clock."""
    for name in (run_config.WEIGHTS, run_config.STATE):
        (left, about_left), (right, about_right) = (files.read_tensors(p / name) for p in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k]) for k in left), name
        if name == run_config.WEIGHTS:
            assert about_left == about_right
            assert (a / name).read_bytes() == (b / name).read_bytes()
    events = [run_config.read_metrics(p) for p in (a, b)]
    for event in (*events[0], *events[1]):
        del event["seconds"]
    assert events[0] == events[1]
