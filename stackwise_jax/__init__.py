"""Train transformers larger than the accelerator, one stack at a time."""

__version__ = "0.1.0"
