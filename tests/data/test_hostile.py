"""Untrusted files: none executes code, is believed for its sizes, or is read for ever."""

import ast
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import nelbo_fails
from support.files import png
from support.fuzzing import FLAGS, alarm

import nelbo
from nelbo._utils import files, limits
from nelbo._utils.numerics import seeded
from nelbo._utils.tensor_files import read_tensors, write_tensors
from nelbo.data import load
from nelbo.integrations import load as load_foreign
from nelbo.integrations.openai import architecture, check_flags
from nelbo.integrations.openai_unet import UNet
from nelbo.runs import config as run_config
from nelbo.runs.loading import load as load_run
from nelbo.runs.train import resume

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
ROOM = 2**30  # bytes beyond what the process has, in which a refusal must fit


@pytest.fixture(autouse=True)
def _in_time():
    with alarm(120):
        yield


@contextmanager
def little_memory():
    """No allocation beyond `ROOM` succeeds, not even one that is never touched."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(read, words, path):
    """The read is refused with one sentence of these words, in little memory."""
    with pytest.raises((ValueError, OSError), match=words) as error, little_memory():
        read(path)
    assert "MemoryError" not in str(error.value)
    return str(error.value)


def copied(trained, tmp_path, **changes):
    """A copy of the run whose configuration has other values, under "section.key"."""
    run = shutil.copytree(trained, tmp_path / "run")
    document = json.loads((run / "config.json").read_text())
    for place, value in changes.items():
        *sections, key = place.split("__")
        node = document
        for section in sections:
            node = node[section]
        node[key] = value
    (run / "config.json").write_text(json.dumps(document))
    return run


# ---- code


class Boom:
    """Unpickled, it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_file_executes_code(trained, tmp_path):
    """A pickle, and a zip of one as torch.save writes it, under the name of every kind."""
    mark = tmp_path / "executed"
    zipped = io.BytesIO()
    torch.save({"x": Boom(mark)}, zipped)
    member = io.BytesIO()
    with zipfile.ZipFile(member, "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Boom(mark)))
    objects = io.BytesIO()
    np.save(objects, np.array([Boom(mark)], dtype=object), allow_pickle=True)
    harmful = (pickle.dumps(Boom(mark)), zipped.getvalue(), member.getvalue(), objects.getvalue())
    pickle.loads(harmful[0])
    assert mark.exists(), "the attack is one"
    mark.unlink()

    names = ("x.npy", "x.npz", "x-images-idx3-ubyte", "x.csv", "x.parquet", "x.arrow", "x.tar")
    run = shutil.copytree(trained, tmp_path / "run")
    network = tmp_path / "net"
    network.with_suffix(".json").write_text(json.dumps(FLAGS))
    for i, content in enumerate(harmful):
        readers = [(tmp_path / name, load) for name in (*names, "x.txt")]
        readers += [(tmp_path / str(i) / "x.png", lambda path: load(path.parent))]
        readers += [
            (network.with_suffix(end), lambda path: load_foreign(f"openai:{path}"))
            for end in (".pt", ".safetensors")
        ]
        for path, read in readers:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            with pytest.raises((ValueError, OSError)):
                read(path)
        for name in (
            "model.safetensors",
            "grids.json",
            "pilots.json",
            "metrics.jsonl",
            "config.json",
        ):
            (run / name).write_bytes(content)
        for name in ("state.safetensors", "model.safetensors"):
            (run / name).write_bytes(content)
            with pytest.raises(ValueError):
                read_tensors(run / name)
        with pytest.raises(ValueError):
            load_run(run)
        assert files.kept(run / "grids.json") == {}
        assert files.kept(run / "pilots.json") == {}
        assert run_config.read_metrics(run) == []
        shutil.copy(trained / "config.json", run)
    assert not mark.exists()


def test_the_source_has_nothing_that_executes_a_file():
    """No pickle, eval or exec; torch.load and np.load only without objects."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy"}
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    for path in Path(nelbo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), list(map(ast.unparse, node.keywords))
                assert called not in ("eval", "exec", "compile", "__import__"), path
                assert called not in safe or safe[called] in given, path
                if called == "npy.read_array":
                    assert "allow_pickle=False" in given, path
                continue
            else:
                continue
            assert not names & forbidden, path


def test_names_in_a_run_are_no_html(trained, tmp_path):
    from nelbo.report.reproduce import again

    code = "<script>alert(1)</script>"
    page = again(nelbo.load(copied(trained, tmp_path, preset=code, data__source=code)), 0)
    assert "<script" not in page and page.count("&lt;script&gt;alert") >= 2


def test_a_name_with_codes_of_a_terminal_is_printed_without(tmp_path, capsys):
    line = nelbo_fails(capsys, "inspect", tmp_path / "\x1b[2J\x1b]0;x\x07")
    assert "\x1b" not in line and "\x07" not in line


# ---- sizes that are claimed


def npy_header(shape, kind="<f8"):
    file = io.BytesIO()
    about = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def npz(path, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("x.npy", "w") as member:
        for piece in content:
            member.write(piece)


def lying_npz(path):
    npz(path, [npy_header((10**9,)), bytes(80)])


def lying_directory(path, size=4_000_000_000, shape=(10**9,), method=zipfile.ZIP_DEFLATED):
    """The zip's directory too says that there are 4 GB, in a few packed bytes."""
    npz(path, [npy_header(shape, "|u1"), bytes(80)], method)
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\x01\x02") + 24
    whole[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(whole)


def bomb_npz(path):
    """4 GB in a few bytes of bz2, of which nothing says how many there are."""
    lying_directory(path, shape=(4 * 10**9 - 128,), method=zipfile.ZIP_BZIP2)


def long_header(path):
    npz(path, [b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31), *[bytes(2**22)] * 16])


def bomb_gz(path):
    sizes = np.array([2**12, 2**10, 2**10], ">u4").tobytes()
    zeros = gzip.compress(bytes(2**22))
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + sizes) + zeros * 1024)


def lying_idx(path):
    path.write_bytes(b"\0\0\x0e\x03" + np.array([2**31] * 3, ">u4").tobytes() + bytes(99))


def lying_tar(path):
    """A header of a long name of 10^12 bytes."""
    member = tarfile.TarInfo("././@LongLink")
    member.type = tarfile.GNUTYPE_LONGNAME
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = bytes([0x80]) + (10**12).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(bytes(head) + bytes(4096))


def tar_that_goes_back(path):
    """A member of negative size, after which tarfile reads the same again."""
    member = tarfile.TarInfo("0.png")
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"\xff" * 10 + (2**16 - 512).to_bytes(2, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(bytes(head) + bytes(4096))


def chained_tar(path):
    """Headers of headers of headers."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2
    path.write_bytes((member.tobuf(tarfile.GNU_FORMAT) + b"a\0" + bytes(510)) * 5000)


def deep_json(path):
    path.write_text('{"columns": ' * 100_000)


def huge_json(path):
    with path.open("wb") as file:
        file.truncate(2**40)


def lying_tensors(path):
    head = {"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def endless_header(path):
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")


def huge_png(path):
    path.parent.mkdir(exist_ok=True)
    made = io.BytesIO()
    Image.new("L", (1, 1)).save(made, "PNG")
    content = bytearray(made.getvalue())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def sparse_png(path):
    huge_png(path)
    with path.open("ab") as file:
        file.truncate(2**40)


def one_line(path):
    path.write_bytes(b"a,b\n" + b"9" * 2**22 + b",1\n")


def sparse_csv(path):
    with path.open("wb") as file:
        file.write(b"a,b\n")
        file.truncate(2**40)


def of_folder(path):
    return load(path.parent)


@linux
@pytest.mark.parametrize(
    ("name", "write", "read", "words"),
    [
        ("x.npz", lying_npz, load, "its header says .* 8000000000 bytes, and 80 follow"),
        ("x.npz", lying_directory, load, "x.npy claims 4000000000 bytes in"),
        ("x.npz", bomb_npz, load, "would be unpacked from .* to 3.73 GiB"),
        ("x.npz", long_header, load, "header is far too long"),
        ("x-idx3-ubyte.gz", bomb_gz, load, "would be unpacked from .* to 4 GiB"),
        ("x-idx3-ubyte", lying_idx, load, "it holds fewer"),
        ("x.tar", lying_tar, load, "cannot be read as a tar file"),
        ("x.tar", tar_that_goes_back, load, "cannot be read as a tar file"),
        ("x.tar", chained_tar, load, "cannot be read as a tar file"),
        ("x.json", deep_json, limits.read_json, "is not JSON"),
        ("x.json", huge_json, limits.read_json, "has 1099511627776 bytes, more than"),
        ("x.safetensors", lying_tensors, read_tensors, "is truncated, damaged or not"),
        ("x.safetensors", endless_header, read_tensors, "is truncated, damaged or not"),
        ("x.safetensors", huge_json, read_tensors, "would take 2.05e"),
        ("images/x.png", huge_png, of_folder, "claims more than .* pixels"),
        ("images/x.png", sparse_png, of_folder, "1099511627776 bytes, too many for an image"),
        ("x.txt", huge_json, load, "of memory"),
        ("x.csv", sparse_csv, load, "of memory"),
        ("x.csv", one_line, load, "not a row of text: field larger than field limit"),
    ],
)
def test_what_a_file_claims_is_not_believed(tmp_path, name, write, read, words):
    write(tmp_path / name)
    assert "\n" not in refused(read, words, tmp_path / name)


def test_large_data_that_are_there_still_load(tmp_path):
    """Highly compressed is not too highly compressed: 16 MiB of zeros in 17 KB."""
    x = np.zeros((2**12, 2**12), np.uint8)
    x[0, 0] = 1
    np.savez_compressed(tmp_path / "x.npz", x=x)
    assert (tmp_path / "x.npz").stat().st_size < 2**15
    assert load(tmp_path / "x.npz").schema.levels == 2


def test_the_environment_lifts_the_limits_of_size(monkeypatch):
    with pytest.raises(ValueError, match=r"would take 9.31e\+20 GiB .*NELBO_TRUST_FILES=1"):
        limits.check_memory(1e30, "it")
    monkeypatch.setenv(limits.TRUST, "1")
    limits.check_memory(1e30, "it")


@linux
@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model__width", 10**9),
        ("model__width", 10**30),
        ("model__width", 8000),
        ("model__depth", 10**9),
        ("model__members", 10**9),
        ("data__schema__levels", 10**9),
        ("data__schema__levels", 10**12),
        ("data__schema__shape", [1, 10**5, 10**5]),
        ("data__schema__shape", [10**9, 8, 8]),
    ],
)
def test_a_configuration_of_giants_is_refused(trained, tmp_path, place, value):
    run = copied(trained, tmp_path, **{place: value})
    refused(
        nelbo.load, r"belongs to another architecture|at most 1e\+12|of memory that are free", run
    )


@linux
def test_many_levels_take_no_square_of_memory():
    """Nor do the ends of the scale take a matrix of which two rows are kept."""
    from nelbo.diffusion.parametrization import LevelCurves

    with little_memory():
        LevelCurves(torch.linspace(-1, 1, 2**15), (1,))


@linux
@pytest.mark.parametrize("network", ["conv", "mlp", "transformer", "unet"])
def test_a_network_that_memory_cannot_hold_is_refused_before_it_is_made(network):
    from nelbo.data import Schema
    from nelbo.models.build import build
    from nelbo.models.config import ModelConfig

    for sizes in ({"width": 2**16}, {"width": 10**12}, {"width": 32, "depth": 10**9}):
        if "depth" in sizes and network != "mlp":
            continue  # it takes seconds
        with pytest.raises(ValueError, match="of memory that are free"), little_memory():
            build(ModelConfig(network=network, **sizes), Schema("levels", (1, 16, 16), 4))


@linux
@pytest.mark.parametrize(
    "change",
    [
        {"num_channels": 32 * 10**6},
        {"num_channels": 32 * 10**3},
        {"num_res_blocks": 10**6},
        {"diffusion_steps": 10**9},
        {"image_size": 10**7, "channel_mult": "1", "attention_resolutions": "0"},
        {"num_head_channels": 0},
    ],
)
def test_flags_of_giants_are_refused(tmp_path, change):
    with seeded(0):
        torch.save(UNet(architecture(check_flags(FLAGS))).state_dict(), tmp_path / "net.pt")
    (tmp_path / "net.json").write_text(json.dumps(FLAGS | change))
    words = (
        "another architecture|no model|must be at most|steps must|attention_resolutions|positive"
    )
    refused(lambda path: load_foreign(f"openai:{path}", steps=2), words, tmp_path / "net.pt")


# ---- what is read


def pipe(path):
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


def endless(path):
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/dev/zero")


@linux
@pytest.mark.parametrize("make", [pipe, endless])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        *((f"x.{end}", load) for end in ("npy", "npz", "csv", "parquet", "arrow", "tar", "txt")),
        ("x-images-idx3-ubyte", load),
        ("images/train-images-idx3-ubyte.gz", of_folder),
        ("images/x.tar", of_folder),
        ("x.json", limits.read_json),
        ("x.safetensors", read_tensors),
        ("x.pt", lambda path: load_foreign(f"openai:{path}")),
    ],
)
def test_a_pipe_and_a_device_are_not_waited_for(tmp_path, name, read, make):
    make(tmp_path / name)
    (tmp_path / "x.json").exists() or (tmp_path / "x.json").write_text(json.dumps(FLAGS))
    words = "a pipe, a socket or a device|there is no file|has no images"
    refused(read, words, tmp_path / name)


@linux
@pytest.mark.parametrize(
    "source", ["/etc/passwd", "/dev/zero", "/dev/stdin", "PIPE", "", "\0", "x" * 5000, "/proc"]
)
def test_a_run_names_its_data_and_they_must_be_those(trained, tmp_path, capsys, source):
    """Whatever a run names: it is read as data or not at all, and used if its hash is right."""
    pipe(tmp_path / "pipe.npy")
    run = copied(trained, tmp_path, data__source=source.replace("PIPE", f"{tmp_path}/pipe.npy"))
    line = nelbo_fails(capsys, "evaluate", run)
    assert "root:" not in line


def test_data_that_a_run_names_are_used_only_if_they_are_its_own(
    trained, tmp_path, capsys, monkeypatch
):
    with seeded(3):
        x = torch.randint(17, (40, 1, 8, 8), dtype=torch.uint8)
    np.save(tmp_path / "private.npy", x.numpy())
    run = copied(trained, tmp_path, data__source=str(tmp_path / "private.npy"))
    assert "are not read" in nelbo_fails(capsys, "evaluate", run)
    monkeypatch.setenv(limits.TRUST, "1")
    assert "changed since the run was trained" in nelbo_fails(capsys, "evaluate", run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.jsonl"])
def test_links_out_of_a_run_are_not_followed(trained, tmp_path, monkeypatch, name):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / name).rename(tmp_path / name)
    (run / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=r"is a link to .*, outside"):
        nelbo.load(run)
    monkeypatch.setenv(limits.TRUST, "1")
    nelbo.load(run)


@pytest.mark.parametrize(
    "name", ["state.safetensors", "before.safetensors", ".lock", "tensorboard"]
)
def test_training_does_not_go_on_through_a_link_out_of_a_run(trained, tmp_path, monkeypatch, name):
    run, mine = shutil.copytree(trained, tmp_path / "run"), tmp_path / "mine"
    shutil.copy(run / "state.safetensors", run / "before.safetensors")  # as while it is trained
    (run / name).rename(mine)
    (run / name).symlink_to(mine)
    before = {path: path.stat().st_mtime_ns for path in (mine, *mine.rglob("*"))}
    with pytest.raises(ValueError, match=f"{name} is a link to .*, outside"):
        resume(run)
    assert {path: path.stat().st_mtime_ns for path in (mine, *mine.rglob("*"))} == before
    if name != ".lock":  # which filelock follows in some versions
        monkeypatch.setenv(limits.TRUST, "1")
        resume(run)


def test_a_table_in_a_run_is_no_link_either(trained, tmp_path):
    run = copied(trained, tmp_path, data__source="data.parquet")
    (run / run_config.TABLE).symlink_to(__file__)
    with pytest.raises(ValueError, match=r"is a link to .*, outside"):
        run_config.read_config(run)


def test_a_link_within_a_run_and_one_to_a_run_are_followed(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "model.safetensors").rename(run / "weights")
    (run / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(run)
    nelbo.load(tmp_path / "link")


def test_writing_into_a_run_never_follows_a_link(trained, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("grids.json", "model.safetensors"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine)
        files.write(run / name, b"other")
    assert mine.read_text() == "mine"


# ---- folders


def test_a_folder_is_searched_as_long_as_images_are_found(tmp_path, monkeypatch, capsys):
    """As of `/`: the search ends early, whatever lies deeper."""
    disk = tmp_path / "disk"
    for i in range(40):
        (disk / f"{i:02}").mkdir(parents=True)
        for j in range(25):
            (disk / f"{i:02}" / f"{j}.o").touch()
    for i in range(5):
        Image.new("L", (8, 8)).save(disk / f"{i}.png")
    visited, walk = [], os.walk
    monkeypatch.setattr(
        os, "walk", lambda top, **how: map(lambda x: visited.append(x) or x, walk(top, **how))
    )
    monkeypatch.setattr(limits, "OTHERS", 500)
    assert re.search(
        "holds 5 images among the first 5.. files; give a folder of them",
        nelbo_fails(capsys, "inspect", disk),
    )
    assert len({place for place, _, _ in visited}) == 22  # of 41
    monkeypatch.setenv(limits.TRUST, "1")
    load(disk, levels=2)
    monkeypatch.delenv(limits.TRUST)
    for i in range(80):  # of other files 8 for each
        Image.new("L", (8, 8)).save(disk / f"{i}.png")
    load(disk, levels=2)


# ---- values


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_what_is_no_number_is_no_json(trained, tmp_path, number):
    (tmp_path / "x.json").write_text(f'{{"a": {number}}}')
    with pytest.raises(ValueError, match="is not JSON"):
        limits.read_json(tmp_path / "x.json")


def test_events_that_are_none_are_left_out(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    whole = run_config.read_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        error = {"validation_standard_error": [[]]}
        for change in ({"step": "3"}, {"step": 10**400}, {"validation": None}, {"lr": []}, error):
            file.write(json.dumps(whole[0] | change) + "\n")
        file.write("[" * 100_000 + "\n")
    assert whole and run_config.read_metrics(run) == whole


def test_weights_of_another_kind_are_not_cast(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    tensors = load_file(run / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name].to(torch.complex64)
    write_tensors(run / "model.safetensors", tensors, {})
    with pytest.raises(ValueError, match="complex64"):
        nelbo.load(run)


def test_a_table_of_many_columns_is_not_compared_pair_by_pair(tmp_path):
    from nelbo.data.tabular import tables

    pytest.importorskip("polars")
    names = ",".join(f"c{i}" for i in range(20_000))
    (tmp_path / "x.csv").write_text(f"{names}\n{','.join('1' * 20_000)}\n")
    with alarm(60):
        assert tables.read(tmp_path / "x.csv").width == 20_000


# ---- what fuzzing found


@pytest.mark.parametrize("alphabet", [True, 1, ["a", []], {"a": 1}])
def test_an_alphabet_is_a_text(trained, tmp_path, alphabet):
    run = copied(trained, tmp_path, data__schema__alphabet=alphabet)
    with pytest.raises(ValueError, match="alphabet must be a string"):
        run_config.read_config(run)


def test_a_column_of_one_number_written_in_two_ways():
    from nelbo.data.tabular.inference import lattice

    assert lattice(np.array([0.25])) == 0.01


def test_quotes_within_cells_are_told(tmp_path):
    pytest.importorskip("polars")
    rows = "".join(f"{i},x,0.5\n" for i in range(9))
    (tmp_path / "x.csv").write_text(f'a,b,c\n1,y,0.14"85\n{rows}')
    with pytest.raises(ValueError, match=r"x\.csv"):
        load(tmp_path / "x.csv")


def test_a_panic_of_polars_is_one_sentence(tmp_path, capfd):
    pl = pytest.importorskip("polars")
    from nelbo.data.tabular import tables

    def panic():
        os.write(2, b"thread panicked at ..\n")
        raise pl.exceptions.PanicException("index out of bounds")

    def speak():
        os.write(2, b"spoken\n")
        return pl.DataFrame()

    with pytest.raises(ValueError, match="cannot be read as a table: index out of bounds"):
        tables.of_file(tmp_path / "x.parquet", panic)
    assert "panicked" not in capfd.readouterr().err
    tables.of_file(tmp_path / "x.parquet", speak)
    assert capfd.readouterr().err == "spoken\n"


@pytest.mark.parametrize("name", ["PanicException", "ComputeError"])
def test_what_polars_says_of_a_text_table_is_one_sentence(tmp_path, monkeypatch, name):
    pl = pytest.importorskip("polars")

    def fail(*args, **options):
        raise getattr(pl.exceptions, name)("index out of bounds")

    monkeypatch.setattr(pl, "read_csv", fail)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x.csv cannot be read as a table: index out of bounds"):
        load(tmp_path / "x.csv")


@linux
def test_a_container_that_claims_examples_is_not_believed():
    """A salvage marks which examples are lost: of 10^12 that are claimed, none is marked."""
    pytest.importorskip("constriction")
    from support import known_models

    from nelbo.codec.api import compress, decompress
    from nelbo.codec.errors import CorruptFileError
    from nelbo.codec.format import container
    from nelbo.codec.settings import Settings

    model = known_models.levels().model
    x = torch.zeros((4, *model.shape), dtype=torch.int64)
    data = compress(model, x, Settings((1.0,)))
    header, extra, at = container.read_prefix(data)
    for claimed, words in ((10**12, "would be unpacked from"), (-1, "at least 0; got -1")):
        other = container.write_prefix(header | {"examples": claimed}, extra) + data[at:]
        with pytest.raises((ValueError, CorruptFileError), match=words):
            decompress(other, model, salvage=True)


@linux
def test_a_container_that_claims_arrays_is_not_believed(tmp_path):
    """Data beside the examples are packed by xz, of which a few bytes can be gigabytes."""
    from nelbo.codec.coding.blocks import pack
    from nelbo.codec.format.contents import _arrays_as_bytes

    about = {"kind": "npz", "arrays": [["y", "<f8", [10**12], None]]}
    with pytest.raises(ValueError, match=r"would be unpacked from .* to 7.45e\+03 GiB"):
        _arrays_as_bytes(np.zeros((1, 2)), about, pack(bytes(99)), None)
    about = {"kind": "npz", "arrays": [["x", "|O", [1, 2], "same"]]}
    with pytest.raises(ValueError, match="are integers"):
        _arrays_as_bytes(np.zeros((1, 2)), about, b"", None)


# ---- few bytes that become many


def images(folder, *contents):
    folder.mkdir()
    for i, content in enumerate(contents):
        (folder / f"{i}.png").write_bytes(content)
    return folder


@linux
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(9400, 9400, 16, 0, bytes(4)), "claims 9400x9400 pixels, which 12 bytes cannot hold"),
        (png(9400, 9400, 16, 6, bytes(4)), "claims 9400x9400 pixels"),
        (png(9400, 9400, 8, 6, bytes(40_000)), "claims 9400x9400 pixels"),
        (
            png(580, 580, 8, 2, bytes(1_000_000)),
            "it is truncated: 1000000 of 1009780 bytes of pixels",
        ),
        (png(8, 8, 8, 0, bytes(27)), "it is truncated: 27 of 72 bytes of pixels"),
        (png(5, 7, 8, 0, bytes(44), interlaced=1), "it is truncated: 44 of 49 bytes of pixels"),
        (png(8, 8, 8, 3, bytes(72)), "it has no palette"),
    ],
)
def test_an_image_without_all_its_pixels_is_refused(tmp_path, content, words):
    line = refused(load, words, images(tmp_path / "images", *[content] * 12))
    assert "0.png cannot be read as an image" in line


def test_whole_images_of_every_kind_are_read(tmp_path):
    """Rows of one bit, palettes and interlaced images are as long as their kind says."""
    with seeded(5):
        x = torch.randint(256, (13, 11, 3), dtype=torch.uint8).numpy()
    for kind in ("1", "L", "P", "RGB", "RGBA"):
        made = io.BytesIO()
        Image.fromarray(x).convert(kind).save(made, "PNG")
        folder = images(tmp_path / kind, *[made.getvalue()] * 11)
        if kind == "L":  # two passes of one pixel each
            (folder / "0.png").write_bytes(png(11, 13, 8, 0, bytes(range(1, 13)) * 13))
        assert load(folder).splits["train"].shape[2:] == (13, 11)
    small = png(2, 1, 8, 0, bytes([0, 1, 0, 2]), interlaced=1)
    big = png(2, 1, 8, 0, bytes([0, 3, 4]))
    found = load(images(tmp_path / "interlaced", *[small, big] * 6))
    assert found.splits["train"].unique().tolist() == [1, 2, 3, 4]


def test_images_that_few_bytes_hold_are_read_in_turn(tmp_path, monkeypatch):
    """A folder of black images is one, and is not kept in memory."""
    monkeypatch.setattr(limits, "UNPACKED", 2**20)
    content = png(200, 200, 8, 6, bytes(200 * 801))
    found = load(images(tmp_path / "images", *[content] * 12), levels=256)
    assert any("read again each time" in note for note in found.notes)
    assert found.splits["train"][0].sum() == 0


def stored_thrice(path):
    """Three arrays of 100 MB in 300 kB, of which each alone is what deflate holds."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val", "test"):
            with archive.open(f"x_{split}.npy", "w") as member:
                member.write(npy_header((100, 1000, 1000), "|u1"))
                for _ in range(100):
                    member.write(bytes(10**6))


def test_arrays_are_counted_together(tmp_path):
    stored_thrice(tmp_path / "x.npz")
    refused(load, "would be unpacked from .* to 0.279 GiB", tmp_path / "x.npz")


def test_a_reader_needs_more_memory_than_its_file_has(tmp_path, monkeypatch):
    """Each by its own factor, before it reads."""
    np.save(tmp_path / "x.npy", np.zeros(10**5, np.uint8))
    (tmp_path / "x.csv").write_text("a,b\n" + "1,2\n" * 25_000)
    (tmp_path / "x.txt").write_text("x y " * 25_000)
    for name, times in (("x.npy", 3), ("x.csv", 24), ("x.txt", 18)):
        size = times * 10**5
        monkeypatch.setattr(limits, "free_memory", lambda most=size - 1: most)
        with pytest.raises(ValueError, match="would take"):
            load(tmp_path / name)


@linux
@pytest.mark.parametrize("repeat", ["strided", "packed", "sparse"])
def test_weights_that_repeat_a_number_are_refused(tmp_path, repeat):
    (tmp_path / "net.json").write_text(json.dumps(FLAGS))
    path = tmp_path / "net.pt"
    if repeat == "sparse":
        torch.save({"x": torch.eye(4).to_sparse()}, path)
    else:
        x = torch.zeros(1).expand(10**9) if repeat == "strided" else torch.zeros(10**6)
        torch.save({"x": x}, path)
    if repeat == "packed":
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
    words = (
        "torch.save does not compress"
        if repeat == "packed"
        else "repeats its numbers or is sparse"
    )
    refused(lambda path: load_foreign(f"openai:{path}"), words, path)


@linux
def test_the_heading_of_tensors_is_not_longer_than_any(tmp_path):
    head = b'{"__metadata__": {"about": "' + b"x" * 2**24 + b'"}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    refused(read_tensors, "the header of .* has", tmp_path / "x.safetensors")


def compressed():
    """A model, a whole file of zeros, and its header, extra and blocks."""
    pytest.importorskip("constriction")
    from support import known_models

    from nelbo.codec.api import compress
    from nelbo.codec.format import container
    from nelbo.codec.settings import Settings

    model = known_models.levels().model
    data = compress(model, torch.zeros((4, *model.shape), dtype=torch.int64), Settings((1.0,)))
    header, extra, at = container.read_prefix(data)
    return model, data, header, extra, at


@linux
@pytest.mark.parametrize("salvage", [False, True])
def test_blocks_of_few_bytes_that_hold_many_batches(salvage):
    """Each of 60 bytes, with 65535 batches of one example; for a salvage all the same ones."""
    from dataclasses import replace

    from nelbo.codec.api import decompress
    from nelbo.codec.format import container

    model, data, header, extra, at = compressed()
    block = next(container.read_blocks(data, at))
    many = [
        replace(
            block,
            first=0 if salvage else 65535 * i,
            count=65535,
            mode=0,
            seeds=0,
            sizes=(1,) * 65535,
        )
        for i in range(3)
    ]
    made = b"".join(container.write_block(each) for each in many)
    n = len(made) // 3
    body = made[:n] * 1500 if salvage else made[:n] + made[n : 2 * n]
    prefix = container.write_prefix(header | {"examples": 65535}, extra)
    whole = prefix + body
    whole += container.write_end(whole, 1500 if salvage else 2)
    words = "holds 131070 examples, not 65535"
    with little_memory():
        if salvage:
            assert not len(decompress(whole, model, salvage=True).x)
        else:
            with pytest.raises(ValueError, match=words):
                decompress(whole, model)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [[1], 1]},
        {"steps": [1, None]},
        {"ideal": ["a", 1.0]},
        {"ideal": []},
        {"answers": {"1": "x"}},
        {"versions": {"torch": []}},
        {"shape": [True, 2]},
        {"shape": [-1]},
        {"examples": 10**30},
        {"examples": True},
        {"contents": []},
        {"levels": "x" * 10**6},
    ],
)
def test_values_within_the_lists_of_a_header_are_checked(change):
    from nelbo.codec.errors import CorruptFileError
    from nelbo.codec.files import report
    from nelbo.codec.format import container

    _, data, header, extra, at = compressed()
    with pytest.raises(CorruptFileError) as error:
        report(container.write_prefix(header | change, extra) + data[at:])
    assert len(str(error.value)) < 400


def test_a_long_header_is_not_unpacked():
    from nelbo.codec.errors import CorruptFileError
    from nelbo.codec.format import container

    _, _, header, _, _ = compressed()
    text = (json.dumps(header)[:-1] + ',"z":[' + "[]," * 6 * 10**6 + "[]]}").encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=container._USUAL)
    packed = packer.compress(text) + packer.flush()
    prefix = container._PREFIX.pack(container.MAGIC, container.VERSION, len(packed), 0) + packed
    with pytest.raises(CorruptFileError):
        container.read_prefix(prefix + struct.pack("<I", zlib.crc32(prefix)))


@pytest.mark.parametrize("name", ["x" * 70_000, "\0", "a/../../b", 7, None, ["a"]])
@pytest.mark.parametrize("kind", ["npz", "images", "texts", "csv"])
def test_names_in_a_container_are_names(tmp_path, name, kind):
    from nelbo.codec.format import contents
    from nelbo.data import Schema

    about = {
        "npz": {"arrays": [[name, "|u1", [2, 1, 2, 2], "same"]]},
        "images": {"names": [name], "sizes": [[2, 4]]},
        "texts": {"names": [name], "sizes": [8]},
        "csv": {"types": {str(name): "Int64"}},
    }[kind]
    x = torch.zeros((2, 1, 2, 2), dtype=torch.uint8)
    made = contents.Contents(x, {"kind": kind, **about})
    out = tmp_path / ("out.npz" if kind == "npz" else "out.csv" if kind == "csv" else "out")
    try:
        contents.save(made, Schema("levels", (1, 2, 2), 4), out)
    except (ValueError, OSError) as error:
        assert str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert kind == "npz"


def test_an_error_is_no_longer_than_can_be_read(tmp_path, capsys):
    pytest.importorskip("polars")
    (tmp_path / "x.csv").write_text(f"a,{'b' * 60_000}\n" + f"1,2\n2,{'x' * 10**5}\n" * 12)
    (tmp_path / "schema.json").write_text(json.dumps([{"name": "c" * 10**6}]))
    line = nelbo_fails(capsys, "inspect", tmp_path / "x.csv", "--schema", tmp_path / "schema.json")
    assert len(line) < 2100 and "the schema has the column" in line


@pytest.mark.parametrize("precision", [1e-300, 5e-324, 1e-20, float("inf"), 10**400])
def test_a_precision_finer_than_numbers_is_refused(tmp_path, precision):
    pytest.importorskip("polars")
    (tmp_path / "x.csv").write_text("a,b\n" + "".join(f"{i},{i % 3}\n" for i in range(40)))
    declared = [{"name": "a", "kind": "rounded", "precision": precision}]
    text = json.dumps(declared).replace("Infinity", "1e400")
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises((ValueError, OverflowError), match=r"too fine|must be positive|not JSON"):
        load(tmp_path / "x.csv", schema=tmp_path / "schema.json")


def test_a_declared_column_without_a_value_is_told(tmp_path):
    pytest.importorskip("polars")
    (tmp_path / "x.csv").write_text("a,b\n" + "".join(f",{i % 3}\n" for i in range(40)))
    (tmp_path / "schema.json").write_text('[{"name": "a", "kind": "rounded"}, {"name": "b"}]')
    with pytest.raises(ValueError, match="column 'a' has no value in any row"):
        load(tmp_path / "x.csv", schema=tmp_path / "schema.json")


@linux
@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_rows_of_one_value_are_not_unpacked_without_end(tmp_path, end):
    """A few kilobytes say that a number and a word repeat 10 million times."""
    pl = pytest.importorskip("polars")
    from nelbo.data.tabular import tables

    path = tmp_path / f"x.{end}"
    rows = pl.LazyFrame({"a": pl.repeat(1, 10**7, dtype=pl.Int8, eager=True)}).collect()
    if end == "parquet":
        rows.with_columns(b=pl.lit("x")).write_parquet(path)
    else:
        rows.with_columns(b=pl.lit("x")).write_ipc(path, compression="zstd")
    assert path.stat().st_size < 2**19
    with pytest.raises(ValueError, match=r"would be unpacked from .* to 0.22[0-9] GiB"):
        tables.read(path)


@linux
@pytest.mark.parametrize("end", ["parquet", "arrow"])
@pytest.mark.parametrize("aborts", [False, True])
def test_a_text_of_few_bytes_is_not_unpacked_here(tmp_path, monkeypatch, end, aborts):
    """One cell of 256 MiB in a file of some kilobytes, within its limit of memory and beyond it,
    where polars ends its whole process."""
    pl = pytest.importorskip("polars")
    from nelbo.data.tabular import decoded, tables

    path = tmp_path / f"x.{end}"
    frame = pl.DataFrame({"a": [1, 2], "b": ["x" * 2**28, "y"]})
    if end == "parquet":
        frame.write_parquet(path, compression="zstd")
    else:
        frame.write_ipc(path, compression="zstd")
    del frame
    assert path.stat().st_size < 2**14
    if aborts:
        monkeypatch.setattr(decoded, "BASE", 0)
        monkeypatch.setattr(decoded, "CELLS", 1)
    monkeypatch.setattr(tables, "scan", lambda path: pytest.fail("read in this process"))
    words = "decode to more than its size" if aborts else "would be unpacked from .* 0.25 GiB"
    with pytest.raises(ValueError, match=words):
        tables.read(path)


@linux
@pytest.mark.parametrize("claimed", [2**32, 2**40])
def test_a_length_that_no_memory_holds_is_not_allocated_here(tmp_path, monkeypatch, claimed):
    """polars reports some failed allocations as errors, like other damage."""
    pl = pytest.importorskip("polars")
    from nelbo.data.tabular import tables

    path = tmp_path / "x.arrow"
    pl.DataFrame({"a": [0.5] * 5000}).write_ipc(path, compression="zstd")
    content = bytearray(path.read_bytes())
    body = content.index(b"\x28\xb5\x2f\xfd") - 8  # zstd's own sign, after the unpacked length
    # the packed length, the only number of its size
    (at,) = (i for i in range(0, body, 8) if 8 < struct.unpack_from("<q", content, i)[0] < 64)
    content[at : at + 8] = struct.pack("<q", claimed)
    path.write_bytes(content)
    monkeypatch.setattr(tables, "scan", lambda path: pytest.fail("read in this process"))
    with pytest.raises(ValueError, match="decode to more than its size"):
        tables.read(path)


@linux
def test_texts_that_rows_share_are_counted_for_each(tmp_path):
    """A dictionary of one text, 2 MiB, in a hundred rows of a folder of tables."""
    pl = pytest.importorskip("polars")
    (tmp_path / "t").mkdir()
    frame = pl.DataFrame({"a": range(100)}).with_columns(b=pl.lit("x" * 2**21))
    frame.write_parquet(tmp_path / "t" / "1.parquet")
    frame.with_columns(b=pl.lit("x")).write_parquet(tmp_path / "t" / "0.parquet")
    with pytest.raises(ValueError, match=r"1.parquet would be unpacked from .* to 0.195 GiB"):
        load(tmp_path / "t")


@pytest.mark.parametrize("program", ["/no/such/python", sys.executable])
def test_tables_are_read_where_no_other_process_can_be_had(tmp_path, monkeypatch, program):
    """A sandbox, and a Python that does not find polars."""
    pl = pytest.importorskip("polars")
    from nelbo.data.tabular import decoded, tables

    monkeypatch.setattr(decoded.sys, "executable", program)
    monkeypatch.setattr(decoded, "DECODER", tmp_path / "none.py")
    pl.DataFrame({"a": [1, 2]}).write_parquet(tmp_path / "x.parquet")
    assert tables.read(tmp_path / "x.parquet").height == 2
