"""Several processes on this machine, as torchrun starts them, but without its agent; and those in
which `nelbo.data.tabular.decoded` decodes a table."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from nelbo.data.tabular import decoded

TESTS = Path(__file__).parents[1]
SECONDS = 120  # that a process may take
LATE = 10**6  # in place of an exit code
USED: list[float] = []  # seconds of CPU of the processes that ended

# Forks a child for each line that it reads, which is as a new process but for these imports: it
# has its own environment, arguments and output, and ends as Python ends.
PARENT = """
import gc, importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()  # else each child copies the memory of all that was imported, to look for garbage
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        for number, (path, mode) in enumerate(
            [(request["in"], os.O_RDONLY), *((path, os.O_WRONLY) for path in request["out"])]
        ):
            os.dup2(os.open(path, mode), number)
        code, *sys.argv[1:] = request["command"]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        break
    print(child, flush=True)
    _, status, used = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""
# what training imports, with a fit and an optimiser; and what decodes
TRAINING = ("nelbo.cli", "nelbo.runs.train", "sklearn.mixture", "torch._dynamo")
DECODING = ("polars",)


class Ended(NamedTuple):
    """Exit code and output of a process."""

    code: int
    out: str | bytes
    err: str | bytes


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
            own = {k: str(v) for k, v in address.items()} | {"RANK": str(rank)}
            own = os.environ | _paths() | own | {"LOCAL_RANK": str(rank)} | env
            parent = _parent(rank, TRAINING)
            started.append((parent, _start(parent, command, own, out), out))
        codes = [_wait(parent, child) for parent, child, _ in started]
        ends = zip(codes, started, strict=True)
        return [Ended(code, *(path.read_text() for path in out)) for code, (*_, out) in ends]


def decoding(script: str, asked: bytes, env: Mapping[str, str], seconds: float) -> Ended:
    """Run a script that decodes what is asked; return bytes, and LATE where it took so long."""
    with TemporaryDirectory() as folder:
        given, *out = (Path(folder) / name for name in ("in", "out", "err"))
        given.write_bytes(asked)
        parent = _parent(0, DECODING)
        child = _start(parent, [script], env, out, given)
        return Ended(_wait(parent, child, seconds), *(path.read_bytes() for path in out))


@contextmanager
def forked_decoders():
    """Inside, a table is decoded by a process that is forked after the import of polars."""
    usual = [sys.executable, "-P", str(decoded.DECODER)]
    script = decoded.DECODER.read_text()

    def run(command, input, capture_output, timeout, env):
        if command != usual:
            return subprocess.run(
                command, input=input, capture_output=capture_output, timeout=timeout, env=env
            )
        ended = decoding(script, input, env, timeout)
        if ended.code == LATE:
            raise subprocess.TimeoutExpired(command, timeout, ended.out, ended.err)
        return subprocess.CompletedProcess(command, ended.code, ended.out, ended.err)

    own = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "subprocess", own)
        yield


def seconds_of_forked() -> float:
    """Return the seconds of CPU of all forked processes that have ended."""
    return sum(USED)


def _start(
    parent: subprocess.Popen,
    command: list[str],
    env: Mapping[str, str],
    out: list[Path],
    asked: str | Path = os.devnull,
) -> int:
    for path in out:
        path.touch()
    request = {
        "command": command,
        "cwd": os.getcwd(),
        "env": dict(env),
        "in": str(asked),
        "out": [str(path) for path in out],
    }
    print(json.dumps(request), file=parent.stdin, flush=True)
    return int(parent.stdout.readline())


def _wait(parent: subprocess.Popen, child: int, seconds: float = SECONDS) -> int:
    """Return the exit code of a child, LATE if it was killed for its time."""
    ended = []

    def end():
        ended.append(LATE)
        os.kill(child, signal.SIGKILL)

    late = Timer(seconds, end)
    late.start()
    try:
        code, used = parent.stdout.readline().split()
    except BaseException:  # an alarm; the next answer is that of another child
        os.kill(child, signal.SIGKILL)
        parent.stdout.readline()
        raise
    finally:
        late.cancel()
    USED.append(float(used))
    return LATE if ended else int(code)


@cache
def _parent(rank: int, modules: tuple[str, ...]) -> subprocess.Popen:
    """Start the parent of a rank: each has its own, so that they differ in the order of sets."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PARENT, *modules]
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
