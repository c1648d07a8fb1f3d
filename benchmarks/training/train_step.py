"""Cost of a training step of nelbo against a bare loop: same network, loss inlined, AdamW.

    python benchmarks/training/train_step.py [--rounds 30] [--threads 2] [--json out.json]

Both take the steps of preset auto on digits, in turn, in one process. The bare loop draws a batch,
a time (for a sixteenth of it that of the reconstruction, as nelbo does) and noise, calls the
network once, adds the evidence of the levels, takes the bound + 0.1 x cross-entropy, and steps
AdamW. It has no probability objects, no averaged weights, no checks.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nelbo import data
from nelbo.training.augmentation import augment
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer


def bare_step(learner: Trainer) -> Callable[[], None]:
    """The same step, written out."""
    t, schema = learner.config, learner.dataset.schema
    model = copy.deepcopy(learner.model).train()
    network: nn.Module = model.network
    values, log_prior = model.head.values.float(), model.head.log_prior
    x_train = learner.dataset.splits["train"].long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.lr, weight_decay=t.weight_decay)
    low, high, dims = -7.0, 6.0, model.dims

    def predict(x: Tensor, gamma: Tensor, moved: Tensor) -> Tensor:
        alpha, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        shape = (-1, 1, 1, 1)
        signal, sigma = alpha.sqrt().reshape(shape), noise.sqrt().reshape(shape)
        z = signal * values[x] + sigma * torch.randn(x.shape)
        logits = network(z, gamma, moved[:, None]) + log_prior
        evidence = -0.5 * ((z[..., None] - signal[..., None] * values) / sigma[..., None]) ** 2
        return logits + evidence

    def step() -> None:
        x = x_train[torch.randint(len(x_train), (t.batch,))]
        x, moved = augment(x, t.augment, schema)
        first = t.batch // 16
        u = (torch.randperm(t.batch - first) + torch.rand(t.batch - first)) / (t.batch - first)
        gamma = low + (high - low) * torch.cat([torch.zeros(first), u])
        logits = predict(x, gamma, moved)
        x_hat = logits.softmax(-1) @ values
        error = (values[x] - x_hat).square().flatten(1).sum(1)
        diffusion = 0.5 * (high - low) * ((-gamma).exp() * error)[first:].mean()
        entropy = cross_entropy(logits.movedim(-1, 1), x, reduction="none").flatten(1).sum(1)
        loss = diffusion + entropy[:first].mean() + t.cross_entropy * entropy.mean()
        optimizer.zero_grad()
        (loss / (dims * math.log(2))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = data.load("digits")
    model, train = configure(dataset.schema, len(dataset.splits["train"]))
    learner = Trainer(model, train, dataset)
    steps = {"bare loop": bare_step(learner), "nelbo": learner.step}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(options.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [n / b for n, b in zip(seconds["nelbo"], seconds["bare loop"], strict=True)]
    ratio = statistics.median(ratios)
    spread = statistics.stdev(ratios) * 1.2533 / math.sqrt(len(ratios))
    for name, value in median.items():
        print(f"{name:10} {1000 * value:8.1f} ms per step (median of {options.rounds})")
    print(f"ratio      {ratio:8.3f} ± {spread:.3f} (median of the ratios of neighbouring steps)")
    if options.json:
        result = {"ms": {k: 1000 * v for k, v in median.items()}, "ratio": ratio, "error": spread}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
