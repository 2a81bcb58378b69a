"""Images of a data set, batch by batch, decoded ahead in constant memory; each once, or none."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastmim.config_data import DataConfig
from fastmim.data.decoder import DECODE_ERRORS, Decoder, Probe
from fastmim.data.index import Index
from fastmim.data.loader import exact_device
from fastmim.data.schedule import Plan, Schedule
from fastmim.errors import DataError
from fastmim.ranks import cores_per_rank

_AHEAD = 2


def centre_plan(index: Index, rows: np.ndarray, config: DataConfig, side: float) -> Plan:
    """Centre crops of some images, in their order, not flipped.

    Args:
        index: the images.
        rows: int64 [n].
        config: image_size is read.
        side: of the crop over that of the largest one that fits; 224/256 is torchvision's Resize(256) and
            CenterCrop(224), in one step.
    """
    config = config.model_copy(update={"crop": "center_crop", "flip": 0.0, "color_jitter": None})
    plan = Schedule(index.heights, index.widths, 0, config).plan_of(np.zeros_like(rows), rows, rows)
    height, width = (
        np.maximum(1, np.rint(full * side)).astype(np.int64) for full in (plan.height, plan.width)
    )
    top, left = plan.top + (plan.height - height) // 2, plan.left + (plan.width - width) // 2
    return replace(plan, top=top, left=left, height=height, width=width)


def random_plan(index: Index, rows: np.ndarray, config: DataConfig, seed: int, epoch: int) -> Plan:
    """Random crops and flips of some images, in the random order of an epoch.

    Args:
        index: the images.
        rows: int64 [n].
        config: image_size, scale, aspect and flip are read.
        seed: of every draw.
        epoch: counts from 0; each has another order, crops and flips.
    """
    settings = {"crop": "random_resized_crop", "color_jitter": None, "samples_per_epoch": None}
    config = config.model_copy(update=settings)
    n = len(rows)
    schedule = Schedule(index.heights[rows], index.widths[rows], seed, config)
    plan = schedule.plan(epoch * n + np.arange(n))
    return replace(plan, sample=rows[plan.sample])


def decode(index: Index, config: DataConfig, plan: Plan, size: int, device: torch.device) -> Iterator[Tensor]:
    """The images of a plan, uint8 [at most size, H, W, C], on `device`.

    Args:
        index: the images.
        config: image_size and channels are read.
        plan: what to decode; without colour factors.
        size: images in a batch; the last one may hold fewer.
        device: where they are decoded and needed.

    Raises:
        DataError: one cannot be decoded: a result without it would be that of another set.
    """
    if not len(plan):
        return
    config, device = config.model_copy(update={"color_jitter": None}), exact_device(device)
    parts = [plan.take(slice(first, first + size)) for first in range(0, len(plan), size)]
    ahead = min(_AHEAD, len(parts))
    threads = min(cores_per_rank(), size)
    decoder = Decoder(index, config, device, batch_size=size, threads=threads, prefetch=ahead)
    started: deque[Plan] = deque()
    waiting = deque(parts)
    try:
        while waiting or started:
            try:
                while waiting and len(started) < ahead:
                    started.append(waiting.popleft())
                    decoder.start(started[-1])
                images = decoder.result()
            except DECODE_ERRORS as error:
                _name_the_bad(index, config, device, started, error)
                raise
            started.popleft()
            yield images
    finally:
        decoder.close()


def _name_the_bad(
    index: Index, config: DataConfig, device: torch.device, plans: deque[Plan], error: Exception
) -> None:
    probe = Probe(index, config, device)
    for plan in plans:
        for row, sample in enumerate(plan.sample.tolist()):
            if reason := probe.why_not(plan.take([row])):
                raise DataError(
                    f"{index.name(sample)} cannot be decoded ({reason}); expected a whole image, or none"
                ) from error
