"""Samplers, and draws of unknown dimensions given known ones."""
