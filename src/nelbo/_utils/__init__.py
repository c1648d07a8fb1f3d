"""Helpers without mathematics of their own: numerics, files, limits, processes, terminals."""
