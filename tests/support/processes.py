"""Several processes on this machine, as torchrun starts them, but without its agent."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]


class Ended(NamedTuple):
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def launch(command: list[str], processes: int, **env: str) -> list[Ended]:
    """Run a command of Python in `processes` processes; return their ends, in order of rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    paths = os.pathsep.join([str(TESTS), *sys.path])
    for rank in range(processes):
        places = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        own = {key: str(value) for key, value in (places | address).items()}
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | own | {"PYTHONPATH": paths} | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(p.returncode, *said) for p, said in zip(started, printed, strict=True)]
