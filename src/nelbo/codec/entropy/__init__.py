"""Entropy coding: the stack of bits, and distributions over integers."""
