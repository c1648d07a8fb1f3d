"""Codes of examples by a model: bits-back, direct, and the blocks of a file."""
