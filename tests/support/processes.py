"""Several processes on this machine, as torchrun starts them, but without its agent."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
SECONDS = 120  # that a process may take

# Forks a child for each line that it reads, which is as a new process but for these imports: it
# has its own environment, arguments and output, and ends as Python ends.
PARENT = """
import gc, json, os, sys
import nelbo.cli, nelbo.runs.train
import sklearn.mixture, torch._dynamo  # which a fit and an optimiser import
gc.freeze()  # else each child copies the memory of all that was imported, to look for garbage
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        for number, (path, mode) in enumerate(
            [(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY) for path in request["out"])]
        ):
            os.dup2(os.open(path, mode), number)
        code, *sys.argv[1:] = request["command"]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def launch(command: list[str], processes: int, **env: str) -> list[Ended]:
    """Run `-c SCRIPT ARGUMENT ..` in `processes` processes; return their ends by rank."""
    flag, *command = command
    assert flag == "-c"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    with TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            out = [Path(folder) / f"{name} {rank}" for name in ("out", "err")]
            for path in out:
                path.touch()
            own = {k: str(v) for k, v in address.items()} | {"RANK": str(rank)}
            request = {
                "command": command,
                "cwd": os.getcwd(),
                "env": os.environ | _paths() | own | {"LOCAL_RANK": str(rank)} | env,
                "out": [str(path) for path in out],
            }
            parent = _parent(rank)
            print(json.dumps(request), file=parent.stdin, flush=True)
            started.append((parent, int(parent.stdout.readline()), out))
        codes = [_wait(parent, child) for parent, child, _ in started]
        ends = zip(codes, started, strict=True)
        return [Ended(code, *(path.read_text() for path in out)) for code, (*_, out) in ends]


def _wait(parent: subprocess.Popen, child: int) -> int:
    late = Timer(SECONDS, os.kill, (child, signal.SIGKILL))
    late.start()
    try:
        return int(parent.stdout.readline())
    finally:
        late.cancel()


@cache
def _parent(rank: int) -> subprocess.Popen:
    """Start the parent of a rank: each has its own, so that they differ in the order of sets."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(
        command, env=os.environ | _paths(), stdin=pipe, stdout=pipe, text=True
    )
    atexit.register(_end, parent)
    return parent


def _end(parent: subprocess.Popen) -> None:
    parent.stdin.close()
    parent.stdout.close()
    parent.wait()


def _paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
