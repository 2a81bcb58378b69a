"""What is predicted: a head owns the last linear of a network and the comparison with its target."""

from fastmim.config import Config
from fastmim.models.pixels import PixelScale
from fastmim.targets.features import FeatureHead
from fastmim.targets.head import Head
from fastmim.targets.pca import PCAHead
from fastmim.targets.pixels import PixelHead
from fastmim.targets.tokens import TokenHead

HEADS = {"pixels": PixelHead, "pca": PCAHead, "tokens": TokenHead, "features": FeatureHead}


def build_head(config: Config, width: int, scale: PixelScale) -> Head:
    """The head that `target.kind` asks for.

    Args:
        config: of the run.
        width: of the features that it reads.
        scale: pixel statistics.
    """
    return HEADS[config.target_kind](config, width, scale)


__all__ = ["FeatureHead", "Head", "PCAHead", "PixelHead", "TokenHead", "build_head"]
