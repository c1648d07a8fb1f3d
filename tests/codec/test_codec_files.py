"""nelbo compress, decompress and inspect: data of every kind come back, or it is said why not."""

import datetime
import io
import json
import math
import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from support.codes import changed
from support.commands import run_ok
from support.files import png

from nelbo.cli import main
from nelbo.codec.api import compress, decompress
from nelbo.codec.coding.blocks import pack
from nelbo.codec.coding.codec import Codec
from nelbo.codec.errors import CodecError
from nelbo.codec.format import contents
from nelbo.codec.format.beside import equal_cells
from nelbo.codec.settings import Settings
from nelbo.data.columns import Column
from nelbo.data.schema import Schema
from nelbo.data.tabular import tables
from nelbo.data.tabular.tables import to_bytes
from nelbo.diffusion.times import TimeGrid
from nelbo.runs.loading import load as load_run

pytest.importorskip("constriction")
GRID = ("--steps", 2, "--grid", "uniform")
TINY = ("--steps", 2, "--batch", 8, "--width", 32, "--depth", 1)


def fails(capsys, code, *arguments):
    """The one line of a command that must fail with this exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == code and line.startswith("nelbo: "), line
    return line


def there_and_back(run, source, tmp_path, name):
    file, out = tmp_path / f"{name}.nlb", tmp_path / name
    run_ok("compress", run, source, "--out", file, *GRID)
    run_ok("decompress", run, file, "--out", out)
    return out


def digits(n, seed=0):
    return np.random.default_rng(seed).integers(0, 17, (n, 8, 8), dtype=np.uint8)


def same_arrays(a, b):
    a, b = np.load(a), np.load(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name])


def test_arrays_come_back_with_their_names_types_and_companions(trained, tmp_path):
    x = digits(5)
    whole = {"x_test": x.astype(np.int16), "label": np.arange(5.0), "x": x[:, None], "no": x[:0]}
    np.savez(tmp_path / "in.npz", **whole)
    same_arrays(
        tmp_path / "in.npz", there_and_back(trained, tmp_path / "in.npz", tmp_path, "a.npz")
    )
    np.save(tmp_path / "in.npy", x)
    out = there_and_back(trained, tmp_path / "in.npy", tmp_path, "a.npy")
    assert np.array_equal(np.load(out), x) and np.load(out).dtype == x.dtype


def test_arrays_of_any_name_and_type_come_back_beside_the_examples(trained, tmp_path, capsys):
    """Names that numpy's writer takes for its own, fields, and numbers beyond the levels."""
    inner = np.dtype([("low", ">i2"), ("high", "<f8", (2,))])
    fields = np.dtype({"names": ["id", "pair"], "formats": ["<i4", inner], "offsets": [0, 8]})
    rows = np.zeros(5, fields)
    rows["id"], rows["pair"]["high"] = np.arange(5), [1.5, -0.25]
    whole = {
        "x": digits(5),
        "file": np.arange(3),
        "allow_pickle": np.array("yes"),
        "a.npy": np.array([1 + 2j, np.nan]),
        "sub/name": np.array(["2020-01-31"], "M8[D]"),
        "rows": rows,
        "raw": np.array([b"abcd"], "V4"),
        "photographs": digits(2, 1).astype(np.int64) + 900,
    }
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        for name, array in whole.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    out = there_and_back(trained, tmp_path / "in.npz", tmp_path, "out.npz")
    assert "photographs" in capsys.readouterr().err
    with np.load(tmp_path / "in.npz") as before, np.load(out) as after:
        assert list(before) == list(after) == list(whole)
        for name in whole:
            assert before[name].dtype == after[name].dtype
            np.testing.assert_array_equal(before[name], after[name], strict=True)


def test_what_would_not_come_back_is_refused_before_work(trained, tmp_path, capsys):
    buffer = io.BytesIO()
    np.save(buffer, digits(2))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive, pytest.warns(UserWarning):
        for _ in range(2):
            archive.writestr("x.npy", buffer.getvalue())
    shade = Image.fromarray(digits(1)[0])
    shade.save(tmp_path / "shade.png", transparency=3)
    raw = b"".join(b"\0" + bytes(16) for _ in range(8))
    (tmp_path / "deep.png").write_bytes(png(8, 8, 16, 0, raw))
    (tmp_path / "cut.png").write_bytes(png(8, 8, 8, 0, raw[:34]))
    (tmp_path / "vast.png").write_bytes(png(10**4, 10**4, 8, 0, bytes(10**4 * (10**4 + 1))))
    for name, words in [
        ("twice.npz", "two of its arrays"),
        ("shade.png", "transparent colour"),
        ("deep.png", "of 16 bits"),
        ("cut.png", "it is truncated: 34 of 72 bytes of pixels"),
        ("vast.png", "claims more than 89478485 pixels"),
    ]:
        file = tmp_path / "no.nlb"
        line = fails(capsys, 2, "compress", trained, tmp_path / name, "--out", file, *GRID)
        assert words in line and not file.exists()


def test_single_numbers_come_back(tmp_path):
    """Which training takes as vectors of one number."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 5, 40).astype(">u2"))
    run_ok("train", tmp_path / "x.npy", "--out", tmp_path / "run", *TINY)
    out = there_and_back(tmp_path / "run", tmp_path / "x.npy", tmp_path, "out.npy")
    assert out.read_bytes() == (tmp_path / "x.npy").read_bytes()


def test_images_of_any_size_come_back_with_their_names(trained, tmp_path):
    r, folder = np.random.default_rng(1), tmp_path / "images"
    images = {"b.png": (8, 8), "a/deep/ü.png": (3, 20), "z.png": (17, 9)}
    for name, size in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(r.integers(0, 17, size, dtype=np.uint8)).save(folder / name)
    out = there_and_back(trained, folder, tmp_path, "out")
    assert {f.relative_to(out).as_posix() for f in out.rglob("*.png")} == set(images)
    for name in images:
        with Image.open(folder / name) as a, Image.open(out / name) as b:
            assert a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))
    one = there_and_back(trained, folder / "z.png", tmp_path, "one.png")
    with Image.open(folder / "z.png") as a, Image.open(one) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_photographs_come_back_as_tiles(tmp_path):
    r, folder = np.random.default_rng(2), tmp_path / "photographs"
    np.save(tmp_path / "x.npy", r.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    run_ok("train", tmp_path / "x.npy", "--out", tmp_path / "run", *TINY)
    folder.mkdir()
    for name, size in {"a.png": (19, 8), "b.png": (5, 25)}.items():
        Image.fromarray(r.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    out = there_and_back(tmp_path / "run", folder, tmp_path, "out")
    for name in ("a.png", "b.png"):
        with Image.open(folder / name) as a, Image.open(out / name) as b:
            assert a.mode == b.mode == "RGB" and np.array_equal(np.asarray(a), np.asarray(b))


def test_tables_come_back(tmp_path, capsys):
    r, path, run = random.Random(0), tmp_path / "t.csv", tmp_path / "run"
    rows = [f"{r.choice('abc')},{r.randrange(9)},{r.choice(['', 'yes', 'no'])}" for _ in range(60)]
    path.write_text("city,age,smokes\n" + "\n".join(rows) + "\n")
    run_ok("train", path, "--out", run, "--steps", 2, "--batch", 8, "--width", 16, "--depth", 1)
    out = there_and_back(run, path, tmp_path, "back.csv")
    assert out.read_bytes() == path.read_bytes()
    frame = pl.read_csv(path).select("smokes", "city", pl.col("age").cast(pl.Int16))
    frame.write_parquet(tmp_path / "t.parquet")
    out = there_and_back(run, tmp_path / "t.parquet", tmp_path, "back.parquet")
    assert pl.read_parquet(out).equals(frame) and pl.read_parquet(out).schema == frame.schema
    (tmp_path / "new.csv").write_text("city,age,smokes\na,1,yes\nd,2,no\n")
    file = tmp_path / "new.nlb"
    line = fails(capsys, 2, "compress", run, tmp_path / "new.csv", "--out", file, *GRID)
    assert "row 2" in line and "'d'" in line and "'city'" in line
    (tmp_path / "wide.csv").write_text("city,age,smokes,more\na,1,yes,2\n")
    line = fails(capsys, 2, "compress", run, tmp_path / "wide.csv", "--out", file, *GRID)
    assert "'more'" in line and not file.exists()


def mixed(n, seed=0):
    """A table of many types, of which a run leaves some columns out, with odd cells."""
    r = np.random.default_rng(seed)
    day = [datetime.date(2020, 1, 1 + int(d)) for d in r.integers(0, 28, n)]
    frame = pl.DataFrame(
        {
            "who": pl.Series([f"näme {i}" for i in range(n)], dtype=pl.String),
            "truth": r.random(n) < 0.5,
            "day": day,
            "enum": pl.Series(r.choice(["lo", "hi"], n), dtype=pl.Enum(["lo", "mid", "hi"])),
            "word": pl.Series(r.choice(["NA", "DE", "fr"], n), dtype=pl.Categorical),
            "price": pl.Series(r.choice(["1.10", "2.20"], n)).cast(pl.Decimal(10, 2)),
            "half": pl.Series(r.choice([0.5, 1.5, -0.0], n), dtype=pl.Float32),
            "hole": r.choice([0.1 + 0.2, math.nan, 1.5], n),
            "at": pl.Series(day).cast(pl.Datetime("ns", "UTC")),
            "big": pl.Series([2**63 + i for i in range(n)], dtype=pl.UInt64),
            "small": pl.Series(r.integers(0, 5, n), dtype=pl.UInt8),
        }
    )
    gaps = pl.int_range(pl.len()) % 7 == 0
    return frame.with_columns(pl.when(~gaps).then(pl.col("hole", "word", "day", "who", "truth")))


def test_a_table_of_any_types_comes_back_to_the_bit(tmp_path, capsys):
    """Types, left-out columns, NaN beside null, -0.0 beside 0, words that count as missing."""
    frame, run = mixed(80), tmp_path / "run"
    names = ("truth", "enum", "word", "price", "half", "hole", "small")
    (tmp_path / "s.json").write_text(json.dumps([{"name": name} for name in names]))
    for suffix in (".parquet", ".arrow"):
        (tmp_path / f"t{suffix}").write_bytes(to_bytes(frame, suffix))
    schema = ("--schema", tmp_path / "s.json")
    run_ok("train", tmp_path / "t.parquet", "--out", run, *TINY, *schema)
    for suffix in (".parquet", ".arrow"):
        capsys.readouterr()
        out = there_and_back(run, tmp_path / f"t{suffix}", tmp_path, f"back{suffix}")
        said = capsys.readouterr().err
        assert "the columns who, day, at, big" in said and "cells of hole" in said
        back = tables.read(out)
        assert back.schema == frame.schema
        for series in frame:
            assert equal_cells(series, back[series.name]).all(), series.name
    other = frame.with_columns(pl.lit(1).alias("more"))
    other.write_parquet(tmp_path / "more.parquet")
    file = tmp_path / "more.nlb"
    line = fails(capsys, 2, "compress", run, tmp_path / "more.parquet", "--out", file, *GRID)
    assert "'more'" in line and not file.exists()
    frame.with_columns(day=pl.Series([[1]] * 80)).write_parquet(tmp_path / "list.parquet")
    line = fails(capsys, 2, "compress", run, tmp_path / "list.parquet", "--out", file, *GRID)
    assert "'day' is of the type List" in line


def test_cells_of_text_come_back_as_they_were_written(tmp_path, capsys):
    """Spellings, spaces, words that mean missing, quotes around nothing; also after a salvage."""
    r, run = random.Random(1), tmp_path / "run"
    land, number = ["NA", "DE", " fr ", "None", ""], ["1", "1.0", "+2", "3e0", '" 1"']
    rows = [f"{i},{r.choice(land)},{r.choice(number)},{i}." for i in range(60)]
    (tmp_path / "t.csv").write_text(",land,n,id\n" + "\n".join(rows) + "\n")
    run_ok("train", tmp_path / "t.csv", "--out", run, *TINY, "--schema", declared(tmp_path))
    before = tables.read(tmp_path / "t.csv")
    out = there_and_back(run, tmp_path / "t.csv", tmp_path, "back.csv")
    assert tables.read(out).equals(before)
    file = tmp_path / "b.nlb"
    run_ok("compress", run, tmp_path / "t.csv", "--out", file, *GRID, "--block", 20)
    bad = bytearray(file.read_bytes())
    bad[-30] ^= 1
    write(tmp_path, bytes(bad))
    arguments = ("decompress", run, tmp_path / "other.nlb", "--out", tmp_path / "part.csv")
    fails(capsys, 3, *arguments, "--salvage")
    assert tables.read(tmp_path / "part.csv").equals(before[:40])


def declared(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('[{"name": "land"}, {"name": "n"}]')
    return path


@pytest.mark.parametrize(
    "about",
    [
        {"columns": [["id", 10**15]]},
        {"columns": [["id", 5]], "rows": 10**12},
        {"columns": [["id", -5]]},
        {"cells": [["id", 10**14, 3]]},
        {"cells": [["id", 3, 3]]},
        {"types": {"n": "Enum[3]"}},
        {"types": {"nothing": "String"}},
        {"columns": 3},
    ],
)
def test_headers_of_tables_that_lie_are_damage(tmp_path, about):
    schema = Schema.of_table([Column("n", "rounded", 1.0, 0.0, 5.0)])
    whole = {"kind": "csv", "types": {"n": "String", "id": "String"}, "rows": 4} | about
    made = contents.Contents(torch.ones(4, 1), whole, pack(b"\xff" * 40))
    with pytest.raises((CodecError, ValueError)) as error:
        contents.save(made, schema, tmp_path / "x.csv")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_texts_come_back_to_the_byte(tmp_path, capsys):
    folder, run = tmp_path / "texts", tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "train.txt").write_text("the cat sat on the mat.\r\n" * 20, newline="")
    (folder / "a.txt").write_bytes("\ufeffthe cät sat\r\n on".encode())
    (folder / "sub" / "b.txt").write_bytes(b"at the end\n\n")
    run_ok("train", tmp_path / "train.txt", "--out", run, "--size", 16, *TINY)
    out = there_and_back(run, folder, tmp_path, "out")
    for name in ("a.txt", "sub/b.txt"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    one = there_and_back(run, folder / "a.txt", tmp_path, "one.txt")
    assert one.read_bytes() == (folder / "a.txt").read_bytes()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    line = fails(
        capsys, 2, "compress", run, tmp_path / "latin.txt", "--out", tmp_path / "l.nlb", *GRID
    )
    assert "not UTF-8" in line
    run = tmp_path / "bytes"
    run_ok("train", tmp_path / "train.txt", "--out", run, "--size", 16, "--levels", 256, *TINY)
    one = there_and_back(run, tmp_path / "latin.txt", tmp_path, "two.txt")
    assert one.read_bytes() == b"caf\xe9"


def test_inspect(trained, tmp_path, capsys):
    np.save(tmp_path / "x.npy", digits(5))
    file = tmp_path / "x.nlb"
    run_ok("compress", trained, tmp_path / "x.npy", "--out", file, *GRID, "--effort", 2)
    capsys.readouterr()
    run_ok("inspect", file)
    shown = capsys.readouterr().out
    for words in ("5 examples", "bits/dim in all", "1 x 8 x 8", "2 steps", "effort 2", "torch"):
        assert words in shown
    run_ok("inspect", file, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["size"] == file.stat().st_size and report["header"]["examples"] == 5
    assert report["bits_per_dim"] == 8 * report["size"] / (5 * 64)
    assert "ends within its last bytes" in fails(
        capsys, 3, "inspect", write(tmp_path, file.read_bytes()[:-2])
    )


def write(tmp_path, content, name="other.nlb"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def test_bad_input(trained, tmp_path, capsys):
    np.save(tmp_path / "x.npy", digits(3))
    np.save(tmp_path / "high.npy", digits(3) + 9)
    np.save(tmp_path / "wide.npy", np.zeros((3, 9, 9), np.uint8))
    np.save(tmp_path / "real.npy", np.zeros((3, 8, 8)))
    np.save(tmp_path / "none.npy", digits(0))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "nothing.npz")
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "white.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jpg").write_bytes(b"")
    write(tmp_path, b"not an image", "no.png")
    write(tmp_path, b"some text", "a.txt")
    write(tmp_path, b"a,b\n1,2\n", "a.csv")
    write(tmp_path, b"", "taken.nlb")
    out = tmp_path / "out.nlb"
    for source, target, options, words in [
        ("missing.npy", out, (), "no file or folder"),
        ("high.npy", out, (), "holds 0..16"),
        ("wide.npy", out, (), "(3, 9, 9)"),
        ("real.npy", out, (), "float64"),
        ("none.npy", out, (), "no examples"),
        ("objects.npy", out, (), "cannot be read as numbers"),
        ("nothing.npz", out, (), "it has none"),
        ("white.png", out, (), "value 200"),
        ("colour.png", out, (), "mode RGB"),
        ("empty", out, (), "no .png files"),
        ("mixed", out, (), "a.jpg"),
        ("no.png", out, (), "cannot be read as a PNG"),
        ("a.txt", out, (), "is text"),
        ("a.csv", out, (), "is a table"),
        ("taken.nlb", out, (), "cannot be compressed"),
        ("x.npy", tmp_path / "taken.nlb", (), "exists; give another --out"),
        ("x.npy", tmp_path / "out.zip", (), "ends in .nlb"),
        ("x.npy", tmp_path / "taken.nlb" / "out.nlb", (), "taken.nlb"),
        ("x.npy", out, ("--effort", 0), "effort must be 1 to 255; got 0"),
        ("x.npy", out, ("--block", 0), "1 to 20000"),
        ("x.npy", out, ("--device", "abacus"), "no device"),
        ("x.npy", out, ("--precision", "float16"), "float16"),
    ]:
        arguments = ("compress", trained, tmp_path / source, "--out", target, *GRID, *options)
        assert words in fails(capsys, 2, *arguments), source
        assert not out.exists()
    run_ok("compress", trained, tmp_path / "x.npy", "--out", out, *GRID)
    for file, target, code, words in [
        ("missing.nlb", "y.npy", 2, "missing.nlb"),
        ("a.txt", "y.npy", 3, "not a compressed file of nelbo"),
        ("taken.nlb", "y.npy", 3, "not a compressed file of nelbo"),
        ("out.nlb", "x.npy", 2, "exists; give another --out"),
        ("out.nlb", "y.npz", 2, "must end in .npy"),
    ]:
        arguments = ("decompress", trained, tmp_path / file, "--out", tmp_path / target)
        assert words in fails(capsys, code, *arguments)
    assert not (tmp_path / "y.npy").exists()


def test_without_constriction_the_extra_is_named(trained, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "x.npy", digits(3))
    monkeypatch.setitem(sys.modules, "constriction", None)
    line = fails(
        capsys, 2, "compress", trained, tmp_path / "x.npy", "--out", tmp_path / "x.nlb", *GRID
    )
    assert "pip install 'nelbo[codec]'" in line


def test_densities_and_conditions_have_no_code(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "real.npy", rng.normal(size=(40, 3)))
    np.savez(tmp_path / "given.npz", x=rng.integers(0, 4, (40, 3)), y=rng.integers(0, 2, 40))
    (tmp_path / "fine.csv").write_text("a\n" + "\n".join(map(str, 7.25 * rng.permutation(999))))
    given = ("--condition", "class")
    for name, options, words in [
        ("real.npy", (), "only discrete data"),
        ("given.npz", given, "without --condition"),
        ("fine.csv", (), "declare a coarser precision"),
    ]:
        run = tmp_path / f"run of {name}"
        run_ok("train", tmp_path / name, "--out", run, *TINY, *options)
        out = tmp_path / "x.nlb"
        assert words in fails(capsys, 2, "compress", run, tmp_path / name, "--out", out, *GRID)


def test_salvage_names_what_is_lost(trained, tmp_path, capsys):
    x = digits(12)
    np.save(tmp_path / "x.npy", x)
    file = tmp_path / "x.nlb"
    run_ok("compress", trained, tmp_path / "x.npy", "--out", file, *GRID, "--block", 4)
    bad = bytearray(file.read_bytes())
    bad[-30] ^= 1
    write(tmp_path, bytes(bad))
    arguments = ("decompress", trained, tmp_path / "other.nlb", "--out", tmp_path / "y.npy")
    assert "damaged" in fails(capsys, 3, *arguments)
    assert "the examples 8..11 are lost" in fails(capsys, 3, *arguments, "--salvage")
    assert np.array_equal(np.load(tmp_path / "y.npy"), x[:8])


def test_another_run_is_refused(trained, tmp_path, capsys):
    np.save(tmp_path / "x.npy", digits(3))
    other = tmp_path / "other"
    run_ok("train", "digits", "--out", other, *TINY, "--seed", 1)
    run_ok("compress", other, tmp_path / "x.npy", "--out", tmp_path / "x.nlb", *GRID)
    arguments = ("decompress", trained, tmp_path / "x.nlb", "--out", tmp_path / "y.npy")
    assert "give the run" in fails(capsys, 4, *arguments)


# ---- determinism


def test_batches_threads_and_precision(trained):
    """The rounded answers do not depend on threads; a file of one precision is not decoded in
    the other."""
    run = load_run(trained)
    grid = tuple(TimeGrid.uniform(3).times.tolist())
    codec = Codec(run.model, Settings(grid))
    alone, together = (codec.answers({n}) for n in (1, 32))
    torch.set_num_threads(2)
    try:
        assert codec.answers({1}) == alone and codec.answers({32}) == together
    finally:
        torch.set_num_threads(1)
    x = torch.from_numpy(digits(6)[:, None])
    data = compress(run.model, x, Settings(grid, "float32"))
    assert torch.equal(decompress(data, run.model).x, x)
    with pytest.raises(CodecError):
        decompress(changed(data, precision="float64"), run.model)


def test_batches_of_any_size_give_the_same_integers(trained):
    """In float64 an example's rounded answers do not depend on its batch mates."""
    run = load_run(trained)
    codec = Codec(run.model, Settings((0.5, 1.0)))
    code = codec.codes.model(0)
    with torch.no_grad():
        together = code.answers(32)
        alone = code.answers(1)
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a[:1], b)


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41"},
    ],
    ids=["two threads", "other instructions"],
)
def test_a_fresh_process_decodes(trained, tmp_path, environment):
    x = np.concatenate([digits(4), np.zeros((5, 8, 8), np.uint8)])
    np.save(tmp_path / "x.npy", x)
    run_ok("compress", trained, tmp_path / "x.npy", "--out", tmp_path / "x.nlb", *GRID)
    command = [sys.executable, "-m", "nelbo", "decompress", str(trained), str(tmp_path / "x.nlb")]
    subprocess.run(
        [*command, "--out", str(tmp_path / "y.npy")],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    assert np.array_equal(np.load(tmp_path / "y.npy"), x)


def test_network_answers_that_differ_in_a_bit_are_exact_or_an_error(trained):
    """A stand-in for another version or device: the last bits of every answer are others."""
    run = load_run(trained)
    x = torch.from_numpy(digits(8)[:, None] // 4)
    grid = tuple(TimeGrid.uniform(2).times.tolist())
    data = compress(run.model, x, Settings(grid))
    for scale, refused in ((1e-15, False), (1e-3, True)):
        generator = torch.Generator().manual_seed(0)

        def shaken(module, inputs, output, scale=scale, generator=generator):
            noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            return output * (1 + scale * noise)

        handle = run.model.network.register_forward_hook(shaken)
        try:
            assert torch.equal(decompress(data, run.model).x, x) and not refused
        except CodecError as error:
            assert refused and error.exit_code == 5
        finally:
            handle.remove()
