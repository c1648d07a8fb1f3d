"""Read data sets as tensors, with a schema that describes one example."""

from nelbo.data.schema import Dataset, Label, Schema, as_examples, fingerprint
from nelbo.data.sources import load, load_like

__all__ = ["Dataset", "Label", "Schema", "as_examples", "fingerprint", "load", "load_like"]
