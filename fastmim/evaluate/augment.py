"""What fine-tuning does to batches beside crops, flips and RandAugment: timm's erasing, mixup and cutmix.

Each draw is a function of (seed, epoch, position), or of (seed, step) where all images of a step share it.
"""

import random

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fastmim.evaluate.config_finetune import FinetuneConfig
from fastmim.kernels.philox import STREAM_AUGMENT, STREAM_MIX, philox_4x32
from fastmim.models.pixels import PixelScale


def draws(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """What the draws of an epoch's images start from: 32-bit words, int64 [n, 4], by position in the epoch."""
    return np.stack(philox_4x32(seed, 0, positions, np.full_like(positions, epoch), STREAM_AUGMENT), axis=1)


class Regularisation:
    """Random erasing, mixup, cutmix and label smoothing of a batch on the device that trains.

    Args:
        config: of the protocol.
        classes: C.
        scale: pixel statistics of the encoder.
    """

    def __init__(self, config: FinetuneConfig, classes: int, scale: PixelScale):
        self._seed, self._scale = config.seed, scale
        device = str(scale.mean.device)
        self._erase = RandomErasing(config.erasing, mode="pixel", device=device) if config.erasing else None
        self._mix = None
        if config.mixes:
            self._mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes
            )

    def __call__(self, images: Tensor, labels: Tensor, words: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        """Images and targets for the encoder and the cross-entropy.

        Args:
            images: uint8 [b, H, W, C].
            labels: int64 [b].
            words: `draws` of the images.
            step: of the whole training; all batches of one are mixed alike.

        Returns:
            float32 [b, H, W, C] in units where white is 1, or the bytes where nothing changes them; and shares of
            classes, float32 [b, C], where images are mixed, or the labels. A mixed image is paired with that at the
            mirrored place in the batch.
        """
        if self._erase is None and self._mix is None:
            return images, labels
        x = self._scale.normalize(images).permute(0, 3, 1, 2)
        if self._erase is not None:
            for image, their in zip(x, words, strict=True):
                random.seed(int(their[2]))
                torch.manual_seed(int(their[3]))
                self._erase(image)
        targets = labels
        if self._mix is not None:
            np.random.seed(philox_4x32(self._seed, 0, step, 0, STREAM_MIX)[0])
            x, targets = self._mix(x, labels)
        return x.permute(0, 2, 3, 1) * self._scale.std + self._scale.mean, targets


def folded_positions(steps: int, batch_size: int, parts: int, part: int) -> np.ndarray:
    """Positions in an epoch of the images that one of several parts of each step takes.

    The images of a step are mixed in mirrored pairs, the first with the last. Each part takes whole pairs and has them
    in mirrored places, so that the pairs are the same whatever the number of parts.

    Args:
        steps: S, in the epoch.
        batch_size: images in a step.
        parts: backward passes of all ranks in a step; divides `batch_size`.
        part: which.

    Returns:
        int64 [S, batch_size / parts].
    """
    size = batch_size // parts
    half = np.arange((batch_size + 1) // 2)
    pairs = np.stack([half, batch_size - 1 - half], axis=1).ravel()[:batch_size]
    own = pairs[part * size : (part + 1) * size]
    own = np.concatenate([own[::2], own[1::2][::-1]])
    return np.arange(steps)[:, None] * batch_size + own
