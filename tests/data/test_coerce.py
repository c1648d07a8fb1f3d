"""Data in memory, of whatever kind, are read as a file or folder of the same would be."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nelbo.data import Schema, load, load_like
from nelbo.data.coerce import spilled

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 7, (30, 4, 5)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (20, 4, 5, 3)).astype(np.uint8)
CLASS = np.arange(30) % 3
OF_GREY = Schema("levels", (1, 4, 5), 7)


class Examples(Dataset):
    """A data set of torch: pairs of an image and its class."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return len(GREY)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        return self.transform(GREY[i]), int(CLASS[i])


def assert_same(found, wanted, labels=True):
    assert found.schema == wanted.schema
    assert found.splits.keys() == wanted.splits.keys()
    assert all(torch.equal(found.splits[k], wanted.splits[k]) for k in wanted.splits)
    for k in wanted.labels if labels else ():
        assert torch.equal(found.labels[k], wanted.labels[k])


@pytest.fixture
def by_file(tmp_path):
    np.savez(tmp_path / "x.npz", x=GREY, y=CLASS)
    return load(tmp_path / "x.npz", condition=["class"])


@pytest.mark.parametrize(
    "same",
    [
        lambda: {"x": GREY, "y": CLASS},
        lambda: {"images": torch.tensor(GREY), "labels": torch.tensor(CLASS), "about": "text"},
        lambda: DataLoader(TensorDataset(torch.tensor(GREY), torch.tensor(CLASS)), batch_size=7),
        lambda: Examples(lambda x: torch.tensor(x[None])),
        lambda: ((GREY[i : i + 8], CLASS[i : i + 8]) for i in range(0, 30, 8)),
        lambda: ({"x": GREY[i : i + 8], "label": CLASS[i : i + 8]} for i in range(0, 30, 8)),
    ],
)
def test_examples_with_labels(by_file, same):
    assert_same(load(same(), condition=["class"]), by_file)


@pytest.mark.parametrize(
    "same",
    [
        lambda: GREY,
        lambda: torch.tensor(GREY),
        lambda: GREY.tolist(),
        lambda: list(torch.tensor(GREY)),
        lambda: [GREY[i] for i in range(30)],
        lambda: iter(np.array_split(GREY, 4)),
        lambda: DataLoader(torch.tensor(GREY), batch_size=4),
    ],
)
def test_examples_alone(tmp_path, same):
    np.save(tmp_path / "x.npy", GREY)
    wanted = load(tmp_path / "x.npy")
    if not isinstance(same(), list) or not isinstance(same()[0], list):
        assert_same(load(same()), wanted)
    like = load_like(same(), OF_GREY).splits["all"]
    assert torch.equal(like, torch.tensor(GREY)[:, None])


def test_images_are_those_of_a_folder(tmp_path):
    images = [Image.fromarray(each) for each in COLOUR]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i:02}.png")
    assert_same(load(images), load(tmp_path))
    assert_same(load(images, size=3), load(tmp_path, size=3))
    palette = [image.convert("P") for image in images]
    assert load(palette).schema.shape == (3, 4, 5)
    grey = [Image.fromarray(each * 40) for each in GREY]
    found = load({"train": grey[:20], "test": grey[20:]})
    assert torch.equal(found.splits["test"], torch.tensor(GREY[20:, None]) * 40)
    with pytest.raises(ValueError, match=r"image 1 of the data is 3x4"):
        load([images[0], images[1].resize((3, 4))])
    with pytest.raises(ValueError, match=r"this is one image; give \[image\]"):
        load(images[0])


def test_pairs_of_an_image_and_a_class(by_file):
    found = load(Examples(lambda x: Image.fromarray(x * 40)), condition=["class"])
    assert torch.equal(found.splits["train"], by_file.splits["train"] * 40)
    assert torch.equal(found.labels["train"], by_file.labels["train"])


def test_texts_are_lines_of_a_file(tmp_path):
    texts = [f"line {i % 7} of a text" for i in range(200)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    for some in (texts, tuple(texts), np.array(texts)):
        assert_same(load(some, size=16), load(tmp_path / "t.txt", size=16))
    schema = load(texts, size=16).schema
    assert torch.equal(
        load_like(texts, schema).splits["all"],
        load_like(tmp_path / "t.txt", schema).splits["all"],
    )


def test_tables_of_other_kinds(tmp_path):
    pl, pd = pytest.importorskip("polars"), pytest.importorskip("pandas")
    columns = {"a": [0.5, None, *RNG.normal(size=38).tolist()], "b": [*"xyzz"] * 10}
    wanted = load(pl.DataFrame(columns))
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for some in (columns, pd.DataFrame(columns), pl.DataFrame(columns).lazy(), records):
        found = load(some)
        assert found.schema == wanted.schema
        torch.testing.assert_close(
            found.splits["train"], wanted.splits["train"], equal_nan=True, rtol=0, atol=0
        )
    assert load(pd.Series(columns["b"], name="b")).schema.columns == wanted.schema.columns[1:]
    frame = pl.DataFrame(columns)
    parts = load({"train": frame[:30], "test": frame[30:]})
    assert len(parts.splits["test"]) == 10 and parts.schema.columns == wanted.schema.columns
    assert len(parts.splits["train"]) + len(parts.splits["validation"]) == 30
    with pytest.raises(ValueError, match="must have the same columns; got a, b and b"):
        load({"train": frame, "test": frame[["b"]]})


def test_data_sets_of_datasets_are_as_from_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    feature = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    images = [Image.fromarray(each * 40) for each in GREY]
    whole = datasets.Dataset.from_dict({"image": images, "label": CLASS}, features=feature)
    both = datasets.DatasetDict(
        {"train": whole.select(range(24)), "test": whole.select([*range(24, 30)])}
    )
    both.save_to_disk(tmp_path / "images")
    for condition in ((), ("label",)):
        assert_same(
            load(both, condition=condition),
            load(f"hub:{tmp_path / 'images'}", condition=condition),
        )
    found = load(both, condition=["label"])
    assert found.schema.condition[0].classes == ("a", "b", "c") and len(found.splits["test"]) == 6
    like = load_like(both["test"], found.schema)
    assert torch.equal(like.splits["all"], found.splits["test"])
    texts = datasets.Dataset.from_dict({"text": ["to be or not to be "] * 60})
    assert load(texts, size=8).schema.alphabet == "\n benort"
    rows = datasets.Dataset.from_dict({"n": [*range(40)], "word": [*"aabb"] * 10})
    assert [c.name for c in load(rows).schema.columns] == ["n", "word"]
    split = load(datasets.DatasetDict({"train": rows, "test": rows.select(range(10))}))
    assert len(split.splits["test"]) == 10


def test_batches_are_held_in_a_file_and_not_in_memory(tmp_path, monkeypatch):
    """No more than one batch is alive at a time, and the array is mapped from a file."""
    import gc
    import weakref

    alive = []
    gc.freeze()  # of what other tests left

    def batches():
        for i in range(6):
            gc.collect()
            assert sum(each() is not None for each in alive) <= 1
            batch = np.full((50, 3), float(i)) + RNG.normal(size=(50, 3))
            alive.append(weakref.ref(batch))
            yield batch

    array = spilled(batches())
    assert isinstance(array, np.memmap) and array.shape == (300, 3)
    assert load(batches()).schema.kind == "real"
    gc.unfreeze()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (object(), "data must be an array .* got object"),
        (iter([]), "gave none; a generator is empty once it has been read"),
        (iter([np.zeros(3)]), r"shape \(3,\), and a batch of examples has"),
        (iter([np.zeros((2, 3)), np.zeros((2, 4))]), r"batch 1 has examples of float64 \(4,\)"),
        ([np.zeros((2, 3)), np.zeros(2)], r'different shapes, .* give \{"x": examples'),
        ({"one": GREY, "other": GREY}, "holds the arrays one, other; name the examples x_train"),
        (np.array([["a"]]), "array of numbers; got one of the type <U1"),
        (GREY / 6, r"leads on"),
    ],
)  # fmt: skip
def test_anything_else_is_one_sentence(wrong, message):
    if message == "leads on":
        with pytest.raises(ValueError, match=r"scaled to \[0, 1\], give np\.rint\(6 \* x\)"):
            load_like(wrong, OF_GREY)
        return
    with pytest.raises(ValueError, match=message) as error:
        load(wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (GREY[0], r"this is one example, so give x\[None\]"),
        (GREY.reshape(30, -1), r"give x\.reshape\(-1, 1, 4, 5\)"),
        (GREY[:, :2], r"the shape \(2, 5\) where \(1, 4, 5\) is needed"),
        (GREY + 1, "holds the value 7, beyond the 7 levels"),
        (GREY[:0], r"the data is empty: its shape is \(0, 4, 5\); give at least 1 example"),
        ([1, 2, 3], r"a list of 3 numbers where .* needed; give an array \(N, 1, 4, 5\)"),
        ({"a": [1, 2]}, r"is a table, and the model takes examples \(N, 1, 4, 5\); give"),
        ([Image.new("L", (3, 3))], r"shape \(1, 3, 3\) where \(1, 4, 5\) is needed"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_model_is_one_sentence(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        load_like(wrong, OF_GREY)
    assert "\n" not in str(error.value)


def test_channels_are_turned_only_as_the_model_has_them():
    schema = Schema("levels", (3, 4, 5), 256)
    last = load_like(COLOUR, schema)
    assert torch.equal(last.splits["all"], torch.tensor(COLOUR).movedim(3, 1))
    assert any("channels last" in note for note in last.notes)
    first = load_like(np.moveaxis(COLOUR, 3, 1), schema)
    assert torch.equal(first.splits["all"], last.splits["all"]) and not first.notes
