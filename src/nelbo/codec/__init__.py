"""Spend the bits: a lossless compressor whose file length is the bound (docs/codec.md)."""
