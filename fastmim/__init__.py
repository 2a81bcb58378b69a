"""fastmim: a high-throughput engine for masked-image pre-training."""

from fastmim.nvjpeg import load_packaged

__version__ = "0.1.0"

load_packaged()
