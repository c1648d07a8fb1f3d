"""Missing labels are missing: no class of theirs, no index, and their examples are P(x)."""

import math
from io import BytesIO

import numpy as np
import pytest
import torch
from data.test_splits import picture, tar
from PIL import Image

from nelbo import data, evaluate
from nelbo.diffusion.batch import Batch
from nelbo.models.conditioning import encode
from nelbo.runs.train import train

RNG = np.random.default_rng(9)
X = RNG.integers(0, 6, (40, 4))


def arrays(path, **named):
    np.savez(path, **named)
    return path


def check(source, classes, lacking):
    """These classes, and so many examples of all splits without any."""
    found = data.load(source, condition=["class"])
    assert found.schema.condition[0].classes == classes
    labels = torch.cat(list(found.labels.values()))
    assert int(labels.isnan().sum()) == lacking
    assert labels[~labels.isnan()].max() == len(classes) - 1 and not (labels < 0).any()
    said = [note for note in found.notes if "without class" in note]
    assert len(said) == bool(lacking) and all("by P(x)" in note for note in said)
    like = data.load_like(source, found.schema)
    assert int(like.labels["all"].isnan().sum()) == lacking
    assert any("without class" in note for note in like.notes) == bool(lacking)
    return found


def test_codes_of_arrays(tmp_path):
    y = np.arange(40) % 3
    y[:5] = -1
    check(arrays(tmp_path / "x.npz", x=X, y=y), ("0", "1", "2"), 5)
    words = np.where(y < 0, "", np.array(["cat", "dog", "owl"])[y])
    check(arrays(tmp_path / "w.npz", x=X, y=words), ("cat", "dog", "owl"), 5)
    signs = np.where(y > 0, 1, -1)  # two classes, as of support vector machines
    check(arrays(tmp_path / "s.npz", x=X, y=signs), ("-1", "1"), 0)
    parts = {"x_train": X, "y_train": y.clip(0, 1), "x_test": X[:7], "y_test": np.full(7, -1)}
    found = check(arrays(tmp_path / "t.npz", **parts), ("0", "1"), 7)
    assert found.labels["test"].isnan().all()
    both = np.arange(40) % 3 - 1
    with pytest.raises(ValueError, match=r"-1, 0 and 1: three classes, or two and -1 for none"):
        data.load(arrays(tmp_path / "b.npz", x=X, y=both), condition=["class"])


def test_numbers_that_are_missing(tmp_path):
    y = np.linspace(-1, 3, 40)
    y[7] = np.nan
    found = data.load(arrays(tmp_path / "x.npz", x=X, y=y), condition=["y"])
    (label,) = found.schema.condition
    train_labels = found.labels["train"][:, 0]
    assert label.mean == pytest.approx(train_labels.nanmean().item())
    assert math.isfinite(label.spread)
    features = encode(torch.tensor([[math.nan], [label.mean]], dtype=torch.float64), found.schema)
    assert features.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match="is inf"):
        data.load(arrays(tmp_path / "i.npz", x=X, y=np.where(y > 2, np.inf, y)), condition=["y"])


def test_shards_and_folders(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for i in range(12):
            content = BytesIO()
            picture().save(content, "PNG")
            for name, some in ((f"{i}.png", content.getvalue()), (f"{i}.cls", b"%d" % (i % 2))):
                if name != "3.cls":
                    member = tarfile.TarInfo(name)
                    member.size = len(some)
                    file.addfile(member, BytesIO(some))
    check(tmp_path / "x.tar", ("0", "1"), 1)
    for name in ("train/a", "train/b", "test"):
        (tmp_path / "f" / name).mkdir(parents=True)
        for i in range(6):
            picture().save(tmp_path / "f" / name / f"{i}.png")
    check(tmp_path / "f", ("a", "b"), 6)


def test_dots_in_the_names_of_a_shard(tmp_path):
    found = data.load(tar(tmp_path / "x.tar", [f"im.{i}.v2.png" for i in range(6)]))
    assert sum(map(len, found.splits.values())) == 6
    names = [f"{i}.{field}.png" for i in range(4) for field in ("left", "right")]
    with pytest.raises(ValueError, match=r"several images of one example, 0\.left\.png and 0\.ri"):
        data.load(tar(tmp_path / "y.tar", names))
    beside = data.load(
        tar(tmp_path / "z.tar", [f"{i}{e}.png" for i in range(4) for e in ("", ".seg")])
    )
    assert sum(map(len, beside.splits.values())) == 4
    assert any("members .seg.png ignored" in note for note in beside.notes)


def test_features_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(RNG.integers(0, 256, (5, 7), dtype=np.uint8)) for _ in range(20)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "class": datasets.ClassLabel(names=["cat", "dog", "owl"]),
            "word": datasets.Value("string"),
            "count": datasets.Value("int64"),
        }
    )

    def rows(n, **cells):
        return datasets.Dataset.from_dict({"image": images[:n], **cells}, features=features)

    some = [i % 3 for i in range(17)] + [None, -1, None]
    train_rows = rows(
        20, **{"class": some}, word=["a", None, "b", "b"] * 5, count=[1, 2, 2, None] * 5
    )
    test_rows = rows(4, **{"class": [-1] * 4}, word=["b"] * 4, count=[1] * 4)
    datasets.DatasetDict({"train": train_rows, "test": test_rows}).save_to_disk(tmp_path / "d")
    source = f"hub:{tmp_path / 'd'}"
    found = check(source, ("cat", "dog", "owl"), 7)
    assert found.labels["test"].isnan().all()
    for name, classes in (("word", ("a", "b")), ("count", ("1", "2"))):
        found = data.load(source, condition=[name])
        assert found.schema.condition[0].classes == classes
        assert sum(int(y.isnan().sum()) for y in found.labels.values()) == 5


def test_a_run_says_of_how_many_it_is_a_bound_on_p_of_x(tmp_path):
    y = np.arange(40) % 3
    y[::4] = -1
    source = arrays(tmp_path / "x.npz", x=X, y=y)
    tiny = {"steps": 3, "batch": 4, "width": 8, "depth": 1}
    run = train(source, tmp_path / "run", condition=["class"], **tiny)
    said: list[str] = []
    batch, _ = run.batch(source, tell=said.append)
    assert any("without class: 10 of 40" in line for line in said)
    result = evaluate(run.model, batch, calls=8)
    assert result.given == "class, where it is known, which 10 of 40 are not"
    assert math.isfinite(result.nats)
    rows = torch.tensor([0, 4, 8])  # without a class
    alone = evaluate(run.model, Batch(batch.x[rows], torch.zeros(3, 4), "nothing"), calls=8)
    own = evaluate(run.model, batch[rows], calls=8)
    assert own.nats == alone.nats
    drawn = run.conditions(50)
    assert drawn is not None and drawn[:, 1:].sum(1).eq(1).all()  # samples have a class each
