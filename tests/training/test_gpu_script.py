"""The program that measures a GPU runs to its end, here with small sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "training" / "gpu.py"


@pytest.mark.slow
def test_the_program_for_a_gpu_runs_to_its_end(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--small", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["repeat"]["same bits"] and found["resume"]["same bits"]
    assert found["container"]["exact"]
    assert found["equal"]["difference, nats"] < 1e-6
    assert abs(found["shard"]["difference when sharded"]) < 1e-5
    assert found["train"]["curve"]
