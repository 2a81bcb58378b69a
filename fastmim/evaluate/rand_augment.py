"""timm's RandAugment of batches of bytes, in processes of its own, each draw given by the image's place in the epoch.

The processes import this module, so it loads nothing that they do not need.
"""

import multiprocessing
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor

from fastmim.config_data import DataConfig
from fastmim.ranks import cores_per_rank

_AHEAD = 2
_policy = None  # of a worker process


class RandAugment:
    """timm's RandAugment of batches of bytes, a few batches ahead, in their order.

    Args:
        policy: timm's name of it, such as rand-m9-mstd0.5-inc1.
        data: image_size, channels and mean are read.
        workers: processes; 0 works in this one, None takes one less than the cores of this rank.
    """

    def __init__(self, policy: str, data: DataConfig, workers: int | None):
        settings = (policy, min(data.image_size), tuple(round(255 * value) for value in data.mean))
        self._workers = cores_per_rank() - 1 if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None
        if self._workers:
            # Forked, a worker would inherit the locks of this process's decoding threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, settings)
        else:
            _start_worker(*settings)

    def __call__(self, batches: Iterator[Tensor], words: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """uint8 [b, H, W, C] on the CPU, of batches and of the `draws` of their images."""
        if self._pool is None:
            for batch, their in zip(batches, words, strict=True):
                yield torch.from_numpy(_augment(batch.numpy(), their))
            return
        waiting: deque[list[Future[np.ndarray]]] = deque()
        for batch, their in zip(batches, words, strict=True):
            parts = min(self._workers, len(their))
            shares = zip(np.array_split(batch.numpy(), parts), np.array_split(their, parts), strict=True)
            waiting.append([self._pool.submit(_augment, *share) for share in shares])
            if len(waiting) > _AHEAD:
                yield _collect(waiting.popleft())
        while waiting:
            yield _collect(waiting.popleft())

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _collect(shares: list[Future[np.ndarray]]) -> Tensor:
    return torch.from_numpy(np.concatenate([share.result() for share in shares]))


def _start_worker(policy: str, side: int, mean: tuple[int, ...]) -> None:
    global _policy
    hints = {
        "translate_const": int(0.45 * side),  # as timm's transforms_imagenet_train has it
        "img_mean": mean[0] if len(mean) == 1 else mean,
        "interpolation": Image.Resampling.BICUBIC,
    }
    _policy = rand_augment_transform(policy, hints)
    for operation in _policy.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    # timm's highest magnitude keeps no bit: a black image, which not every version of Pillow makes.
    return posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _augment(images: np.ndarray, words: np.ndarray) -> np.ndarray:
    """uint8 [b, H, W, C], of images like it and their draws [b, 4]."""
    assert _policy is not None, "a worker that was not started"
    results = np.empty_like(images)
    for image, their, result in zip(images, words, results, strict=True):
        random.seed(int(their[0]))
        np.random.seed(int(their[1]))
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        result[:] = np.asarray(_policy(picture)).reshape(result.shape)
    return results
