"""Price of the bound of a token model beside a bare loop of its network and a cross-entropy.

    python benchmarks/evaluation/tokens.py [--vocabulary 126464] [--length 1024] [--calls 6]
        [--device cuda] [--json out.json]

Two networks: one of negligible cost (a table of logits that it returns), and one of real cost (an
embedding of width 512, a layer of self-attention, a projection onto the vocabulary). The bare loop
masks each token with probability t, t in strata, calls the network and takes the cross-entropy of
the masked tokens; ours is `nelbo.evaluate` of the same text with as many calls, without control
variates. Each measurement is a process of its own; memory is the peak of the resident set above
that before the model is made. `forward` is the network alone. Ratios are of one run:
time ours/loop <= 1.1 (CPU time of the process, so that a busy machine does not matter; the clock's
on a GPU), memory ours/forward <= 1.2.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import nelbo
from nelbo.integrations import wrap_tokens

KINDS, WAYS = ("negligible", "real"), ("forward", "loop", "ours")
NAMES = "vocabulary", "length", "calls"


class Negligible(nn.Module):
    """The same logits for any text; copied, as a network would make them anew."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(1, 1, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.repeat(*ids.shape, 1)


class Real(nn.Module):
    """An embedding, a layer of self-attention, and a projection onto the vocabulary."""

    def __init__(self, vocabulary: int, width: int = 512) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.layer(self.embed(ids)))
        return found


def peak(device: str) -> float:
    """Return the peak of the resident set, or of the memory of a GPU, in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock(device: str) -> float:
    """Return the CPU seconds of this process, or the time at which a GPU has ended its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(
    kind: str, way: str, vocabulary: int, length: int, calls: int, device: str
) -> dict[str, float]:
    """Return seconds per call, tokens per second, and MiB, of one way to use one network."""
    torch.manual_seed(0)
    evaluate = nelbo.evaluate  # imported on first use, which is no memory of a measurement
    before, mask = peak(device), vocabulary - 1
    module = (Negligible if kind == "negligible" else Real)(vocabulary).eval().to(device)
    ids = torch.randint(0, vocabulary - 1, (1, length), device=device)
    model = wrap_tokens(module, mask, length=length) if way == "ours" else None
    with torch.no_grad():
        module(ids)  # warm
        begun = clock(device)
        if way == "forward":
            for _ in range(calls):
                module(ids)
        elif way == "loop":
            for i in range(calls):
                share = (i + torch.rand((), device=device)) / calls
                hidden = torch.rand(ids.shape, device=device) < share
                logits = module(torch.where(hidden, mask, ids))
                nn.functional.cross_entropy(logits[hidden], ids[hidden], reduction="sum") / share
        else:
            assert model is not None
            found = evaluate(model, ids, calls=calls, variates=False)
            calls = round(found.calls_per_example)
        seconds = (clock(device) - begun) / calls
    rate = {"seconds": seconds, "tokens_per_second": length / seconds}
    return rate | {"MiB": peak(device) - before, "calls": calls}


def main() -> None:
    """Measure every way in a process of its own, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=126464)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a vocabulary of 64, 16 tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.small:
        given.vocabulary, given.length = 64, 16
    sizes = given.vocabulary, given.length, given.calls
    if given.one:
        print(json.dumps(measure(*given.one, *sizes, given.device)))
        return
    rows = {}
    for kind in KINDS:
        for way in WAYS:
            size = [f"--{n}={v}" for n, v in zip(NAMES, sizes, strict=True)]
            on = ["--device", given.device]
            command = [sys.executable, __file__, *size, *on, "--one", kind, way]
            rows[kind, way] = json.loads(subprocess.check_output(command))
            print(f"{kind:11}{way:9}", rows[kind, way], flush=True)
        forward, loop, ours = (rows[kind, way] for way in WAYS)
        print(
            f"{kind:11} time ours/loop {ours['seconds'] / loop['seconds']:.3f}, memory"
            f" ours/forward {ours['MiB'] / forward['MiB']:.3f}, loop/forward"
            f" {loop['MiB'] / forward['MiB']:.3f}"
        )
    if given.json:
        given.json.write_text(json.dumps({" ".join(k): v for k, v in rows.items()}, indent=2))


if __name__ == "__main__":
    main()
