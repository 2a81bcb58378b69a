"""Random crops of images that were resized first: dense prediction's, which keep an image's shape."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fastmim.config_data import DataConfig
from fastmim.data.index import Index
from fastmim.data.schedule import Plan, Schedule
from fastmim.kernels.philox import STREAM_CROP, philox_4x32

_WORD = 2**32


@dataclass(frozen=True)
class Crops:
    """What of each image becomes which part of a square.

    Attributes:
        plan: windows, which lie inside their images, and flips.
        heights, widths: int64 [n], pixels of the square that the window fills, from its upper left corner.
    """

    plan: Plan
    heights: np.ndarray
    widths: np.ndarray

    def take(self, rows: slice) -> "Crops":
        """Some of them."""
        return Crops(self.plan.take(rows), self.heights[rows], self.widths[rows])


def random_crops(
    index: Index,
    rows: np.ndarray,
    positions: np.ndarray,
    data: DataConfig,
    seed: int,
    side: int,
    scale: tuple[float, float],
    flip: float,
    of: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Crops:
    """Squares of images of which one side is resized to a random multiple of the square's.

    Args:
        index: where the images are.
        rows: int64 [m], which of its images.
        positions: int64 [n], in the endless stream of images; every epoch has an order of its own.
        data: how the encoder's images are read.
        seed: of every draw.
        side: of the square, pixels.
        scale: of the resized side, lowest and highest.
        flip: probability.
        of: that side, of heights and widths: `np.minimum` or `np.maximum`.
    """
    settings = {"crop": "center_crop", "flip": flip, "color_jitter": None, "samples_per_epoch": None}
    config = data.model_copy(update=settings)
    plan = Schedule(index.heights[rows], index.widths[rows], seed, config).plan(positions)
    sample = rows[plan.sample]
    height, width = index.heights[sample].astype(np.int64), index.widths[sample].astype(np.int64)
    words = philox_4x32(seed, 0, plan.position, plan.epoch, np.full(len(plan), STREAM_CROP))
    drawn = scale[0] + (scale[1] - scale[0]) * (words[0] + 0.5) / _WORD
    # Pixels of an image that would fill the square's side.
    seen = np.maximum(1, np.rint(of(height, width) / drawn)).astype(np.int64)
    window = np.minimum(height, seen), np.minimum(width, seen)
    top, left = (
        (word * (whole - part + 1)) >> 32
        for word, whole, part in zip(words[1:3], (height, width), window, strict=True)
    )
    plan = replace(plan, sample=sample, top=top, left=left, height=window[0], width=window[1])
    return Crops(plan, *filled_part(side, window, seen))


def filled_part(side: int, window: tuple[np.ndarray, np.ndarray], seen: np.ndarray) -> list[np.ndarray]:
    """Pixels of a square that windows fill, height and width, where `seen` pixels of an image would fill its side."""
    return [np.clip(np.rint(side * part / seen), 1, side).astype(np.int64) for part in window]
