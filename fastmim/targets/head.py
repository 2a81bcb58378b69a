"""What heads have in common."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from fastmim.targets.frozen import Frozen


class Prediction(NamedTuple):
    """What a head gives.

    Attributes:
        loss: float32 scalar, the mean over all patches; None without images.
        per_patch: float32 [B, M], without gradient; None without images.
        pred: [B, M, outputs], what was compared; None where it is not formed.
    """

    loss: Tensor | None
    per_patch: Tensor | None
    pred: Tensor | None


class Head(nn.Module, ABC):
    """A linear to what is predicted, and its loss.

    `forward(x, images, ids)` takes features [B, M, width] of the patches `ids`, int64 [B, M], of uint8 images
    [B, H, W, C], and returns a `Prediction`; without images (None) nothing is compared. The linear runs inside
    `forward`, where ZeRO-3 has its weights.

    Attributes:
        outputs: values per patch.
        norm_pix: whether predictions lack the mean and contrast of their patch.
    """

    outputs: int
    norm_pix = False

    def to_pixels(self, pred: Tensor) -> Tensor:
        """Predictions as normalised pixels, float32 [B, M, P * P * C]; where they describe any."""
        raise NotImplementedError

    def images_to_prepare(self) -> int:
        """How many training images `prepare` wants; 0 skips it."""
        return 0

    def prepare(self, images: Tensor) -> None:
        """Fit on uint8 images [n, H, W, C] of the training set, once per run."""

    def frozen(self) -> dict[str, Frozen]:
        """Networks that are used and never trained, by the configuration's key that names their weights."""
        return {}

    @abstractmethod
    def flops(self, patches: int) -> int:
        """Analytic FLOPs of the linear's forward pass over this many patches."""
