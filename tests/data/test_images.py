"""Images from folders, tar shards and idx files: exact pixels, their labels, clear refusals."""

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.files import chunk

from nelbo.data import Label, Schema, fingerprint, load, load_like, rows
from nelbo.data.readers import encoded as encoded_images
from nelbo.evaluation.evaluate import evaluate
from nelbo.runs.train import train
from nelbo.training.batching import batch_indices

H, W = 5, 7
RNG = np.random.default_rng(0)


def random(*shape) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def save(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels))
    return pixels


def shard(path: Path, members) -> Path:
    """A tar file of (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def labelled(count, start=0):
    """Members of `count` grey images with the labels 0, 1, 2, 0, .., and their pixels."""
    pixels = random(count, H, W)
    members = []
    for i, image in enumerate(pixels, start):
        members += [(f"{i:04}.png", encoded(image)), (f"{i:04}.cls", f"{i % 3}\n".encode())]
    return members, pixels


def idx(path: Path, array: np.ndarray, sizes=None, code=0x08) -> Path:
    sizes = array.shape if sizes is None else sizes
    header = bytes([0, 0, code, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())
    return path


def whole(source, shape, levels=256, **options) -> torch.Tensor:
    return load_like(source, Schema("levels", shape, levels), **options).splits["all"]


# Channels and bits


def test_transparent_images_have_four_channels(tmp_path):
    grey, colour = (
        save(tmp_path / "a.png", random(H, W)),
        save(tmp_path / "b.png", random(H, W, 3)),
    )
    assert load_like(tmp_path, Schema("levels", (3, H, W), 256)).schema.shape == (3, H, W)
    clear = save(tmp_path / "c.png", random(H, W, 4))
    x = whole(tmp_path, (4, H, W)).numpy()
    assert (x[0, :3] == grey).all() and (x[:2, 3] == 255).all()
    assert (x[1, :3] == colour.transpose(2, 0, 1)).all()
    assert (x[2] == clear.transpose(2, 0, 1)).all()
    with pytest.raises(ValueError, match=r"shape \(4, 5, 7\) where \(3, 5, 7\) is needed"):
        whole(tmp_path, (3, H, W))
    (tmp_path / "c.png").unlink()
    assert (whole(tmp_path, (4, H, W)).numpy() == x[:2]).all()  # as the model needs them


def test_a_transparent_colour_is_transparent(tmp_path):
    pixels = random(H, W) // 2
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=int(pixels[0, 0]))
    x = whole(tmp_path, (4, H, W)).numpy()[0]
    assert (x[:3] == pixels).all()
    assert (x[3] == np.where(pixels == pixels[0, 0], 0, 255)).all()


def deep_png(x: np.ndarray) -> bytes:
    """A PNG file of 16 bits, (H, W, 1 to 4), which Pillow cannot write in colour."""
    h, w, c = x.shape
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in x)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_all_of_sixteen_bits(tmp_path, channels):
    deep = RNG.integers(0, 65536, (10, H, W, channels), dtype=np.uint16)
    for i, image in enumerate(deep):
        (tmp_path / f"{i}.png").write_bytes(deep_png(image))
    data = load(tmp_path)
    assert data.schema == Schema("levels", (channels, H, W), 65536)
    x = whole(tmp_path, (channels, H, W), 65536).numpy()
    assert (x == deep.transpose(0, 3, 1, 2)).all()
    upper = whole(tmp_path, (channels, H, W)).numpy()
    assert (upper == deep.transpose(0, 3, 1, 2) >> 8).all()
    smaller = whole(tmp_path, (channels, 3, 3), 65536, size=3).double()
    assert smaller.shape[2:] == (3, 3) and smaller.std() > 1000
    if channels == 1:  # as the model needs them
        coloured = whole(tmp_path, (4, H, W), 65536).numpy()
        assert (coloured[:, :3] == x).all() and (coloured[:, 3] == 65535).all()


def test_sixteen_bits_that_do_not_fit_are_refused(tmp_path):
    deep = RNG.integers(0, 65536, (H, W, 2), dtype=np.uint16)
    (tmp_path / "0.png").write_bytes(deep_png(deep))
    with pytest.raises(ValueError, match="16 bits of grey with transparency; save it as RGBA"):
        load(tmp_path)
    save(tmp_path / "1.png", random(H, W))
    with pytest.raises(ValueError, match=r"1 of the 2 images of .* 16 bits a channel"):
        load(tmp_path)


def test_sixteen_bits_are_modelled_in_little_memory(tmp_path):
    x = RNG.integers(0, 65536, (30, 3, H, W), dtype=np.uint16)
    np.savez(tmp_path / "x.npz", x=x)
    options = {"steps": 4, "batch": 8, "width": 8, "depth": 1, "evaluate_every": 4}
    run = train(str(tmp_path / "x.npz"), tmp_path / "run", **options)
    assert run.config.schema.levels == 65536
    assert run.config.model.decoder == "discretised-gaussian"
    result = evaluate(run.model, run.batch()[0], calls=400)  # three examples: an error of 0.2
    # of what is even there is nothing to learn: 16 bits, and more until it is learned
    assert 15.5 < result.bits_per_dim < 40


def test_the_upper_bits_of_sixteen_on_demand(tmp_path):
    deep = RNG.integers(0, 65536, (4, H, W), dtype=np.uint16)
    for i, image in enumerate(deep):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    data = load(tmp_path, levels=256)
    assert any("the upper 8 bits of 4 images with 16 bits" in note for note in data.notes)
    assert (whole(tmp_path, (1, H, W))[:, 0].numpy() == deep >> 8).all()


def test_images_of_one_pixel(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", np.full((1, 1), 50 * i, np.uint8))
    data = load(tmp_path)
    assert data.schema.shape == (1, 1, 1)
    assert sorted(v.item() for x in data.splits.values() for v in x) == [0, 50, 100, 150, 200]


# Classes


def test_subfolders_are_classes(tmp_path):
    values = iter(range(30))
    of = {}
    for name in ("10", "9", "cat"):
        for i in range(10):
            of[value := next(values)] = name
            save(tmp_path / name / f"{i}.png", np.full((H, W), value, np.uint8))
    data = load(tmp_path, condition=["class"])
    (label,) = data.schema.condition
    assert label == Label("class", ("9", "10", "cat"))  # numbers by value, then words
    for split, x in data.splits.items():
        names = [label.classes[int(k)] for k in data.labels[split][:, 0]]
        assert names == [of[v.item()] for v in x[:, 0, 0, 0]], split
    assert load(tmp_path).schema.condition == ()
    assert any("--condition class" in note for note in load(tmp_path).notes)
    assert (
        load_like(tmp_path, data.schema)
        .labels["all"]
        .equal(torch.tensor([1.0] * 10 + [0.0] * 10 + [2.0] * 10)[:, None].double())
    )


def test_subfolders_of_splits_are_classes(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b") if split != "test" else ("b",):
            save(tmp_path / split / name / "0.png", random(H, W))
    data = load(tmp_path, condition=["class"])
    assert data.schema.condition[0].classes == ("a", "b")
    assert {k: v[:, 0].tolist() for k, v in data.labels.items()} == {
        "train": [0, 1],
        "validation": [0, 1],
        "test": [1],
    }


def test_no_classes_where_one_image_has_none(tmp_path):
    for name in ("a/0.png", "b/0.png", "c.png"):
        save(tmp_path / name, random(H, W))
    with pytest.raises(ValueError, match=r"no label 'class' to condition on; it has no labels"):
        load(tmp_path, condition=["class"])


def arrays(path: Path, **named) -> Path:
    np.savez(path, **named)
    return path


X = RNG.integers(0, 6, (12, 4))


@pytest.mark.parametrize(
    ("y", "name", "label", "values"),
    [
        (np.arange(12) % 3, "class", ("0", "1", "2"), np.arange(12) % 3),
        (np.array(["b", "a"] * 6)[:, None], "class", ("a", "b"), [1, 0] * 6),
        (np.arange(12) % 2 == 1, "class", ("0", "1"), [0, 1] * 6),
        (np.arange(12) / 2, "y", (), np.arange(12) / 2),
    ],
)
def test_arrays_of_labels(tmp_path, y, name, label, values):
    source = arrays(tmp_path / "x.npz", x=X, y=y)
    data = load(source, condition=[name])
    assert data.schema.condition[0].classes == label
    like = load_like(source, data.schema)
    assert like.labels["all"][:, 0].tolist() == list(values)
    train = data.labels["train"][:, 0]
    if not label:
        assert data.schema.condition[0].mean == pytest.approx(train.mean().item())
    # each example keeps its label
    pairs = {(*x.tolist(), v) for x, v in zip(like.splits["all"], values, strict=True)}
    for split, x in data.splits.items():
        here = zip(x, data.labels[split][:, 0].tolist(), strict=True)
        assert {(*row.tolist(), v) for row, v in here} <= pairs


@pytest.mark.parametrize(
    ("y", "condition", "message"),
    [
        (np.arange(11) % 3, "class", r"shape \(11,\) for 12 examples"),
        (np.zeros(12, int), "class", r"are '0'; leave --condition class out"),
        (np.arange(12), "class", r"takes 12 values in 12 examples, .* float64"),
        (np.full(12, np.nan), "y", r"label y of example 0 .* is nan"),
        (np.full(12, 2.5), "y", r"all labels y are 2\.5"),
        (np.arange(12) % 3, "colour", r"no label 'colour' to condition on; it has class"),
        (np.zeros(12, complex), "class", r"have the type complex128"),
    ],
)
def test_labels_refused(tmp_path, y, condition, message):
    source = arrays(tmp_path / "x.npz", x=X, y=y)
    load(source)  # nobody asked for them
    with pytest.raises(ValueError, match=message):
        load(source, condition=[condition])


def test_a_label_out_of_range(tmp_path):
    schema = load(arrays(tmp_path / "x.npz", x=X, y=np.arange(12) % 3), condition=["class"]).schema
    other = arrays(tmp_path / "other.npz", x=X[:4], y=np.array([0, 1, 3, 0]))
    with pytest.raises(ValueError, match=r"label of example 2 .* '3', out of range: .* 0, 1, 2"):
        load_like(other, schema)


def test_a_class_without_training_examples_is_told(tmp_path):
    source = arrays(
        tmp_path / "x.npz",
        x_train=X,
        y_train=np.arange(12) % 2,
        x_test=X,
        y_test=np.arange(12) % 3,
    )
    assert any(
        "no training example has the class 2" in note
        for note in load(source, condition=["class"]).notes
    )


@pytest.mark.parametrize(
    "values",
    [
        {"name": "", "classes": [], "mean": 0.0, "spread": 1.0},
        {"name": "y", "classes": [], "mean": 0.0, "spread": 0.0},
        {"name": "y", "classes": [], "mean": "0", "spread": 1.0},
        {"name": "y", "classes": ["a", "a"], "mean": 0.0, "spread": 1.0},
        {"name": "y", "classes": ["a"], "mean": 0.0, "spread": 1.0},
        {"name": "y", "classes": [1, 2], "mean": 0.0, "spread": 1.0},
        {"name": "y", "classes": "ab", "mean": 0.0, "spread": 1.0},
        {"classes": []},
        "y",
    ],
)
def test_labels_of_a_schema_refused(values):
    with pytest.raises(ValueError, match=r"condition\[0\]|y must have"):
        Schema.from_dict({"kind": "real", "shape": [4], "levels": None, "condition": [values]})


# Tar shards


def test_shards_are_read_in_order(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    first, a = labelled(5)
    second, b = labelled(4, start=5)
    shard(folder / "b-001.tar", second)
    shard(folder / "b-000.tar", [*first, ("0000.json", b"{}")])
    expected = np.concatenate([a, b])
    assert (whole(folder, (1, H, W))[:, 0].numpy() == expected).all()
    assert (whole(folder / "b-001.tar", (1, H, W))[:, 0].numpy() == b).all()
    data = load(folder, condition=["class"])
    assert any("members .json ignored" in note for note in data.notes)
    like = load_like(folder, data.schema)
    assert like.labels["all"][:, 0].tolist() == [i % 3 for i in range(9)]


def test_shards_named_for_splits(tmp_path):
    pixels = {}
    for name in ("train-0", "train-1", "val-0", "test"):
        members, pixels[name] = labelled(3)
        shard(tmp_path / f"{name}.tar", members)
    splits = load(tmp_path).splits
    expected = np.concatenate([pixels["train-0"], pixels["train-1"]])
    assert (splits["train"][:, 0].numpy() == expected).all()
    assert (splits["validation"][:, 0].numpy() == pixels["val-0"]).all()
    assert (splits["test"][:, 0].numpy() == pixels["test"]).all()
    shard(tmp_path / "more.tar", members)
    assert any("outside the splits" in n and "more.tar" in n for n in load(tmp_path).notes)
    shard(tmp_path / "trainval.tar", members)
    with pytest.raises(ValueError, match=r"trainval\.tar/.* holds 'train' and is of no split"):
        load(tmp_path)
    for name in ("val-0", "test", "trainval"):
        (tmp_path / f"{name}.tar").unlink()
    with pytest.raises(ValueError, match=r"of the train split .* more\.tar/.* of none"):
        load(tmp_path)


def test_names_in_shards_are_never_paths(tmp_path):
    """Traversal, absolute names, links: nothing is written or followed."""
    secret = tmp_path / "secret.png"
    save(secret, random(H, W))
    members, pixels = labelled(3)
    members[0] = ("../../0000.png", members[0][1])
    members[1] = ("../../0000.cls", b"0")
    members[2] = ("/etc/0001.png", members[2][1])
    members[3] = ("/etc/0001.cls", b"1")
    path = shard(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind!r}.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert (whole(path, (1, H, W))[:, 0].numpy() == pixels).all()
    assert sorted(tmp_path.rglob("*")) == before


def cut(path: Path) -> None:
    members, _ = labelled(40)
    content = shard(path, members).read_bytes()
    path.write_bytes(content[: len(content) // 2 + 300])


def cut_in_the_last(path: Path) -> None:
    content = shard(path, [("0.png", encoded(random(64, 64)))]).read_bytes()
    path.write_bytes(content[:2000])


def cut_in_a_header(path: Path) -> None:
    members, _ = labelled(3)
    content = shard(path, members).read_bytes()
    path.write_bytes(content[: 1024 + 700])


def cut_before_the_end(path: Path) -> None:
    members, _ = labelled(2)
    path.write_bytes(shard(path, members).read_bytes()[: 4 * 1024])


def gzipped(path: Path) -> None:
    members, _ = labelled(3)
    path.write_bytes(gzip.compress(shard(path, members).read_bytes()))


def sparse(path: Path) -> None:
    """A header that claims 2^40 bytes of holes."""
    member = tarfile.TarInfo("0.png")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = bytes([0x80]) + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + b"\0" * 1024)


def bomb(path: Path) -> None:
    huge = bytearray(encoded(random(1, 1)))
    huge[16:24] = struct.pack(">II", 10**5, 10**5)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    shard(path, [("0.png", bytes(huge))])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (cut, r"cannot be read as a tar file: it is truncated"),
        (cut_in_the_last, r"cannot be read as a tar file: unexpected end"),
        (cut_in_a_header, r"cannot be read as a tar file: (it is cut|unexpected end)"),
        (cut_before_the_end, r"cannot be read as a tar file: it is truncated"),
        (gzipped, r"cannot be read as a tar file: .*without compression"),
        (sparse, r"cannot be read as a tar file: .*sparse"),
        (bomb, r"0\.png in .*x\.tar claims more than .* pixels"),
        (lambda path: path.write_bytes(b""), "cannot be read as a tar|no images"),
        (lambda path: path.write_bytes(random(5000).tobytes()), "cannot be read as a tar"),
        (lambda path: shard(path, [("a.txt", b"1")]), "has no images"),
        (lambda path: shard(path, [("0.png", b"no image")]), r"0\.png in .* cannot be read"),
        (lambda path: shard(path, 2 * [("0.png", encoded(random(H, W)))]), "two images 0"),
        (lambda path: shard(path, [("0.cls", b" "), *labelled(1)[0][:1]]), "0.cls .* is empty"),
    ],
)
def test_shards_refused(tmp_path, write, message):
    write(tmp_path / "x.tar")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "x.tar")
    assert "\n" not in str(error.value)


# idx files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path, suffix):
    train, test, y, y_test = random(20, H, W), random(6, H, W), np.arange(20) % 4, np.arange(6) % 4
    idx(tmp_path / f"train-images-idx3-ubyte{suffix}", train)
    idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", test)
    idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", y.astype(np.uint8))
    idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", y_test.astype(np.uint8))
    data = load(tmp_path, condition=["class"])
    assert data.schema.shape == (1, H, W) and data.schema.levels == 256
    assert (data.splits["test"][:, 0].numpy() == test).all()
    assert data.labels["test"][:, 0].tolist() == y_test.tolist()
    both = torch.cat([data.splits["train"], data.splits["validation"]])[:, 0].numpy()
    assert sorted(both.reshape(20, -1).tolist()) == sorted(train.reshape(20, -1).tolist())
    alone = load_like(tmp_path / f"train-images-idx3-ubyte{suffix}", data.schema)
    assert (alone.splits["all"][:, 0].numpy() == train).all()
    assert alone.labels["all"][:, 0].tolist() == y.tolist()


@pytest.mark.parametrize(
    ("kind", "code"), [("i1", 9), (">i2", 0x0B), (">i4", 0x0C), (">f4", 0x0D), (">f8", 0x0E)]
)
def test_idx_of_any_type(tmp_path, kind, code):
    x = (np.arange(24) % 7).reshape(6, 4).astype(kind)
    data = load(idx(tmp_path / "x.idx", x, code=code))
    assert data.schema.kind == ("real" if "f" in kind else "levels")
    for part in data.splits.values():
        assert all(row.tolist() in x.tolist() for row in part)


@pytest.mark.parametrize("name", ["x-idx3-ubyte", "x-idx3-ubyte.gz"])
@pytest.mark.parametrize("sizes", [(4, H, W), (6, H, W), (2**32 - 1,) * 3, (2**31, 2**31)])
def test_an_idx_header_that_lies(tmp_path, name, sizes):
    path = idx(tmp_path / name, random(5, H, W), sizes)
    with pytest.raises(ValueError, match=r"its header says .* bytes, and it holds (more|fewer)"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"\0\0\x07\x01\0\0\0\x01\0", b"\x01\0\x08\x01" * 4],
)
def test_idx_refused(tmp_path, content):
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.idx cannot be read as an idx file"):
        load(tmp_path / "x.idx")
    (tmp_path / "x.idx.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match=r"x\.idx\.gz cannot be read as an idx file"):
        load(tmp_path / "x.idx.gz")


# More than memory holds


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(encoded_images, "IN_MEMORY", 0)
    monkeypatch.setattr(rows, "CHUNK", 7 * H * W)


def many(folder: Path) -> Path:
    folder.mkdir()
    for k in range(3):
        shard(folder / f"{k}.tar", labelled(20, start=20 * k)[0])
    return folder


def test_what_is_read_later_is_the_same(tmp_path, monkeypatch, request):
    """Splits, labels, schema and hashes; by index, slice and in chunks."""
    source = many(tmp_path / "shards")
    whole = load(source, condition=["class"])
    request.getfixturevalue("unread")
    later = load(source, condition=["class"])
    assert later.schema == whole.schema
    for split, x in whole.splits.items():
        y = later.splits[split]
        assert isinstance(y, rows.Rows) and not isinstance(x, rows.Rows)
        assert y.shape == x.shape and len(y) == len(x)
        assert y[:].equal(x) and y[1:5:2].equal(x[1:5:2]) and y[-1].equal(x[-1])
        assert y[torch.tensor([3, 0])].equal(x[[3, 0]])
        assert torch.cat(list(y.split(4))).equal(x)
        assert (y.min(), y.max()) == (x.min(), x.max())
        assert fingerprint(y) == fingerprint(x)
        assert later.labels[split].equal(whole.labels[split])
    like = load_like(source, whole.schema).splits["all"]
    assert isinstance(like, rows.Rows) and len(like) == 60
    monkeypatch.undo()
    assert like[:].equal(load_like(source, whole.schema).splits["all"])


def test_training_does_not_see_where_images_are(tmp_path, monkeypatch, request):
    """The same weights from memory and from files, stopped and resumed; the same bound."""
    source, options = many(tmp_path / "shards"), {"batch": 8, "width": 8, "depth": 1}
    options |= {"evaluate_every": 3, "condition": ["class"], "augment": 0.5}
    one = train(str(source), tmp_path / "one", steps=6, **options)
    request.getfixturevalue("unread")
    two = train(str(source), tmp_path / "two", steps=6, **options)
    weights = [(run.path / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]
    assert one.config.hashes == two.config.hashes
    later = evaluate(two.model, two.batch()[0], calls=4)
    monkeypatch.undo()
    again = evaluate(two.model, two.batch()[0], calls=4)
    assert again.to_dict() == later.to_dict()  # errors that are not stated are NaN


def test_processes_share_the_examples_of_a_step():
    for step in range(4):
        whole = batch_indices(23, 10, step, seed=1)
        parts = [batch_indices(23, 10, step, 1, rank, 3) for rank in range(3)]
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    epoch = torch.cat(
        [batch_indices(20, 5, step, 1, rank, 2) for step in range(4) for rank in (0, 1)]
    )
    assert sorted(epoch.tolist()) == list(range(20))


def test_an_image_that_went_is_told_from_the_thread(tmp_path, unread):
    folder = tmp_path / "images"
    for i in range(10):
        save(folder / f"{i}.png", random(H, W))
    x = load(folder).splits["train"]
    ahead = rows.Ahead(lambda k: x[k : k + 1])
    assert ahead(0).equal(x[:1])
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        for k in range(1, 4):
            ahead(k)
