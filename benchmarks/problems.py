"""What a benchmark of a kernel is made of: a shape, random inputs, and a problem built from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A network on 224² RGB images: what sizes the kernels' inputs.

    `classes`: visual tokens of the discrete VAE that CAE and BEiT predict.
    """

    name: str
    patch_size: int
    width: int
    decoder_width: int = 512
    batch: int = 64
    side: int = 224
    channels: int = 3
    classes: int = 8192

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.side // self.patch_size, self.side // self.patch_size

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return math.prod(self.grid)

    @property
    def kept(self) -> int:
        """K, a quarter of them."""
        return self.patches // 4

    @property
    def removed(self) -> int:
        """M, the others."""
        return self.patches - self.kept

    @property
    def length(self) -> int:
        """L, values of a patch vector."""
        return self.patch_size**2 * self.channels


SHAPES = {
    shape.name: shape
    for shape in (Shape("ViT-B/16", 16, 768), Shape("ViT-L/16", 16, 1024), Shape("ViT-H/14", 14, 1280))
}


@dataclass(frozen=True)
class Problem:
    """One operation at one size.

    `fused` and `naive` take their arguments in order; what requires a gradient among those is differentiated,
    starting from every result that has a gradient. `floor` maps a pass ("forward", "backward") to the least
    bytes that it must move: every needed input byte once, every output byte once.
    """

    fused: Callable
    fused_args: tuple
    naive: Callable
    naive_args: tuple
    floor: dict[str, int]


class Inputs:
    """Random inputs of one shape, batch and dtype, on one device."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: str):
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.item = dtype.itemsize
        self.generator = torch.Generator(device).manual_seed(0)

    def floats(self, *sizes: int, grad: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers."""
        values = torch.randn(sizes, generator=self.generator, device=self.device)
        return values.to(dtype or self.dtype).requires_grad_(grad)

    def images(self) -> Tensor:
        """Return uint8 images [B, H, W, C]."""
        side, channels = self.shape.side, self.shape.channels
        sizes = (self.batch, side, side, channels)
        return torch.randint(0, 256, sizes, dtype=torch.uint8, generator=self.generator, device=self.device)

    def ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids_keep [B, K], ids_mask [B, M], ids_restore [B, N], int64.

        All three are contiguous, as a sampler hands them over.
        """
        sizes = (self.batch, self.shape.patches)
        shuffle = torch.rand(sizes, generator=self.generator, device=self.device).argsort(1)
        kept = self.shape.kept
        return shuffle[:, :kept].contiguous(), shuffle[:, kept:].contiguous(), shuffle.argsort(1)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return float32 constants [C]."""
        channels = self.shape.channels
        return tuple(torch.full((channels,), value, device=self.device) for value in (0.45, 0.225))
