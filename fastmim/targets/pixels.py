"""Pixels, as they are or normalised per patch."""

from torch import Tensor, nn

from fastmim.config import Config
from fastmim.flops import linear_flops
from fastmim.kernels import masked_pixel_loss
from fastmim.models.blocks import init_weights
from fastmim.models.pixels import PixelScale
from fastmim.targets.head import Head, Prediction


class PixelHead(Head):
    """A linear to the pixels of a patch, compared by mean squared error, or mean absolute error for SimMIM.

    Args:
        config: of the run.
        width: of the features.
        scale: pixel statistics.

    Attributes:
        norm_pix: whether a target patch is normalised by its own mean and variance.
    """

    def __init__(self, config: Config, width: int, scale: PixelScale):
        super().__init__()
        self.patch_size = config.model.patch_size
        self.outputs = self.patch_size**2 * config.data.channels
        self.norm_pix = config.objective.norm_pix_loss
        self.compared_by = "l1" if config.objective.name == "simmim" else "mse"
        self.scale = scale
        self.linear = nn.Linear(width, self.outputs)
        init_weights(self.linear)

    def forward(self, x: Tensor, images: Tensor | None, ids: Tensor) -> Prediction:
        """Compare predictions with the images' patches `ids`."""
        pred = self.linear(x)
        if images is None:
            return Prediction(None, None, pred)
        mean, std = self.scale.mean, self.scale.std
        loss, per_patch = masked_pixel_loss(
            pred, images, ids, self.patch_size, mean, std, self.norm_pix, self.compared_by
        )
        return Prediction(loss, per_patch, pred)

    def to_pixels(self, pred: Tensor) -> Tensor:
        """The predictions themselves; under `norm_pix` they lack mean and contrast."""
        return pred.float()

    def flops(self, patches: int) -> int:
        """Of the linear over this many patches."""
        return linear_flops(patches, self.linear.in_features, self.outputs)
