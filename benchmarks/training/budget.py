"""Bits on the whole test set after training with the defaults for a budget of CPU time.

    python benchmarks/training/budget.py DATA --minutes 30 [--out RUN] [--calls 4]
        [--json out.json]

DATA is what `nelbo train` takes: an .npz of images, a text. Nothing is tuned to it: the steps are
those that fit into the budget, by the rate of the first few; all else is the preset. The budget is
of CPU time of the process, all threads together, validations included; on a busy machine, whose
caches and memory others use too, less fits into it. The test set is measured once, at the end,
with the weights of the best validation, of more than 64 levels without control variates. A run
that exists already is continued to its last step, or only measured.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import nelbo
from nelbo import data
from nelbo.runs import config as run_config
from nelbo.runs.pace import VALIDATIONS, pace
from nelbo.training.presets import MANY_LEVELS, configure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--minutes", type=float, default=30.0, help="of CPU time, for training")
    parser.add_argument("--out", type=Path, default=Path("runs/budget"))
    parser.add_argument("--calls", type=int, default=4, help="network calls per test example")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    started = time.process_time()
    if run_config.is_run(asked.out):
        run = nelbo.resume(asked.out, progress=sys.stderr.isatty())
    else:
        dataset = data.load(asked.data)
        preset = configure(dataset.schema, len(dataset.splits["train"]))
        steps = pace(*preset, dataset, 60 * asked.minutes, clock=time.process_time)
        options = {"steps": steps, "evaluate_every": steps // VALIDATIONS}
        run = nelbo.train(asked.data, asked.out, progress=sys.stderr.isatty(), **options)
    trained = time.process_time() - started
    x = run.examples()
    few = (run.config.schema.levels or 0) <= MANY_LEVELS
    result = nelbo.evaluate(run.model, x, calls=asked.calls, variates=few)
    measured = time.process_time() - started - trained
    report = {
        "data": Path(asked.data).name,
        "examples": result.examples,
        "bits_per_dim": result.bits_per_dim,
        "standard_error": result.standard_error.total,
        "monte_carlo_error": result.standard_error.monte_carlo,
        "steps": run.config.train.steps,
        "batch": run.config.train.batch,
        "cpu_seconds_of_training": round(trained),
        "cpu_seconds_of_measuring": round(measured),
        "validation": [(e["step"], round(e["validation"], 4)) for e in run.metrics],
        "config": run.config.model.to_dict(),
    }
    if run.config.schema.alphabet is not None and result.bits_per_dim is not None:
        report["perplexity"] = 2**result.bits_per_dim
    text = json.dumps(report, indent=2)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
