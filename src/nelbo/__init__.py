"""nelbo: diffusion models you can measure in bits."""

__version__ = "0.1.0"
