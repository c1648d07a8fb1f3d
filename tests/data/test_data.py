"""Data come in as they are: exact values, the right shapes, honest splits, clear refusals."""

import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.files import chunk

from nelbo.data import Dataset, Schema, as_examples, fingerprint, load, load_like
from nelbo.data.inspection import inspect
from nelbo.data.readers.arrays import layout

N, C, H, W = 20, 3, 5, 7
RNG = np.random.default_rng(0)


def save(path: Path, array, **arrays) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, **(arrays if array is None else {"x": array, **arrays}))
    return path


def vectors(n=N, d=4) -> np.ndarray:
    return RNG.normal(size=(n, d))


def counts(n=N, d=4, levels=6) -> np.ndarray:
    """Integers that begin at 0 and reach levels - 1."""
    return np.arange(n * d).reshape(n, d) % levels


def rows(x: torch.Tensor) -> list[tuple]:
    return [tuple(row.reshape(-1).tolist()) for row in x]


def picture(path: Path, shape=(H, W, C), mode=None, **options) -> np.ndarray:
    """Save random pixels; what was saved."""
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return pixels


# Schema and fingerprint


@pytest.mark.parametrize("schema", [Schema("levels", (3, 5, 7), 17), Schema("real", (4,), None)])
def test_schema_survives_json(schema):
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "real", "shape": [4], "levels": None, "size": 3}, "'size'"),
        ({"kind": "real", "shape": [4]}, "missing key 'levels'"),
        (["real"], "must be a JSON object; got"),
        ({"kind": "real", "shape": 4, "levels": None}, "shape must be a list; got 4"),
        (
            {"kind": "real", "shape": [4.0], "levels": None},
            r"shape\[0\] must be an integer; got 4.0",
        ),
        (
            {"kind": "real", "shape": [4, 0], "levels": None},
            r"shape\[1\] must be at least 1; got 0",
        ),
        ({"kind": "real", "shape": [True], "levels": None}, r"shape\[0\] must be an integer"),
        ({"kind": "real", "shape": [], "levels": None}, "must have 1 or more values; got"),
        ({"kind": "real", "shape": [4], "levels": 2}, "must be None; got 2"),
        ({"kind": "levels", "shape": [4], "levels": 1}, "at least 2; got 1"),
        ({"kind": "levels", "shape": [4], "levels": None}, "at least 2; got None"),
        ({"kind": "text", "shape": [4], "levels": 2}, "got 'text'"),
    ],
)
def test_schema_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Schema.from_dict(values)


def test_fingerprint_is_of_values_and_shape():
    x = torch.tensor([[0, 1, 2], [3, 4, 5]])
    kinds = torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64, torch.bfloat16
    assert len({fingerprint(x.to(kind)) for kind in kinds}) == 1
    assert fingerprint(x.T.contiguous().T) == fingerprint(x)
    assert fingerprint(torch.tensor([-0.0])) == fingerprint(torch.tensor([0.0]))
    others = x.reshape(3, 2), x.flip(0), x + 1, x[:1], torch.zeros(0, 3), torch.zeros(0, 2)
    assert len({fingerprint(y) for y in (x, *others)}) == 7


def test_fingerprint_sees_beyond_one_piece():
    x = torch.zeros((1 << 20) + 2, dtype=torch.uint8)
    y = x.clone()
    y[-1] = 1
    assert fingerprint(x) != fingerprint(y)


def test_as_examples_widens():
    assert as_examples(torch.tensor([255], dtype=torch.uint8)).equal(torch.tensor([255]))
    assert as_examples(torch.ones(1, dtype=torch.float32)).dtype == torch.float64


def test_import_is_light():
    code = "import sys, nelbo.data; print({'PIL', 'sklearn', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Digits


def test_digits_are_scikit_learns_in_file_order(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)  # the built-in wins over a path of its name
    data = load("digits", seed=5)
    assert (data.source, data.schema) == ("digits", Schema("levels", (1, 8, 8), 17))
    assert {name: len(x) for name, x in data.splits.items()} == {
        "train": 1000,
        "validation": 350,
        "test": 447,
    }
    together = as_examples(torch.cat(list(data.splits.values())))
    assert together[:, 0].equal(torch.from_numpy(load_digits().images).long())
    assert load_like("digits", data.schema).splits["all"].equal(together)
    for path in ("./digits", Path("digits")):
        with pytest.raises(ValueError, match="has no images"):
            load(path)


def test_a_level_count_that_differs_is_no_fit():
    with pytest.raises(ValueError, match="digits has 17 levels where 256 are needed"):
        load_like("digits", Schema("levels", (1, 8, 8), 256))
    with pytest.raises(ValueError, match=r"the value 16, beyond the 16 levels 0\.\.15"):
        load_like("digits", Schema("levels", (1, 8, 8), 16))
    assert load("digits", levels=20).schema.levels == 20


# Splits


@pytest.mark.parametrize(("n", "sizes"), [(3, [1, 1, 1]), (10, [8, 1, 1]), (57, [47, 5, 5])])
def test_unsplit_data_fall_apart_into_three(tmp_path, n, sizes):
    x = vectors(n, 2) if n > 3 else counts(n, 2)
    path = save(tmp_path / "x.npy", x)
    data = load(path)
    assert list(data.splits) == ["train", "validation", "test"]
    assert [len(part) for part in data.splits.values()] == sizes
    together = torch.cat(list(data.splits.values()))
    assert sorted(rows(together)) == sorted(rows(torch.from_numpy(x)))
    again = load(path)
    assert all(again.splits[name].equal(part) for name, part in data.splits.items())
    assert any("80/10/10 by seed 0" in note for note in data.notes)


def test_the_split_is_of_the_seed_for_ever(tmp_path):
    path = save(tmp_path / "x.npy", np.arange(30))
    one, two = load(path, seed=1).splits, load(path, seed=2).splits
    assert not one["test"].equal(two["test"])
    # Recorded: a model's test set must not change with numpy or with nelbo.
    zero = load(path).splits
    assert zero["validation"].flatten().tolist() == [4, 22, 29]
    assert zero["test"].flatten().tolist() == [11, 21, 23]


@pytest.mark.parametrize(
    "names", [("x_train", "x_test"), ("train", "test"), ("X_train", "X_test")]
)
def test_a_missing_validation_split_comes_off_train(tmp_path, names):
    x, y = np.arange(30), np.arange(30, 37)
    path = save(tmp_path / "x.npz", None, **dict(zip(names, (x, y), strict=True)))
    data = load(path)
    assert [len(part) for part in data.splits.values()] == [27, 3, 7]
    assert data.splits["test"].flatten().tolist() == y.tolist()
    both = torch.cat([data.splits["train"], data.splits["validation"]]).flatten()
    assert sorted(both.tolist()) == x.tolist()
    assert "validation is 10% of train by seed 0: 27 train, 3 validation, 7 test" in data.notes
    like = load_like(path, data.schema)
    assert {name: len(part) for name, part in like.splits.items()} == {
        "train": 30,
        "test": 7,
        "all": 37,
    }


@pytest.mark.parametrize("name", ["x_val", "x_valid", "x_validation"])
def test_splits_of_the_file_stay(tmp_path, name):
    arrays = {"x_test": np.arange(2, 4), name: np.arange(4, 9), "x_train": np.arange(2)}
    data = load(save(tmp_path / "x.npz", None, **arrays, y_train=np.zeros(2)))
    assert [part.flatten().tolist() for part in data.splits.values()] == [
        [0, 1],
        [4, 5, 6, 7, 8],
        [2, 3],
    ]
    assert any("ignored y_train" in note for note in data.notes)


def test_unsplit_data_to_evaluate_on_stay_whole(tmp_path):
    x = vectors()
    data = load_like(save(tmp_path / "x.npy", x), Schema("real", (4,), None))
    assert list(data.splits) == ["all"]
    assert data.splits["all"].equal(torch.from_numpy(x))


# Arrays: shapes


@pytest.mark.parametrize("shape", [(N, H, W), (N, 1, H, W), (N, H, W, 1)])
def test_grey_images(tmp_path, shape):
    x = RNG.integers(0, 9, shape)
    data = load_like(save(tmp_path / "x.npy", x), Schema("levels", (1, H, W), 9))
    assert as_examples(data.splits["all"]).equal(torch.from_numpy(x.reshape(N, 1, H, W)))


@pytest.mark.parametrize("channels", [3, 4])
def test_channels_first_and_last_are_the_same_pixel_by_pixel(tmp_path, channels):
    last = RNG.integers(0, 256, (N, H, W, channels), dtype=np.uint8)
    first = np.zeros((N, channels, H, W), np.uint8)
    for n, c, h, w in np.ndindex(first.shape):
        first[n, c, h, w] = last[n, h, w, c]
    one = load(save(tmp_path / "last.npy", last))
    two = load(save(tmp_path / "first.npy", np.asfortranarray(first)))
    assert one.schema == two.schema == Schema("levels", (channels, H, W), 256)
    assert all(one.splits[name].equal(two.splits[name]) for name in one.splits)
    like = load_like(tmp_path / "last.npy", one.schema)
    assert like.splits["all"].equal(torch.from_numpy(first))
    assert any("channels last" in note for note in one.notes)


def test_numbers_are_vectors_of_one(tmp_path):
    schema = Schema("levels", (1,), 6)
    assert load(save(tmp_path / "x.npy", counts().reshape(-1))).schema == schema
    assert load_like(save(tmp_path / "y.npy", np.array(3)), schema).splits["all"].shape == (1, 1)


@pytest.mark.parametrize(
    "shape", [(N, 2, H, W), (N, 1, 1, 1, 2), (0, 4), (N, 0)], ids=lambda shape: f"{len(shape)}d"
)
def test_shapes_that_mean_nothing(tmp_path, shape):
    with pytest.raises(ValueError, match=r"has the shape|its shape is"):
        load(save(tmp_path / "x.npy", np.zeros(shape)))


# Arrays: values


@pytest.mark.parametrize(
    ("x", "levels", "stored"),
    [
        (counts(levels=2).astype(bool), 2, torch.uint8),
        (counts(levels=6).astype(">i4"), 6, torch.uint8),
        (counts(levels=6).astype(np.uint64), 6, torch.uint8),
        (counts(n=64, levels=128).astype(np.uint8), 128, torch.uint8),
        (counts(n=64, levels=129).astype(np.uint8), 256, torch.uint8),
        (counts(n=64, levels=129), 129, torch.uint8),
        (counts(n=99, levels=300), 300, torch.int16),
        (counts(n=20000, levels=65536), 65536, torch.int32),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_levels_found(tmp_path, x, levels, stored):
    data = load(save(tmp_path / "x.npy", x))
    assert data.schema == Schema("levels", (4,), levels)
    assert all(part.dtype == stored for part in data.splits.values())
    whole = load_like(tmp_path / "x.npy", data.schema).splits["all"]
    assert as_examples(whole).equal(torch.from_numpy(x.astype(np.int64)))


def test_levels_are_of_all_splits(tmp_path):
    path = save(tmp_path / "x.npz", None, train=counts(levels=3), test=counts(levels=9))
    data = load(path)
    assert data.schema.levels == 9
    assert "9 levels found; --levels overrides" in data.notes


def test_levels_given(tmp_path):
    path = save(tmp_path / "x.npy", counts().astype(np.float32))
    assert load(path).schema == Schema("real", (4,), None)
    assert any("--levels K" in note for note in load(path).notes)
    data = load(path, levels=9)
    assert data.schema == Schema("levels", (4,), 9)
    assert data.splits["train"].dtype == torch.uint8
    same = load(save(tmp_path / "same.npy", np.full((9, 2), 3)), levels=4)
    assert same.schema.levels == 4


@pytest.mark.parametrize(
    ("x", "levels", "message"),
    [
        (counts() - 3, None, "negative integers, the least is -3; add 3"),
        (counts() - 3, 9, "negative integers, the least is -3"),
        (counts(), 5, r"the value 5, beyond the 5 levels 0\.\.4; .* --levels 6"),
        (counts(levels=2) * 65536, None, "up to 65536, more than 65536 levels"),
        (np.full((9, 2), 3), None, "all values of .* are 3"),
        (np.zeros((9, 2), bool), None, "all values of .* are 0"),
        (counts() + 0.5, 9, "holds 0.5, which is not one of the 9 levels"),
        (counts(), 1, "levels must be at least 2; got 1"),
    ],
)
def test_integers_refused(tmp_path, x, levels, message):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "x.npy", x), levels=levels)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("<f2", torch.float32), (">f4", torch.float32), ("f8", torch.float64), ("g", torch.float64)],
)
def test_reals_keep_their_values(tmp_path, kind, stored):
    x = vectors().astype(kind)
    data = load(save(tmp_path / "x.npy", x))
    assert data.schema == Schema("real", (4,), None)
    assert data.splits["train"].dtype == stored
    whole = load_like(tmp_path / "x.npy", data.schema).splits["all"]
    assert whole.double().equal(torch.from_numpy(x.astype(np.float64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_reals_are_finite(tmp_path, bad):
    x = RNG.normal(size=(N, H, W, C))
    x[2, 1, 3, 0] = x[4, 0, 0, 2] = bad
    with pytest.raises(ValueError, match=r"x_train in .* has 2 NaN .* index \(2, 1, 3, 0\)"):
        load(save(tmp_path / "x.npz", None, x_train=x))


def test_an_inspection_warns_of_reals_that_repeat(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 3))
    np.save(tmp_path / "x.npy", x)
    assert not [w for w in inspect(tmp_path / "x.npy").warnings if "without bound" in w]
    x[:, 1] = x[:, 1].round()
    x[7] = x[3]
    np.save(tmp_path / "x.npy", x)
    one, two = (w for w in inspect(tmp_path / "x.npy").warnings if "without bound" in w)
    assert one.startswith("1 of 60 examples are copies")
    assert two.startswith("in 1 of 3 dimensions values repeat")


def test_a_constant_dimension_has_no_density(tmp_path):
    x = vectors()
    x[:, 2:] = 1.5
    with pytest.raises(ValueError, match=r"column 2 .* is always 1\.5 .*1 more .* unbounded"):
        load(save(tmp_path / "x.npy", x))
    y = RNG.normal(size=(N, H, W))
    y[:, 3, 6] = 0
    with pytest.raises(ValueError, match=r"pixel \(0, 3, 6\) .* is always 0"):
        load(save(tmp_path / "y.npy", y))
    # Constant only in training; evaluation does not mind.
    test = vectors()
    path = save(tmp_path / "z.npz", None, train=x, test=test)
    with pytest.raises(ValueError, match="column 2"):
        load(path)
    assert len(load_like(path, Schema("real", (4,), None)).splits["all"]) == 2 * N


@pytest.mark.parametrize(
    "x", [vectors() + 1j, np.array([["a", "b"]]), np.zeros(9, "M8[s]"), np.zeros(9, "i4,i4")]
)
def test_other_types_refused(tmp_path, x):
    with pytest.raises(ValueError, match=r"has the type .*; save it as"):
        load(save(tmp_path / "x.npy", x))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": counts(), "test": counts(d=5)}, r"integers of the shape \(4,\) but .* \(5,\)"),
        ({"train": counts(), "test": vectors()}, r"integers .* test split are real"),
        ({"x_train": counts(), "x_val": counts(), "x_valid": counts()}, "x_valid and x_val both"),
        ({"wings": counts(), "beaks": counts()}, "holds the arrays wings, beaks; name"),
        ({"x": counts(), "X": counts()}, "holds the arrays x, X"),
        ({}, r"holds the arrays \(none\)"),
        (
            {"x_test": counts(), "y_test": counts()},
            "no training examples, only test; name them .* --splits",
        ),
        ({"x": counts(n=2)}, "2 training examples, too few .* at least 3"),
        ({"train": counts(n=1), "test": counts()}, "1 training examples, .* validation off"),
        ({"train": counts(), "test": counts(n=0)}, "test in .* is empty"),
    ],
)
def test_npz_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "x.npz", None, **arrays))


def test_npz_of_one_or_of_x(tmp_path):
    x = counts()
    schema = Schema("levels", (4,), 6)
    for arrays in ({"whatever": x}, {"x": x, "y": x[:, 0]}, {"X": x, "labels": x[:, 0]}):
        like = load_like(save(tmp_path / "x.npz", None, **arrays), schema)
        assert as_examples(like.splits["all"]).equal(torch.from_numpy(x))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_npz_however_compressed(tmp_path, method):
    x, stream = counts(), io.BytesIO()
    np.save(stream, x)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as file:
        file.writestr("x.npy", stream.getvalue())
    like = load_like(tmp_path / "x.npz", Schema("levels", (4,), 6))
    assert as_examples(like.splits["all"]).equal(torch.from_numpy(x))


# Arrays: files that are not what they say


def header(shape: tuple, descr: str = "<f8") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    claim = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + claim + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


GOOD = header((N, 4)) + vectors().tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.npz", b"train,test\n1,2\n"),
        ("empty.npz", b""),
        ("really_npy.npz", GOOD),
        ("truncated.npz", zipped(x=GOOD)[:-30]),
        ("flipped.npz", zipped(x=GOOD)[:200] + b"\0" * 50 + zipped(x=GOOD)[250:]),
        ("giant.npz", zipped(x=header((10**6, 10**6)))),
        ("beyond.npz", zipped(x=header((2**40, 2**40)))),
        ("short.npz", zipped(x=header((N, 4)) + b"\0" * 9)),
        ("text.npy", b"1 2 3"),
        ("empty.npy", b""),
        ("png.npy", png(W, H)),
        ("really_npz.npy", zipped(x=GOOD)),
        ("truncated.npy", GOOD[:-9]),
        ("magic.npy", GOOD[:6]),
        ("garbled.npy", GOOD[:10] + b"{{{" + GOOD[13:]),
        ("giant.npy", header((10**6, 10**6))),
        ("GIANT.NPY", header((10**6, 10**6))),
        ("beyond.npy", header((2**40, 2**40))),
    ],
)
def test_damaged_arrays_take_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as numbers: .*; write") as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_python_objects_are_never_unpickled(tmp_path, suffix):
    x = np.array([{}, "x", None], dtype=object)
    with pytest.raises(ValueError, match=r"arrays of objects .* without Python objects"):
        load(save(tmp_path / f"x{suffix}", x))


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x", "some text")
    with pytest.raises(ValueError, match=r"cannot be read as numbers: x: .*magic"):
        load(tmp_path / "x.npz")


def test_sources_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere; .* digits"):
        load(tmp_path / "nowhere")
    (tmp_path / "x.xlsx").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"x\.xlsx is of an unknown type; give \.npy"):
        load(tmp_path / "x.xlsx")
    for source in ("digits", save(tmp_path / "x.npy", counts())):
        with pytest.raises(ValueError, match="--size resizes encoded images"):
            load(source, size=4)
    with pytest.raises(ValueError, match="seed must not be negative; got -1"):
        load("digits", seed=-1)
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        load(tmp_path, size=0)


def test_source_is_an_absolute_path(tmp_path, monkeypatch):
    save(tmp_path / "x.npy", counts())
    monkeypatch.chdir(tmp_path)
    data = load("x.npy")
    assert isinstance(data, Dataset)
    assert data.source == str(tmp_path / "x.npy")


# Conforming to a schema


@pytest.mark.parametrize(
    ("x", "schema", "message"),
    [
        (counts(), Schema("levels", (5,), 6), r"shape \(4,\) where \(5,\) is needed"),
        (counts(), Schema("levels", (4,), 5), "the value 5, beyond the 5 levels"),
        (counts().astype(float), Schema("levels", (4,), 5), "the value 5, beyond the 5 levels"),
        (vectors(), Schema("levels", (4,), 5), "not one of the 5 levels"),
        (counts(), Schema("real", (4,), None), "holds integers where real numbers are needed"),
        (counts(levels=2) > 0, Schema("levels", (4,), 5), "has 2 levels where 5 are needed"),
    ],
)
def test_no_fit(tmp_path, x, schema, message):
    with pytest.raises(ValueError, match=message):
        load_like(save(tmp_path / "x.npy", x), schema)


def test_fewer_values_fit(tmp_path):
    for x in (counts(levels=3), counts(levels=3).astype(float), np.zeros((2, 4), int)):
        like = load_like(save(tmp_path / "x.npy", x), Schema("levels", (4,), 300))
        assert like.schema.levels == 300
        assert like.splits["all"].dtype == torch.int16


# Images


def test_png_comes_back_exactly_and_in_order(tmp_path):
    names = ["b/2.png", "a.PNG", "c.png", "b/1.png"]
    pixels = {name: picture(tmp_path / name) for name in names}
    (tmp_path / "notes.txt").write_text("ignored")
    (tmp_path / "._a.png").write_text("hidden")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_text("hidden")
    data = load(tmp_path)
    assert data.schema == Schema("levels", (C, H, W), 256)
    whole = load_like(tmp_path, data.schema).splits["all"]
    assert whole.dtype == torch.uint8
    expected = np.stack([pixels[name] for name in sorted(names)]).transpose(0, 3, 1, 2)
    assert whole.equal(torch.from_numpy(expected))


def test_jpeg_is_as_pillow_decodes_it(tmp_path):
    picture(tmp_path / "a.jpg", (H, W))
    picture(tmp_path / "b.JPEG", (H, W))
    whole = load_like(tmp_path, Schema("levels", (1, H, W), 256)).splits["all"]
    assert whole[0, 0].equal(torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))))


def test_grey_among_colour(tmp_path):
    grey, colour = picture(tmp_path / "a.png", (H, W)), picture(tmp_path / "b.png")
    schema = Schema("levels", (C, H, W), 256)
    whole = load_like(tmp_path, schema).splits["all"]
    assert whole[0].equal(torch.from_numpy(np.stack([grey] * 3)))
    assert whole[1].equal(torch.from_numpy(colour).movedim(2, 0))
    (tmp_path / "b.png").unlink()
    assert load_like(tmp_path, schema).splits["all"].equal(whole[:1])
    assert load_like(tmp_path, Schema("levels", (1, H, W), 256)).splits["all"].shape[1] == 1


def test_palette_bits_and_opaque_alpha(tmp_path):
    colours = RNG.integers(0, 256, (8, 3), dtype=np.uint8)
    index = RNG.integers(0, 8, (H, W), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=bytes([255] * 8))
    opaque = np.concatenate([colours[index], np.full((H, W, 1), 255, np.uint8)], 2)
    Image.fromarray(opaque).save(tmp_path / "c.png")
    whole = load_like(tmp_path, Schema("levels", (C, H, W), 256)).splits["all"]
    for x in whole:
        assert x.equal(torch.from_numpy(colours[index]).movedim(2, 0))
    bits = index > 3
    Image.fromarray(bits).save(tmp_path / "d.png")
    whole = load_like(tmp_path, Schema("levels", (C, H, W), 256)).splits["all"]
    assert whole[3, 0].equal(torch.from_numpy(bits * np.uint8(255)))


def test_fewer_levels_where_all_fit(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((H, W), i, np.uint8)).save(tmp_path / f"{i}.png")
    assert load(tmp_path).schema.levels == 256
    data = load(tmp_path, levels=4)
    assert data.schema.levels == 4
    assert len(load_like(tmp_path, data.schema).splits["all"]) == 4
    with pytest.raises(ValueError, match="the value 3, beyond the 3 levels"):
        load(tmp_path, levels=3)


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_folders_are_splits(tmp_path, name):
    pixels = {
        folder: [picture(tmp_path / folder / "class" / f"{i}.png", (H, W)) for i in range(2)]
        for folder in ("train", name, "test")
    }
    picture(tmp_path / "outside.png", (H, W))
    data = load(tmp_path)
    for split, folder in zip(("train", "validation", "test"), pixels, strict=True):
        assert data.splits[split].equal(torch.from_numpy(np.stack(pixels[folder]))[:, None])
    assert any("1 images outside the folders" in note for note in data.notes)


def test_size_crops_the_centre_and_resamples(tmp_path):
    wide, tall = np.zeros((6, 10), np.uint8), np.zeros((10, 6, 3), np.uint8)
    wide[:, 2:8], tall[2:8] = 77, 77
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(tall).save(tmp_path / "b.png")
    for size in (3, 6, 9):
        data = load_like(tmp_path, Schema("levels", (3, size, size), 256), size=size)
        assert data.splits["all"].eq(77).all()
    assert any("resampled to 9x9" in note for note in data.notes)
    exact = picture(tmp_path / "square" / "a.png", (H, H))
    same = load_like(tmp_path / "square", Schema("levels", (1, H, H), 256), size=H)
    assert same.splits["all"].equal(torch.from_numpy(exact)[None, None])


def test_sizes_that_differ(tmp_path):
    picture(tmp_path / "a.png", (5, 7))
    picture(tmp_path / "b.png", (6, 8))
    with pytest.raises(ValueError, match=r"a\.png is 7x5 but .*b\.png is 8x6; --size 5"):
        load(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"shape \(1, 6, 8\) where \(1, 4, 4\) is needed"):
        load_like(tmp_path, Schema("levels", (1, 4, 4), 256))


def truncated(path: Path) -> None:
    picture(path, (64, 64))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (truncated, "cannot be read as an image: it is truncated"),
        (
            lambda path: path.write_text("no image"),
            "as an image: it is of an unknown type; remove",
        ),
        (lambda path: path.write_bytes(b""), "cannot be read as an image"),
        (lambda path: path.write_bytes(png(W, H)), "cannot be read as an image"),
        (lambda path: path.write_bytes(png(10**4, 10**4)), "claims more than .* pixels"),
        (lambda path: path.write_bytes(png(10**6, 10**6)), "claims more than .* pixels"),
    ],
)
def test_images_refused(tmp_path, write, message):
    write(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=rf"bad\.png.*{message}|bad\.png {message}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_folders_refused(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        load(tmp_path)
    (tmp_path / "val").mkdir()
    picture(tmp_path / "train" / "a.png")
    with pytest.raises(ValueError, match=r"val has no images; fill or remove"):
        load(tmp_path)
    (tmp_path / "valid").mkdir()
    with pytest.raises(ValueError, match=r"valid and .*val both name the validation split"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("shape", "read", "said"),
    [
        ((9, 1, 6, 4), (1, 6, 4), "channels first"),
        ((9, 3, 6, 4), (3, 6, 4), "channels first"),
        ((9, 6, 7, 3), (3, 6, 7), "channels last"),
        ((9, 4, 7, 1), (1, 4, 7), "channels last"),
        ((9, 3, 28, 1), (1, 3, 28), "channels last"),
        ((9, 1, 28, 3), (1, 28, 3), "channels first"),
    ],
)
def test_channels_are_beside_the_wider_image(tmp_path, shape, read, said):
    x = RNG.integers(0, 6, shape)
    want = x if said == "channels first" else np.moveaxis(x, 3, 1)
    guess, note = layout(x, "x")
    assert (guess == want).all() and said in note
    known = load_like(save(tmp_path / "x.npy", x), Schema("levels", read, 6))
    assert (known.splits["all"].numpy() == want).all()
    assert ("channels last" in "".join(known.notes)) == (said == "channels last")


def test_pixels_between_zero_and_one_are_led_to_levels(tmp_path):
    x = RNG.random((30, 5, 4))
    assert any("np.rint(255 * x)" in n for n in load(save(tmp_path / "x.npy", x)).notes)
    signed = load(save(tmp_path / "signed.npy", 2 * x - 1)).notes
    assert any("[-1, 1]" in n and "np.rint(127.5 * (x + 1))" in n for n in signed)
    assert not any("255" in n for n in load(save(tmp_path / "y.npy", 2 * x)).notes)
    x[:, 0, 0] = 0
    with pytest.raises(ValueError, match=r"always 0 .* np\.rint\(255 \* x\)"):
        load(save(tmp_path / "z.npy", x))
