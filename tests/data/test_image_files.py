"""Image files of all kinds that Pillow reads; what is not read of them is counted and named."""

import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nelbo.data import Schema, load, load_like

RNG = np.random.default_rng(11)
H, W = 6, 9


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape or (H, W), dtype=np.uint8)


def test_all_kinds_of_a_folder_are_read(tmp_path):
    exact = {}
    for kind in ("png", "bmp", "tif", "tiff", "pgm", "TIF"):
        exact[f"a.{kind}"] = x = pixels()
        Image.fromarray(x).save(tmp_path / f"a.{kind}")
    (tmp_path / "notes.md").write_text("of images")
    (tmp_path / "b.svg").write_text("<svg/>")
    found = load(tmp_path)
    assert found.schema.shape == (1, H, W)
    like = load_like(tmp_path, found.schema).splits["all"]
    want = np.stack([exact[name] for name in sorted(exact)])[:, None]
    assert (like.numpy() == want).all()
    assert any(re.search("left out: (1 .md, 1 .svg|1 .svg, 1 .md)", n) for n in found.notes)
    colour = pixels(H, W, 3)
    Image.fromarray(colour).save(tmp_path / "z.webp", lossless=True)
    Image.fromarray(palette := pixels()).save(tmp_path / "y.gif")
    like = load_like(tmp_path, load(tmp_path).schema).splits["all"]
    assert (like[-1].numpy() == colour.transpose(2, 0, 1)).all()
    assert (like[-2].numpy() == palette).all()
    assert (like[:-2, 2].numpy() == want[:, 0]).all()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in sorted(exact):
            tar.add(tmp_path / name, f"{name[2:]}-{name}")
    assert len(load_like(tmp_path / "x.tar", load(tmp_path / "x.tar").schema).splits["all"]) == 6


def test_images_of_fewer_channels_are_counted(tmp_path):
    """Grey among colours, colours among transparent ones; and grey to a model of colours."""
    for i in range(4):
        Image.fromarray(grey := pixels()).save(tmp_path / f"a{i}.png")
    assert not any("channels" in note for note in load(tmp_path).notes)
    like = load_like(tmp_path, Schema("levels", (3, H, W), 256))
    assert (like.splits["all"][3].numpy() == grey).all()
    words = "of the {} images have fewer than {} channels: grey is repeated for each colour"
    assert any("4 " + words.format(4, 3) in note for note in like.notes)
    for i in range(6):
        Image.fromarray(pixels(H, W, 3)).save(tmp_path / f"b{i}.png")
    assert any("4 " + words.format(10, 3) in note for note in load(tmp_path).notes)
    Image.fromarray(pixels(H, W, 4)).save(tmp_path / "c.png")
    found = load(tmp_path)
    assert found.schema.shape == (4, H, W)
    assert any("10 " + words.format(11, 4) in note for note in found.notes)
    with pytest.raises(ValueError, match="channels"):
        load_like(tmp_path, Schema("levels", (1, H, W), 256))


def test_images_of_print_are_read_and_said(tmp_path):
    """CMYK, which cameras do not write and print shops do, and another end of the name of a JPEG;
    their colours are those that the four inks leave."""
    inks = np.zeros((H, W, 4), np.uint8)
    inks[..., 0], inks[..., 3] = 255, 51  # all of cyan takes the red, a fifth of black of the rest
    for name in ("a.tif", "b.jfif", "c.jpg", "d.tif"):
        kind = "TIFF" if name.endswith("tif") else "JPEG"
        Image.fromarray(inks, "CMYK").save(tmp_path / name, kind)
    found = load_like(tmp_path, Schema("levels", (3, H, W), 256))
    assert len(found.splits["all"]) == 4
    want = torch.tensor([0, 204, 204], dtype=torch.uint8)[:, None, None]
    assert (found.splits["all"][0] == want).all()
    assert (found.splits["all"].int() - want.int()).abs().max() <= 2  # of JPEG
    assert "4 CMYK images converted to RGB without a colour profile" in found.notes


TURNS = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True)}
TURNS |= {5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "deep.png"])
@pytest.mark.parametrize("way", range(1, 9))
def test_orientation_is_applied_and_said(tmp_path, kind, way):
    """By the definition of EXIF: which corner of what is stored is the first of what is seen."""
    x = pixels().astype(np.uint16) * 257 if kind == "deep.png" else pixels()
    exif = Image.Exif()
    exif[0x0112] = way
    options = {"lossless": True} if kind == "webp" else {}
    for i in range(3):
        Image.fromarray(x).save(tmp_path / f"{i}.{kind}", exif=exif, **options)
    found = load(tmp_path)
    quarter, mirror = TURNS[way]
    want = np.rot90(x, quarter)
    want = want[:, ::-1] if mirror else want
    assert (found.splits["train"][0, 0].numpy() == want).all()
    assert any("3 images rotated according to their EXIF" in n for n in found.notes) == (way != 1)


def test_further_frames_are_counted(tmp_path):
    kinds = {"png": 2, "gif": 3, "webp": 1, "tif": 4, "bmp": 0}
    for i, (kind, more) in enumerate(kinds.items()):
        first, *others = [Image.fromarray(pixels()) for _ in range(1 + more)]
        options = {"save_all": True, "append_images": others} if more else {}
        first.save(tmp_path / f"{i}.{kind}", **options)
    notes = load(tmp_path).notes
    assert any("first frame of 4 images with several frames is used; 10 other" in n for n in notes)


def test_linked_folders_are_followed_once(tmp_path):
    for name in ("set/cat", "set/dog", "elsewhere/bird"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(pixels()).save(tmp_path / name / f"{i}.png")
    (tmp_path / "set" / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
    (tmp_path / "set" / "dog" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    found = load(tmp_path / "set", condition=["class"])
    assert found.schema.condition[0].classes == ("bird", "cat", "dog")
    assert sum(map(len, found.splits.values())) == 12
    told = " ".join(found.notes)
    assert "bird is a link to" in told and "followed" in told
    assert "dog/up is a link" in told and "read already" in told
    assert "1 that are not files" in told


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root lists all")
def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    (tmp_path / "b").mkdir(mode=0)
    with pytest.raises(PermissionError):
        load(tmp_path)


def test_images_of_one_bit_have_two_levels(tmp_path):
    x = RNG.integers(0, 2, (5, H, W)).astype(bool)
    for i in range(5):
        Image.fromarray(x[i]).save(tmp_path / f"{i}.png")
    found = load(tmp_path)
    assert found.schema.levels == 2 and any("2 levels" in n for n in found.notes)
    like = load_like(tmp_path, found.schema).splits["all"]
    assert torch.equal(like[:, 0], torch.from_numpy(x).byte())
    wide = load(tmp_path, levels=256)
    assert wide.schema.levels == 256
    assert torch.equal(load_like(tmp_path, wide.schema).splits["all"][:, 0], 255 * like[:, 0])
    assert load(tmp_path, size=4).schema.levels == 256


def test_numbers_of_other_widths_are_refused_or_whole(tmp_path):
    deep = RNG.integers(0, 65536, (4, H, W), dtype=np.uint16)
    for i in range(4):
        Image.fromarray(deep[i]).save(tmp_path / f"{i}.tif")
    found = load(tmp_path)
    assert found.schema.levels == 65536
    like = load_like(tmp_path, found.schema).splits["all"]
    assert (like[:, 0].numpy() == deep).all()
    for mode in (np.int32, np.float32):
        Image.fromarray(deep[0].astype(mode)).save(Path(tmp_path) / "4.tif")
        with pytest.raises(ValueError, match=r"4\.tif has the colour mode [IF]"):
            load(tmp_path)


def test_what_a_file_of_pixels_would_lose_is_not_compressed(tmp_path):
    from nelbo.codec.format import pictures, texts

    schema = Schema("levels", (1, 4, 4), 256)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels()).save(tmp_path / "a" / "0.png", exif=exif)
    with pytest.raises(ValueError, match=r"0\.png is rotated by its EXIF orientation"):
        pictures.read(tmp_path / "a", schema)
    Image.fromarray(pixels()).save(tmp_path / "a" / "0.png")
    assert len(pictures.read(tmp_path / "a", schema)[0])
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    text = Schema("levels", (4,), 256, alphabet="")
    for read, of in ((pictures.read, schema), (texts.read, text)):
        with pytest.raises(ValueError, match="b is a link to a folder"):
            read(tmp_path / "a", of)
