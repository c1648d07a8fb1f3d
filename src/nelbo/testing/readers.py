"""Contract of readers of files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nelbo.data.readers.encoded import Form
from nelbo.data.schema import fingerprint
from nelbo.data.sources import READERS, find_reader, load, load_like


class ReaderContract:
    """Files become the examples that are in them, or a ValueError. Give the method `write`.

    `examples` may be replaced, where the files hold others than grey images of 8 bits.
    """

    #: (N, C, H, W) or whatever shape the files keep
    examples = np.random.default_rng(0).integers(0, 256, (20, 1, 5, 7), dtype=np.uint8)

    @staticmethod
    def write(folder: Path, x: np.ndarray) -> Path:
        """Write the examples below an empty folder; return the source that `load` is given."""
        raise NotImplementedError

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """Where the examples were written."""
        (tmp_path / "source").mkdir()
        return self.write(tmp_path / "source", self.examples)

    def test_every_example_is_read_exactly(self, source: Path) -> None:
        """The splits are the examples, each once."""
        dataset = load(source)
        parts = [part[:] for part in dataset.splits.values()]
        assert dataset.schema.shape == self.examples.shape[1:]
        read = sorted(row.numpy().tolist() for part in parts for row in part)
        assert read == sorted(self.examples.tolist())

    def test_reading_twice_gives_the_same(self, source: Path) -> None:
        """Splits and their order do not change, so that a run finds its data again."""
        first, again = load(source), load(source)
        assert first.schema == again.schema
        for name, part in first.splits.items():
            assert fingerprint(part) == fingerprint(again.splits[name])

    def test_rows_are_read_by_index(self, source: Path) -> None:
        """A selection is what all of it holds there, also where rows are read when asked for."""
        for part in load(source).splits.values():
            rows = torch.arange(len(part)).flip(0)
            assert torch.equal(part[rows], part[:].flip(0))

    def test_each_example_has_its_label(self, source: Path) -> None:
        """Labels, where files have them, are one for each example of each part, or none."""
        reader = find_reader(source)
        assert reader is not None, f"no reader knows {source}; the first of {[*READERS]} would"
        found = reader.read(source, Form(), None)
        for name, labels in found.labels.items():
            assert labels.keys() == found.parts.keys(), f"labels {name} of other parts"
            for part, values in labels.items():
                assert np.shape(values) == (len(found.parts[part]),), f"labels {name} of {part}"

    def test_it_is_read_for_a_model(self, source: Path) -> None:
        """`load_like` reads for a schema what `load` reads without one."""
        dataset = load_like(source, load(source).schema)
        assert len(dataset.splits["all"]) == len(self.examples)

    def test_a_cut_file_is_refused(self, source: Path) -> None:
        """A file that ends within an example is a ValueError of one line that names the source."""
        files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
        for file in files:
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2 + 1])
        with pytest.raises(ValueError, match=str(source.name)) as refused:
            for part in load(source).splits.values():
                part[:]
        assert "\n" not in str(refused.value)
