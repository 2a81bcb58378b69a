"""Principal components of patches: MAE (He et al., CVPR 2022), Table 1d."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.flops import linear_flops
from fastmim.kernels import gather_patches
from fastmim.models.blocks import init_weights
from fastmim.models.pixels import PixelScale
from fastmim.models.statistics import Statistics
from fastmim.targets.head import Head, Prediction

_FITTED_AT_ONCE = 32


class PatchBasis(Statistics):
    """The directions along which patches vary most. NaN until they are fitted, so that no run trains without.

    Args:
        size: values in a patch, L.
        components: directions, k; at most L.

    Attributes:
        mean: float32 [L].
        components: float32 [k, L], orthonormal rows, those of larger variance first.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, size: int, components: int):
        super().__init__()
        self.register_buffer("mean", torch.full((size,), torch.nan))
        self.register_buffer("components", torch.full((components, size), torch.nan))

    def fit(self, count: int, total: Tensor, products: Tensor) -> None:
        """Fit to `count` patches of this sum, float64 [L], and sum of outer products, float64 [L, L].

        The largest entry of a direction is positive, as an eigenvector's sign is arbitrary.
        """
        mean = total / count
        _, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
        directions = vectors.T.flip(0)[: len(self.components)]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.mean.copy_(mean)
        self.components.copy_(directions * largest.sign())

    def coefficients(self, patches: Tensor) -> Tensor:
        """float32 patches [..., L] -> [..., k]."""
        return (patches - self.mean) @ self.components.T

    def patches(self, coefficients: Tensor) -> Tensor:
        """float32 coefficients [..., k] -> the patches [..., L] that they describe."""
        return coefficients @ self.components + self.mean


class PCAHead(Head):
    """A linear to the first principal coefficients of a patch, compared by mean squared error.

    Patches are in normalised pixels, not normalised each by itself.

    Args:
        config: of the run.
        width: of the features.
        scale: pixel statistics.

    Attributes:
        basis: fitted by `prepare` and stored with the weights.
    """

    def __init__(self, config: Config, width: int, scale: PixelScale):
        super().__init__()
        self.patch_size, self.scale = config.model.patch_size, scale
        self.outputs = config.target.components
        self.fit_images = config.target.fit_images
        self.basis = PatchBasis(self.patch_size**2 * config.data.channels, self.outputs)
        self.linear = nn.Linear(width, self.outputs)
        init_weights(self.linear)

    def forward(self, x: Tensor, images: Tensor | None, ids: Tensor) -> Prediction:
        """Compare predictions with the coefficients of the images' patches `ids`."""
        pred = self.linear(x)
        if images is None:
            return Prediction(None, None, pred)
        wanted = self.basis.coefficients(self._patches(images, ids))
        per_patch = (pred.float() - wanted).square().mean(-1)
        return Prediction(per_patch.mean(), per_patch.detach(), pred)

    def to_pixels(self, pred: Tensor) -> Tensor:
        """The patches that predicted coefficients describe."""
        return self.basis.patches(pred.float())

    def images_to_prepare(self) -> int:
        """As `target.fit_images` says."""
        return self.fit_images

    @torch.no_grad()
    def prepare(self, images: Tensor) -> None:
        """Fit the basis to all patches of these images; sums and eigenvectors are in float64."""
        size, (_, height, width, _) = self.patch_size, images.shape
        patches = (height // size) * (width // size)
        ids = torch.arange(patches, device=images.device)
        total = torch.zeros_like(self.basis.mean, dtype=torch.float64)
        products = total.outer(total)
        for part in images.split(_FITTED_AT_ONCE):
            rows = self._patches(part, ids.expand(len(part), -1)).flatten(0, 1).double()
            total, products = total + rows.sum(0), products + rows.T @ rows
        self.basis.fit(len(images) * patches, total, products)

    def flops(self, patches: int) -> int:
        """Of the linear over this many patches."""
        return linear_flops(patches, self.linear.in_features, self.outputs)

    def _patches(self, images: Tensor, ids: Tensor) -> Tensor:
        """Patches `ids` of uint8 images in normalised pixels, float32 [B, M, L]."""
        return gather_patches(images, ids, self.patch_size, self.scale.mean, self.scale.std, torch.float32)
