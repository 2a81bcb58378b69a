"""What sample, crop and flip come when: pure functions of (seed, epoch, position), without generator state.

A run is one endless stream of global positions g. Epoch and position in the epoch follow from g alone, and
every random choice is a Philox draw whose counter is (draw, position, epoch, stream), so a resume needs one
integer and any number of ranks sees the same stream.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmim.config import DataConfig
from fastmim.kernels.philox import (
    STREAM_COLOR,
    STREAM_CROP,
    STREAM_FLIP,
    STREAM_ORDER,
    STREAM_SUBSTITUTE,
    philox_4x32,
)

_WORD = 2**32
_FEISTEL_ROUNDS = 8
_CROP_TRIES = 10


@dataclass(frozen=True)
class Plan:
    """What to decode, one row a sample; arrays [B], int64 unless said otherwise.

    From `top` on, [B, crops] where a schedule draws several crops of an image.
    """

    epoch: np.ndarray
    position: np.ndarray
    """Position in the epoch."""
    sample: np.ndarray
    """Row of the index."""
    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    """bool"""
    color: np.ndarray | None = None
    """float32 [B, 4] or [B, crops, 4]: factors of brightness, contrast and saturation, and a hue shift in turns."""

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, rows: np.ndarray | slice | list[int]) -> "Plan":
        """The plan of some rows; `rows` is anything that indexes an array."""
        parts: dict[str, Any] = {
            name: None if value is None else value[rows] for name, value in vars(self).items()
        }
        return Plan(**parts)

    def replace(self, row: int, one: "Plan") -> "Plan":
        """A copy in which one row is that of `one`."""
        parts: dict[str, Any] = {
            name: None if value is None else value.copy() for name, value in vars(self).items()
        }
        for name, value in parts.items():
            if value is not None:
                value[row] = getattr(one, name)[0]
        return Plan(**parts)


class Schedule:
    """The endless stream of samples, crops and flips.

    Args:
        heights, widths: int [n], pixels, of the upright images.
        seed: 64-bit key of every draw.
        config: crop, scale, aspect, flip, color_jitter, image_size and samples_per_epoch are read.
        crops: of each image.
    """

    def __init__(
        self, heights: np.ndarray, widths: np.ndarray, seed: int, config: DataConfig, crops: int = 1
    ):
        self.heights, self.widths = heights, widths
        self.seed, self.crops = seed, crops
        self.config = config
        self.n = len(heights)
        self.samples_per_epoch = config.samples_per_epoch or self.n

    def plan(self, positions: np.ndarray) -> Plan:
        """The samples at global positions [B] int64, with their windows, flips and colour factors."""
        positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        epoch, position = np.divmod(positions, self.samples_per_epoch)
        passes, place = np.divmod(position, self.n)
        return self.plan_of(epoch, position, permute(place, self.n, self.seed, epoch, passes))

    def plan_of(self, epoch: np.ndarray, position: np.ndarray, sample: np.ndarray) -> Plan:
        """As `plan`, for samples that are already chosen; int64 [B] each."""
        if self.crops == 1:
            return Plan(epoch, position, sample, *self._views(epoch, position, sample))
        each = (
            np.repeat(epoch, self.crops),
            repeat_positions(position, self.crops),
            np.repeat(sample, self.crops),
        )
        views = [
            None if view is None else view.reshape(len(sample), self.crops, *view.shape[1:])
            for view in self._views(*each)
        ]
        return Plan(epoch, position, sample, *views)

    def _views(self, epoch: np.ndarray, position: np.ndarray, sample: np.ndarray) -> list[Any]:
        """The fields of a plan from `top` on."""
        height = self.heights[sample].astype(np.int64)
        width = self.widths[sample].astype(np.int64)
        if self.config.crop == "center_crop":
            window = center_window(height, width, self.config.image_size)
        else:
            window = self._random_windows(epoch, position, height, width)
        flip = self._draw(0, epoch, position, STREAM_FLIP)[0] < int(self.config.flip * _WORD)
        return [*window, flip, self._color(epoch, position)]

    def substitute(self, epoch: np.ndarray, position: np.ndarray, attempt: int) -> np.ndarray:
        """The sample that stands in for an image that cannot be decoded: int64 [B]; attempts count from 0."""
        word = self._draw(attempt, epoch, position, STREAM_SUBSTITUTE)[0]
        return (word * self.n) >> 32

    def _draw(self, draw: int, epoch: np.ndarray, position: np.ndarray, stream: int) -> tuple:
        return philox_4x32(
            self.seed, draw, position & (_WORD - 1), epoch & (_WORD - 1), stream | (position >> 32) << 8
        )

    def _random_windows(
        self, epoch: np.ndarray, position: np.ndarray, height: np.ndarray, width: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """torchvision's RandomResizedCrop.get_params, one Philox call a try."""
        top, left, crop_height, crop_width = _fallback_windows(height, width, self.config.aspect)
        low, high = np.log(self.config.aspect)
        open_rows = np.arange(len(height))
        for attempt in range(_CROP_TRIES):
            words = self._draw(attempt, epoch[open_rows], position[open_rows], STREAM_CROP)
            rows_height, rows_width = height[open_rows], width[open_rows]
            area = rows_height * rows_width * _uniform(words[0], *self.config.scale)
            aspect = np.exp(_uniform(words[1], low, high))
            h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
            w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
            fits = (h > 0) & (w > 0) & (h <= rows_height) & (w <= rows_width)
            done = open_rows[fits]
            crop_height[done], crop_width[done] = h[fits], w[fits]
            top[done] = (words[2][fits] * (rows_height - h + 1)[fits]) >> 32
            left[done] = (words[3][fits] * (rows_width - w + 1)[fits]) >> 32
            open_rows = open_rows[~fits]
            if not len(open_rows):
                break
        return top, left, crop_height, crop_width

    def _color(self, epoch: np.ndarray, position: np.ndarray) -> np.ndarray | None:
        jitter = self.config.color_jitter
        if jitter is None:
            return None
        words = self._draw(0, epoch, position, STREAM_COLOR)
        factors = [
            _uniform(word, max(0.0, 1 - strength), 1 + strength)
            for word, strength in zip(
                words, (jitter.brightness, jitter.contrast, jitter.saturation), strict=False
            )
        ]
        return np.stack([*factors, _uniform(words[3], -jitter.hue, jitter.hue)], axis=1).astype(np.float32)


def repeat_positions(position: np.ndarray, repeats: int) -> np.ndarray:
    """Positions of their own for the repeats of images, int64 [B * repeats], side by side."""
    return (position[:, None] * repeats + np.arange(repeats)).ravel()


def permute(place: np.ndarray, n: int, seed: int, epoch: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """A seeded permutation of range(n), one for each (epoch, pass), evaluated at some places only.

    A Feistel network over the smallest even number of bits that holds n, whose round function is Philox;
    values of n or above walk along their cycle until they fall below it (Black and Rogaway, 2002).

    Args:
        place: int64 [B], in [0, n).
        n: size of the set, at least 1.
        seed: 64-bit key.
        epoch, passes: int64 [B]; passes counts the permutations inside an epoch longer than the set.

    Returns:
        int64 [B], in [0, n).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    epoch, stream = epoch & (_WORD - 1), STREAM_ORDER | passes << 8
    result = np.array(place, dtype=np.int64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & mask
        for r in range(_FEISTEL_ROUNDS):
            word = philox_4x32(seed, r, right, epoch[outside], stream[outside])[0]
            left, right = right, left ^ (word & mask)
        result[outside] = left << half | right
        outside = outside[result[outside] >= n]
    return result


def center_window(
    height: np.ndarray, width: np.ndarray, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Largest centred window of the target's aspect ratio.

    Args:
        height, width: int64 [B], pixels.
        image_size: height and width of the target.

    Returns:
        top, left, height, width: int64 [B] each.
    """
    target_height, target_width = image_size
    crop_height = np.minimum(height, np.rint(width * target_height / target_width).astype(np.int64))
    crop_width = np.minimum(width, np.rint(height * target_width / target_height).astype(np.int64))
    return _centred(height, width, np.maximum(crop_height, 1), np.maximum(crop_width, 1))


def _fallback_windows(height: np.ndarray, width: np.ndarray, aspect: tuple[float, float]):
    """torchvision's central crop for the images where no try fits."""
    ratio = width / height
    crop_height = np.where(ratio < min(aspect), np.rint(width / min(aspect)).astype(np.int64), height)
    crop_width = np.where(ratio > max(aspect), np.rint(height * max(aspect)).astype(np.int64), width)
    # One pixel wide images round to nothing, or past their edge.
    return _centred(height, width, np.clip(crop_height, 1, height), np.clip(crop_width, 1, width))


def _centred(height: np.ndarray, width: np.ndarray, crop_height: np.ndarray, crop_width: np.ndarray):
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _uniform(word: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * ((word + 0.5) / _WORD)
