"""Endless micro-batches of uint8 images for one rank, decoded ahead by DALI's own threads."""

import logging
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmim.config import DataConfig
from fastmim.data.decoder import DECODE_ERRORS, Decoder, Probe
from fastmim.data.index import Index
from fastmim.data.schedule import Plan, Schedule, repeat_positions
from fastmim.errors import DataError, TrainingAborted
from fastmim.ranks import cores_per_rank

_MAX_ATTEMPTS = 64
_BAD_SHOWN = 20
_LOAD_BATCH = 64
_PLANNED_TOGETHER = 2048

logger = logging.getLogger("fastmim")


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    images: Tensor
    """uint8 [B, H, W, C], on the training device. On the GPU it belongs to the stream that was current."""
    epochs: Tensor
    """int64 [B], on the device."""
    positions: Tensor
    """int64 [B], position in its epoch, on the device; where images are repeated, every repeat has its own."""
    samples: np.ndarray
    """int64 [B / repeats], row in the index of the image really used."""


class Loader:
    """Micro-batches of one rank, a pure function of (seed, step).

    The global batch of step s is the stream's positions [s G, (s + 1) G), with G = micro_batch x accumulation x
    world_size; micro-step a of rank r takes micro_batch of them from s G + (a world_size + r) micro_batch. So
    any number of ranks with the same G sees the same images. With `repeats` k, G / k images are decoded, and each
    stands k times in a row in its batch, at positions of its own for the masks, as the same crop or as k of them.

    An image that cannot be decoded is named in the log and replaced by a substitute that depends on its place in
    the stream alone; the other images of its batch stay as they are.

    Args:
        index: the images.
        config: how they become tensors.
        seed: 64-bit key of the order, the crops and the flips.
        micro_batch: images in a batch.
        accumulation: micro-steps in a step.
        repeats: how often each decoded image stands in its micro-batch; divides `micro_batch`.
        repeat_crops: each repeat is a crop of its own.
        rank, world_size: which part of every step is this process's.
        device: where the images are needed; CUDA decodes there.
        start_step: first step.
        threads: CPU threads of DALI; `config.threads`, or the cores of each rank, unless given.
        ends_with_ranks: where too many images are bad, the last batch is given again instead of an error, so that the
            ranks can end together; whoever reads batches looks at `failed`.

    Attributes:
        bad: why each image that could not be decoded on this rank could not.
        failed: the error, where the last batch is given again.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        seed: int,
        micro_batch: int,
        accumulation: int,
        repeats: int = 1,
        repeat_crops: bool = False,
        rank: int,
        world_size: int,
        device: torch.device,
        start_step: int = 0,
        threads: int | None = None,
        ends_with_ranks: bool = False,
    ):
        self.index, self.config = index, config
        self._crops = repeats if repeat_crops else 1
        self.schedule = Schedule(index.heights, index.widths, seed, config, self._crops)
        self.samples_per_epoch = self.schedule.samples_per_epoch
        self.bad: dict[int, str] = {}
        self.failed: TrainingAborted | None = None
        self._ends_with_ranks = ends_with_ranks
        self._last: Batch | None = None
        self._allowed_bad = config.allowed_bad(len(index))
        self._repeats, self._decoded = repeats, micro_batch // repeats
        self._rank, self._world_size = rank, world_size
        self._device = exact_device(device)
        self._plans = self._plan_ahead(start_step * accumulation)
        self._threads = threads or config.threads or cores_per_rank()
        self._probe = Probe(index, config, self._device, self._crops)
        self._ahead: deque[Plan] = deque()
        self._closed = False
        self._decoder = self._make_decoder()

    def __iter__(self) -> Iterator[Batch]:
        while not self._closed:
            if self.failed is None:
                try:
                    while len(self._ahead) < self.config.prefetch:
                        self._start(self._without_bad(next(self._plans), self.bad))
                    self._last = self._collect()
                except TrainingAborted as error:
                    if self._last is None or not self._ends_with_ranks:
                        raise
                    self.failed = error
            yield self._last

    def close(self) -> None:
        """Stop decoding and free the pipeline."""
        self._closed = True
        self._ahead.clear()
        self._decoder.close()

    def _plan_ahead(self, micro_step: int) -> Iterator[Plan]:
        """This rank's micro-batches. Several are planned at once, which costs little more than one."""
        size = self._decoded
        steps = max(1, _PLANNED_TOGETHER // size)
        while True:
            first = (np.arange(micro_step, micro_step + steps) * self._world_size + self._rank) * size
            plan = self.schedule.plan((first[:, None] + np.arange(size)).ravel())
            for start in range(0, steps * size, size):
                yield plan.take(slice(start, start + size))
            micro_step += steps

    def _make_decoder(self) -> Decoder:
        return Decoder(
            self.index,
            self.config,
            self._device,
            batch_size=self._decoded,
            threads=min(self._threads, self._decoded),
            prefetch=self.config.prefetch,
            crops=self._crops,
        )

    def _start(self, plan: Plan) -> None:
        self._ahead.append(plan)
        try:
            self._decoder.start(plan)
        except DECODE_ERRORS as error:  # of a run that was started before
            self._recover(error)

    def _collect(self) -> Batch:
        try:
            images = self._decoder.result()
        except DECODE_ERRORS as error:
            self._recover(error)
            return self._collect()
        plan = self._ahead.popleft()
        epochs, positions = plan.epoch, plan.position
        if self._repeats > 1:
            if self._crops == 1:
                images = images.repeat_interleave(self._repeats, 0)
            epochs, positions = epochs.repeat(self._repeats), repeat_positions(positions, self._repeats)
        return Batch(images, *self._to_device(np.stack([epochs, positions])).unbind(0), plan.sample)

    def _to_device(self, values: np.ndarray) -> Tensor:
        # From pinned memory the copy does not wait for what the device still computes.
        tensor = torch.from_numpy(values)
        return (
            tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
        )

    def _recover(self, error: Exception) -> None:
        """Find the bad images of what is under way, and start it again without them.

        Raises:
            TrainingAborted: when too many images are bad.
            Exception: `error`, when every image decodes on its own.
        """
        self._decoder.close()
        plans = list(self._ahead)
        for row, plan in enumerate(plans):
            plans[row] = self._without_bad(plan, plan.sample)
            if plans[row] is not plan:
                break
        else:
            raise error
        self._ahead.clear()
        self._decoder = self._make_decoder()
        for plan in plans:
            self._start(self._without_bad(plan, self.bad))

    def _without_bad(self, plan: Plan, suspects: Collection[int]) -> Plan:
        """`plan`, with a substitute for each of `suspects` that cannot be decoded.

        A suspect is tried each time: a truncated file may hold one window and not another, and which image is
        used must not depend on what this process has seen before.
        """
        if not len(suspects):
            return plan
        for row in np.flatnonzero(np.isin(plan.sample, list(suspects))).tolist():
            one, attempt = plan.take([row]), 0
            while reason := self._probe.why_not(one):
                sample = int(one.sample[0])
                self._note_bad(sample, reason)
                if attempt == _MAX_ATTEMPTS:
                    raise self._too_many_bad()
                substitute = self.schedule.substitute(one.epoch, one.position, attempt)
                one, attempt = self.schedule.plan_of(one.epoch, one.position, substitute), attempt + 1
            if attempt:
                plan = plan.replace(row, one)
        return plan

    def _note_bad(self, sample: int, reason: str) -> None:
        if sample in self.bad:
            return
        self.bad[sample] = reason
        logger.warning(
            "image %s cannot be decoded (%s); a substitute takes its place", self.index.name(sample), reason
        )
        if len(self.bad) > self._allowed_bad or len(self.bad) == len(self.index):
            raise self._too_many_bad()

    def _too_many_bad(self) -> TrainingAborted:
        told = [f"{self.index.name(sample)}: {reason}" for sample, reason in self.bad.items()]
        return too_many_bad(told, len(self.index), self.config)


def too_many_bad(told: list[str], images: int, config: DataConfig) -> TrainingAborted:
    """The error of a set with too many bad images.

    Args:
        told: a name of each, or more.
        images: in the set.
        config: of the set.
    """
    lines = [
        f"{len(told)} of {images} images cannot be decoded; expected at most {config.allowed_bad(images)} "
        f"(data.max_bad_fraction={config.max_bad_fraction:g})",
        *(f"  {one}" for one in told[:_BAD_SHOWN]),
    ]
    if len(told) > _BAD_SHOWN:
        lines.append(f"  and {len(told) - _BAD_SHOWN} more")
    return TrainingAborted("\n".join(lines))


def load_images(
    index: Index, config: DataConfig, n: int, spread: bool = False, skip_bad: bool = False
) -> Tensor:
    """Images of an index, centre-cropped and neither flipped nor coloured.

    Args:
        index: the images.
        config: image_size and channels are read, and max_bad_fraction where bad images are skipped.
        n: how many; all where the index holds fewer.
        spread: evenly over the index, in place of the first ones.
        skip_bad: leave out images that cannot be decoded, and name them in the log.

    Returns:
        uint8 [n, H, W, C], on the CPU; fewer where some were left out.

    Raises:
        DataError: when one cannot be decoded; with `skip_bad`, all or more than `max_bad_fraction` of the index.
    """
    config = config.model_copy(update={"crop": "center_crop", "flip": 0.0, "color_jitter": None})
    schedule = Schedule(index.heights, index.widths, 0, config)
    n = min(n, len(index))
    rows = np.arange(n, dtype=np.int64)
    if spread:
        rows = rows * len(index) // n
    device, size = torch.device("cpu"), min(n, _LOAD_BATCH)
    allowed = min(config.allowed_bad(len(index)), n - 1) if skip_bad else 0
    batches = [rows[first : first + size] for first in range(0, n, size)]
    plans = deque(schedule.plan_of(np.zeros_like(batch), batch, batch) for batch in batches)
    images, bad, decoder = [], {}, None
    while plans:
        plan = plans.popleft()
        decoder = decoder or Decoder(
            index, config, device, batch_size=size, threads=min(cores_per_rank(), size)
        )
        try:
            decoder.start(plan)
            images.append(decoder.result())
        except DECODE_ERRORS as error:
            decoder.close()
            decoder, probe = None, Probe(index, config, device)
            reasons = [probe.why_not(plan.take([row])) for row in range(len(plan.sample))]
            if not any(reasons):
                raise
            bad |= {index.name(s): why for s, why in zip(plan.sample.tolist(), reasons, strict=True) if why}
            if len(bad) > allowed:
                told = ", ".join(f"{name} cannot be decoded ({why})" for name, why in bad.items())
                raise DataError(f"{told}; expected at most {allowed} such images of {len(index)}") from error
            good = [row for row, why in enumerate(reasons) if not why]
            if good:
                plans.appendleft(plan.take(good))
    for name, reason in bad.items():
        logger.warning("image %s cannot be decoded (%s); it is left out", name, reason)
    return torch.cat(images)


def exact_device(device: torch.device) -> torch.device:
    """`device` with its number, where it is CUDA and has none."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
