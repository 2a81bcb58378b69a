"""Training a segmenter, step by step from a position in an endless stream of crops, so that it can go on anywhere."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fastmim.errors import ConfigError, TrainingAborted
from fastmim.evaluate.classifier import layer_decay_groups
from fastmim.evaluate.job import Job
from fastmim.evaluate.resume import State
from fastmim.evaluate.segment.batches import paired_batches, training_crops
from fastmim.evaluate.segment.config import SegmentConfig
from fastmim.evaluate.segment.heads import segmentation_loss
from fastmim.evaluate.segment.masks import UNLABELLED
from fastmim.evaluate.segment.model import Segmenter
from fastmim.kernels.philox import STREAM_DROP, philox_4x32
from fastmim.optim import GuardedAdamW

STATE = "training"
_BETAS = (0.9, 0.999)
# Steps that one decoding pipeline lives; plans are made this far ahead.
_CHUNK = 1000


def train_segmenter(model: Segmenter, job: Job) -> list[float]:
    """Train, from where an earlier process of the same evaluation stopped.

    Every rank takes its part of each batch; their gradients are averaged, as are BatchNorm's statistics on GPUs.

    Args:
        model: on the device of its rank; its weights are changed.
        job: its train images and configuration.

    Returns:
        The loss of each step, of rank 0's part of the batch.

    Raises:
        ConfigError: no step, a warm-up without an end, or a batch that the ranks cannot share.
        TrainingAborted: the last epoch had no finite loss.
    """
    config, ranks = job.config, job.ranks
    total = steps_of(config, len(job.train))
    share, rest = divmod(config.batch_size, ranks.world_size)
    if rest or share < 2:
        raise ConfigError(
            f"batch_size={config.batch_size}; expected a multiple of {ranks.world_size} ranks, of at least two images "
            "each"
        )
    groups = layer_decay_groups(model, config.weight_decay, config.layer_decay)
    optimizer = GuardedAdamW(groups, lr=config.lr, betas=_BETAS)
    losses = torch.full((total,), torch.nan, device=ranks.device)
    kept = State(job, STATE)
    found = kept.load()
    first = 0 if found is None else _restore(found, model, optimizer, losses)
    network: nn.Module = model
    if ranks.world_size > 1:
        if ranks.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        network = DistributedDataParallel(network)
    model.train()
    saved_at = time.monotonic()
    batches = _batches(job, first, total, share)
    shown = tqdm(
        range(first, total), "train", total, initial=first, leave=False, disable=None if ranks.first else True
    )
    for step in shown:
        images, classes = next(batches)
        _seed_random_draws(config.seed, step, ranks.rank)
        factor = learning_rate_factor(config, step, total)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"] * factor
        loss = segmentation_loss(network(images), classes, UNLABELLED, config.auxiliary)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        due = time.monotonic() - saved_at >= 60 * config.save_minutes
        if ranks.first and (due or step + 1 == total):
            state = {"step": step + 1, "losses": losses, "optimizer": optimizer.state_dict()}
            kept.save(state | {"model": _trained(model)})
            saved_at = time.monotonic()
    model.eval()
    last = losses[-max(1, round(len(job.train) / config.batch_size)) :]
    if not ranks.mean(last.isfinite().any().float()):
        raise TrainingAborted(
            f"none of the last {len(last)} steps had a finite loss; lower lr={config.lr:g}", everywhere=True
        )
    return losses.tolist()


def steps_of(config: SegmentConfig, images: int) -> int:
    """Optimiser steps of a whole training.

    Raises:
        ConfigError: none, or fewer than those of the warm-up.
    """
    total = int(config.epochs * images / config.batch_size)
    if total <= config.warmup_steps:
        raise ConfigError(
            f"epochs={config.epochs:g} of {images} images make {total} steps of batch_size={config.batch_size}; "
            f"expected more than warmup_steps={config.warmup_steps} (--recipe segment_small is for small sets)"
        )
    return total


def learning_rate_factor(config: SegmentConfig, step: int, total: int) -> float:
    """Share of the highest learning rate: linear to 0 at `total`, times a linear rise over `warmup_steps`."""
    return (1 - step / total) * min(1.0, (step + 1) / (config.warmup_steps + 1))


def _batches(job: Job, first: int, total: int, share: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's crops and masks of the steps from `first` on."""
    config, ranks = job.config, job.ranks
    for start in range(first, total, _CHUNK):
        steps = np.arange(start, min(start + _CHUNK, total))
        positions = steps[:, None] * config.batch_size + ranks.rank * share + np.arange(share)
        crops = training_crops(
            job.train,
            positions.ravel(),
            job.trained.data,
            config.seed,
            config.crop,
            config.scale,
            config.flip,
        )
        yield from paired_batches(job.train, job.trained.data, crops, config.crop, share, ranks.device)


def _seed_random_draws(seed: int, step: int, rank: int) -> None:
    # Stochastic depth and dropout draw from torch's generator; seeded by the step, they are the same after a stop.
    low, high, *_ = philox_4x32(seed, 0, step, rank, STREAM_DROP)
    torch.manual_seed(high << 32 | low)


def _trained(model: Segmenter) -> dict[str, Tensor]:
    """What training changes."""
    part = model if model.encoder.trainable else model.head
    return part.state_dict()


def _restore(
    found: dict[str, Any], model: Segmenter, optimizer: torch.optim.Optimizer, losses: Tensor
) -> int:
    part = model if model.encoder.trainable else model.head
    part.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    losses.copy_(found["losses"])
    return found["step"]
