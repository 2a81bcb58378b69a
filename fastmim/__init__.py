"""fastmim: a high-throughput engine for masked-image pre-training."""

__version__ = "0.1.0"
