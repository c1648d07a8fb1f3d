"""Share of a measurement's CPU time for its pilot and control variates, where no pilot is kept.

    python benchmarks/evaluation/pilot_share.py [--side 32] [--width 40] [--depth 4] [--images 200]

A few convolutions stand for a network; their width and number set the price of a row. The images
are smooth noise of 256 levels, the steps 1000, the calls 24 per image. Times are of the CPU, on
one thread, so other programs change them little.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

import nelbo
from nelbo import TimeGrid
from nelbo.evaluation import control_variates, time_estimator
from nelbo.evaluation.evaluate import evaluate


class Convolutions(nn.Module):
    """Residual convolutions; what they compute does not matter."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((3, width), (width, 3)))
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))

    def forward(self, y: Tensor, time: Tensor) -> Tensor:
        h = self.first(y)
        for layer in self.inner:
            h = h + silu(layer(h))
        return 0.5 * y + 0.01 * self.last(h)


class Clock:
    """Seconds of CPU inside functions, the outermost alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inside = False

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to that of a name."""

        def timed(*args: object, **options: object) -> object:
            if self.inside:
                return function(*args, **options)
            self.inside, begun = True, time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.inside = False
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - begun

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("side", 32), ("width", 40), ("depth", 4), ("images", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # on the signal that is left
    torch.manual_seed(0)
    side, count = options.side, options.images
    x = interpolate(
        256 * torch.rand(count, 3, side // 8, side // 8), (side, side), mode="bilinear"
    )
    x = (x + 3 * torch.randn_like(x)).clamp(0, 255).round().long()
    network = Convolutions(options.width, options.depth)
    betas = torch.linspace(1e-4, 0.02, 1000)
    model = nelbo.wrap(network, (3, side, side), predicts="noise", betas=betas)
    clock, controls = Clock(), control_variates.ControlVariates
    for name in ("__init__", "within", "between"):
        setattr(controls, name, clock.around("variates", getattr(controls, name)))
    time_estimator._operations = clock.around("variates", time_estimator._operations)
    time_estimator.pilot = clock.around("pilot", time_estimator.pilot)
    begun = time.process_time()
    result = evaluate(model, x, times=TimeGrid.uniform(1000), calls=24)
    total = time.process_time() - begun
    with torch.no_grad():
        y, begun = x[:16].float(), time.process_time()
        network(y, y)
        row = (time.process_time() - begun) / 16
    shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in clock.spent.items())
    print(f"{count} of {side}x{side}x3, {1000 * row:.2f} ms a row: {total:.1f} s, {shares}")
    process = sum(clock.spent.values()) / time.process_time()
    print(f"both {process:.1%} of the process, which imports torch")
    print("; ".join(result.notes))


if __name__ == "__main__":
    main()
