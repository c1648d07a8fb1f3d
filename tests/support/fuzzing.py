"""Valid files of every kind, what damages them, and what must come of reading what is left.

A `Kind` makes one small file and reads one. A damaged file has two good outcomes: a result, the
right one where the file has a checksum, or an error that the command line tells in one sentence.
All else is a failure: another exception, a warning, a number that is none, a read that takes long.
"""

import copy
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from hypothesis import strategies as st
from PIL import Image
from support import known_models
from support.runs import OPENAI

from nelbo._utils import files, tensor_files
from nelbo._utils.numerics import seeded
from nelbo.codec import files as codec_files
from nelbo.codec.api import compress, decompress
from nelbo.codec.errors import CodecError
from nelbo.codec.format import container
from nelbo.codec.settings import Settings
from nelbo.data import as_examples, load
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.allocation import Strata
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.evaluation.evaluate import evaluate
from nelbo.integrations import load as load_foreign
from nelbo.integrations.openai import architecture, check_flags
from nelbo.integrations.openai_unet import UNet
from nelbo.report.sections import training as show_training
from nelbo.runs import config as run_config
from nelbo.runs import pilot_cache
from nelbo.runs.grids import _times
from nelbo.runs.loading import load as load_run

#: seconds of CPU that a read of a small file may take, and seconds in all on a busy machine
SECONDS, WAIT = 20, 600
#: what the command line tells in one sentence
TOLD = (ValueError, OSError)
FLAGS = OPENAI | {"channel_mult": "1"}  # a small file
PILOT = {
    "probability": [0.25, 0.75],
    "within": [[], []],
    "between": [[2.0], [3.0]],
    "left": [1, 2],
}
#: codes like numbers, words for nothing, commas of thousands, one value in several spellings
CELLS = "code,word,amount,flag,year\n" + "".join(
    f'00{i % 7},{("NA", "None", "?", "x")[i % 4]},"1,{250 + i}",{("True", "true", "1.0")[i % 3]},'
    f"{1990 + i % 9}_{i % 4}\n"
    for i in range(40)
)
SCHEMA = [{"name": "a", "kind": "rounded", "precision": 1}, {"name": "b", "kind": "category"}]


@dataclass(frozen=True)
class Kind:
    """Functions that make and read a file of one kind.

    Args:
        name: of the file.
        content: of a valid one.
        read: the file, and all that reading it lazily leaves for later.
        json: whether its values are replaced too.
        beside: files that it needs, by their names.
    """

    name: str
    content: bytes
    read: Callable[[Path], object]
    json: bool = False
    beside: tuple[tuple[str, bytes], ...] = ()


class TimeoutExceededError(Exception):
    """No error that a reader tells."""


# ---- damage

BYTES = st.sampled_from(
    [b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80", b"\0\0\0\0", b"-", b"9" * 9]
)
ODD = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 3, 1000, 2**31, 10**9, 2**63, 10**30, 0.5, -0.5, 1e-300),
        *(1e308, -1e308, float("nan"), float("inf"), "", "x", "\0", "1", "é" * 100),
        *([], {}, [[]], [1], ["a", "a"], [0, 0], [-1, 8, 8], [10**9] * 3, {"a": 1}),
    ]
)


@st.composite
def damaged(draw: st.DrawFn, kind: Kind) -> bytes:
    """The content after some edits: of values where it is JSON, else of bytes."""
    if kind.json and draw(st.integers(0, 3)):
        lines = kind.content.decode().splitlines() if kind.name.endswith("l") else None
        documents = [json.loads(line) for line in lines or [kind.content]]
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(documents) - 1))
            documents[place] = _other(draw, documents[place])
        return "\n".join(map(json.dumps, documents)).encode()
    bad = bytearray(kind.content)
    if kind.name.endswith(".png") and draw(st.booleans()):
        _claim(draw, bad)
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.integers(0, len(bad))) for _ in range(2))
        match draw(st.integers(0, 7)):
            case 0 | 1 if bad:
                bad[min(a, len(bad) - 1)] ^= 1 << draw(st.integers(0, 7))
            case 2:
                bad[a : a + 4] = draw(st.binary(min_size=4, max_size=4))
            case 3:
                found = draw(BYTES)
                bad[a : a + len(found)] = found
            case 4:
                bad[a:a] = draw(st.binary(min_size=1, max_size=9))
            case 5:
                del bad[a : min(b, a + draw(st.sampled_from([1, 4, 64])))]
            case 6:
                del bad[a:]
            case _:
                bad = bad[:a] + bad[b:] + bad[a:b]
    return bytes(bad)


def _claim(draw: st.DrawFn, png: bytearray) -> None:
    """Another header of a PNG, with its right checksum: sizes, bits, colours, interlacing."""
    sides = st.sampled_from([0, 1, 5, 6, 7, 8, 100, 4000, 9000, 2**31 - 1])
    bits, colour = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([0, 2, 3, 4, 6]))
    png[16:29] = struct.pack(
        ">IIBBBBB", draw(sides), draw(sides), bits, colour, 0, 0, draw(st.integers(0, 1))
    )
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))


def _other(draw: st.DrawFn, document: object) -> object:
    """A document of which a value is another, is gone, or is one that was not there."""
    document = copy.deepcopy(document)
    node, steps = document, draw(st.integers(1, 5))
    for step in range(steps):
        if not isinstance(node, dict | list) or not node:
            return draw(ODD)
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        below = node[key]
        if step < steps - 1 and isinstance(below, dict | list) and below:
            node = below
            continue
        match draw(st.integers(0, 7)):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node["other"] = below
            case 2 if isinstance(below, int) and not isinstance(below, bool):
                node[key] = below + draw(st.sampled_from([-1, 1, 10**6]))
            case _:
                node[key] = draw(ODD)
        break
    return document


# ---- what comes of it


@contextmanager
def alarm(seconds: int):
    """`TimeoutExceededError` after so many seconds of CPU, also of processes that ended meanwhile;
    or after WAIT seconds: what hangs, fails."""

    def ring(number, frame):
        raise TimeoutExceededError(f"not done in {seconds} s of CPU, or {WAIT} s")

    before = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    others = sum(os.times()[2:4])
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(WAIT)
    try:
        yield
        if sum(os.times()[2:4]) - others > seconds:
            ring(signal.SIGPROF, None)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(kind: Kind, content: bytes, folder: Path) -> str:
    """ "read" or "refused"; raises what is neither."""
    folder.mkdir(exist_ok=True)
    path = folder / kind.name
    path.write_bytes(content)
    for name, other in kind.beside:
        (folder / name).write_bytes(other)
    try:
        with alarm(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "the schedule ends with signal left")
            kind.read(path)
        return "read"
    except TOLD as error:
        assert str(error).strip(), f"{kind.name}: an error without a word"
        return "refused"


# ---- kinds


def kinds(run: Path) -> list[Kind]:
    """All kinds of file that nelbo reads; those of a run from the one at `run`."""
    return [*_data(), *_of_run(run), *_foreign(), *_compressed()]


def _whole(path: Path) -> None:
    found = load(path)
    for x in found.splits.values():
        as_examples(x[:])


def _data() -> list[Kind]:
    with seeded(0):
        x = torch.randint(4, (12, 1, 5, 7), dtype=torch.uint8).numpy()
    y = np.arange(12) % 3
    frame = pl.DataFrame(
        {"a": list(range(12)), "b": ["x", "y", None] * 4, "c": [i / 7 for i in range(12)]}
    )
    return [
        Kind("x.npy", _made(lambda f: np.save(f, x)), _whole),
        Kind("x.npz", _made(lambda f: np.savez_compressed(f, x=x, y=y)), _labelled),
        Kind("x-images-idx3-ubyte", _idx(x[:, 0]), _whole),
        Kind("x-images-idx3-ubyte.gz", gzip.compress(_idx(x[:, 0]), mtime=0), _whole),
        Kind("x.csv", frame.write_csv().encode(), _whole),
        Kind("x.tsv", frame.write_csv(separator="\t").encode(), _whole),
        Kind("cells.csv", CELLS.encode(), _whole),
        Kind("x.parquet", _made(frame.write_parquet), _whole),
        Kind("x.arrow", _made(frame.write_ipc), _whole),
        Kind("x.tar", _tar(x), _labelled),
        # some hundred times as large as their bytes
        Kind("sparse.npz", _made(lambda f: np.savez_compressed(f, x=_sparse())), _whole),
        Kind("sparse.parquet", _made(_repeating().write_parquet), _whole),
        Kind("sparse.arrow", _made(_repeating_ipc), _whole),
        Kind("heads.tar", _heads(x), _whole),
        Kind("x.txt", "the quick brown fox, é; ".encode() * 100, _whole),
        Kind("x.png", _image(x[0, 0], "PNG"), _folder),
        Kind("x.jpg", _image(np.kron(x[0, 0], np.full((4, 4), 60, np.uint8)), "JPEG"), _folder),
        Kind(
            "schema.json",
            json.dumps(SCHEMA).encode(),
            lambda path: load(path.with_name("x.csv"), schema=path),
            json=True,
            beside=(("x.csv", frame.write_csv().encode()),),
        ),
    ]


def _labelled(path: Path) -> None:
    load(path, condition=["class"])


def _folder(path: Path) -> None:
    folder = path.with_suffix(".images")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i in range(4):
        shutil.copy(path, folder / f"{i}{path.suffix}")
    _whole(folder)


def _made(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _image(x: np.ndarray, kind: str) -> bytes:
    return _made(lambda f: Image.fromarray(x).save(f, kind))


def _idx(x: np.ndarray) -> bytes:
    return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes()


def _sparse() -> np.ndarray:
    x = np.zeros((100, 1, 64, 64), np.uint8)
    x[::3, :, 5] = 1
    return x


def _repeating() -> pl.DataFrame:
    """A text of a mebibyte, whole numbers and reals in runs."""
    rows = np.arange(3000)
    text = ["x" * 2**20, *("y" for _ in rows[1:])]
    return pl.DataFrame({"a": rows // 1000, "b": rows // 900 / 7, "c": text})


def _repeating_ipc(file: io.BytesIO) -> None:
    _repeating().write_ipc(file, compression="zstd")


def _heads(x: np.ndarray) -> bytes:
    """Names and comments in headers of their own, of PAX and of GNU's tar."""

    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for i, image in enumerate(x):
                content = _image(image[0], "PNG")
                member = tarfile.TarInfo(f"{'d' * 150}/{i:04d}.png")
                member.size, member.pax_headers = len(content), {"comment": "c" * 600}
                tar.format = tarfile.PAX_FORMAT if i % 2 else tarfile.GNU_FORMAT
                tar.addfile(member, io.BytesIO(content))

    return _made(write)


def _tar(x: np.ndarray) -> bytes:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for i, image in enumerate(x):
                for end, content in ((".png", _image(image[0], "PNG")), (".cls", b"%d" % (i % 3))):
                    member = tarfile.TarInfo(f"{i:04d}{'é' * (i == 3)}{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    return _made(write)


def _of_run(run: Path) -> list[Kind]:
    whole = {name: (run / name).read_bytes() for name in ("config.json", "model.safetensors")}
    state, metrics = ((run / n).read_bytes() for n in (run_config.STATE, run_config.METRICS))
    grids = json.dumps({"abc, 2 steps": [0.5, 1.0]}).encode()
    whole_run = load_run(run)
    tensors, about = tensor_files.read_tensors(run / "model.safetensors")

    def measure(path: Path) -> None:
        """Examples read from a file are numbers."""
        run = load_run(path.parent)
        kind = torch.float64 if run.config.schema.density else torch.long
        x = torch.zeros(4, *run.model.shape, dtype=kind)
        found = evaluate(run.model, x, calls=4)
        assert math.isfinite(found.nats), f"{found.nats} nats"

    strata = Strata(TimeGrid.uniform(2))
    nothing = ControlVariates(whole_run.model, None, strata.edges)

    def keep(path: Path) -> None:
        found = pilot_cache._proposal(files.kept(path).get("a"), strata, nothing)
        assert found is None or abs(found.probability.sum() - 1) < 1e-6

    def times(path: Path) -> None:
        for found in files.kept(path).values():
            _times(found, 2, 0.0)

    at = 8 + int.from_bytes(whole["model.safetensors"][:8], "little")
    heading = whole["model.safetensors"][8:at]

    def put_heading(path: Path) -> None:
        other = path.read_bytes()
        file = path.with_name("model.safetensors")
        file.write_bytes(struct.pack("<Q", len(other)) + other + whole[file.name][at:])
        measure(file)

    def exact(path: Path) -> None:
        got, words = tensor_files.read_tensors(path, hashed=True)
        assert words == about and got.keys() == tensors.keys()
        assert all(torch.equal(got[name], tensors[name]) for name in tensors)

    def show(path: Path) -> None:
        class Shown:
            model = whole_run.model
            metrics = run_config.read_metrics(path.parent)
            config = run_config.read_config(run)
            weights = "ema, step 2"

        assert not re.search(r"\bnan\b", show_training(Shown, "bits/dim").lower())

    return [
        Kind("config.json", whole["config.json"], measure, True, tuple(whole.items())[1:]),
        Kind("model.safetensors", whole["model.safetensors"], exact),
        # with the right length, as one writes it who means harm
        Kind("heading.json", heading, put_heading, True, (("config.json", whole["config.json"]),)),
        Kind("state.safetensors", state, lambda p: tensor_files.read_tensors(p, hashed=True)),
        Kind("metrics.jsonl", metrics, show, True),
        Kind("grids.json", grids, times, True),
        Kind("pilots.json", json.dumps({"a": PILOT}).encode(), keep, True),
    ]


def _foreign() -> list[Kind]:
    with seeded(0):
        network = UNet(architecture(check_flags(FLAGS)))
    weights = _made(lambda f: torch.save(network.state_dict(), f))
    flags = json.dumps(FLAGS).encode()

    def weigh(path: Path) -> None:
        load_foreign(f"openai:{path}", steps=2)

    def configure(path: Path) -> None:
        load_foreign(f"openai:{path.with_suffix('.pt')}", steps=2)

    return [
        Kind("net.pt", weights, weigh, beside=(("net.json", flags),)),
        Kind("net.json", flags, configure, True, beside=(("net.pt", weights),)),
    ]


def _compressed() -> list[Kind]:
    known = known_models.levels().model
    with seeded(0):
        x = torch.randint(4, (40, *known.shape))
    content = compress(known, x, Settings((0.5, 1.0)), block=20)

    def read(path: Path) -> None:
        data = path.read_bytes()
        try:
            assert torch.equal(decompress(data, known).x.long(), x)
        finally:
            try:
                decompress(data, known, salvage=True)
                codec_files.report(data)
            except CodecError:
                pass

    header, extra, at = container.read_prefix(content)

    def read_header(path: Path) -> None:
        other = json.loads(path.read_text())
        data = container.write_prefix(other, extra) + content[at:]
        try:
            decompress(data, known, salvage=True)
        finally:
            codec_files.report(data)

    return [
        Kind("x.nlb", content, read),
        # with the right checksum, as one writes it who means harm
        Kind("header.json", json.dumps(header).encode(), read_header, json=True),
    ]
