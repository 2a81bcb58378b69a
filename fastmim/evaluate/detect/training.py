"""Training a detector, epoch by epoch, each one's end a place to go on from."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fastmim.errors import ConfigError, TrainingAborted
from fastmim.evaluate.classifier import layer_decay_groups
from fastmim.evaluate.detect.batches import Target, jittered_crops, training_batches
from fastmim.evaluate.detect.config import DetectConfig
from fastmim.evaluate.detect.model import Detector
from fastmim.evaluate.job import Job
from fastmim.evaluate.resume import State
from fastmim.kernels.philox import STREAM_DROP, philox_4x32
from fastmim.metrics import drop_records_after
from fastmim.optim import GuardedAdamW

STATE, RECORDS = "training", "metrics.jsonl"
_WARMUP_START = 1e-3
_DECAY = 0.1


def train_detector(model: Detector, job: Job) -> dict[str, float | None]:
    """Train, from the last epoch that an earlier process of the same evaluation finished.

    Every rank takes its part of each batch, and gradients are averaged. An epoch drops the images that do not fill a
    batch.

    Args:
        model: on the device of its rank; its weights are changed.
        job: its train images and configuration.

    Returns:
        Mean losses of the last epoch by torchvision's names, and their sum as `loss`; None where one was not finite.

    Raises:
        ConfigError: batches that the images or the ranks do not fill, or a warm-up without an end.
        TrainingAborted: an epoch without a finite gradient.
    """
    config, ranks = job.config, job.ranks
    steps, share = _steps_and_share(job)
    optimizer = GuardedAdamW(
        layer_decay_groups(model, config.weight_decay, config.layer_decay or 1.0),
        lr=config.lr,
        betas=config.betas,
    )
    kept = State(job, STATE)
    found = kept.load()
    first, losses = 0, {}
    if found is not None:
        model.load_state_dict(found["model"], strict=False)
        optimizer.load_state_dict(found["optimizer"])
        first, losses = found["epoch"], found["losses"]
    records = job.folder / RECORDS
    ranks.run_on_first(lambda: drop_records_after(records, first * steps))
    network: nn.Module = model
    if ranks.world_size > 1:
        place = [ranks.device] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=place)
    for epoch in range(first, config.epochs):
        start = time.perf_counter()
        losses, skipped = _train_epoch(network, optimizer, job, epoch, steps, share)
        if skipped == steps:
            raise TrainingAborted(
                f"epoch {epoch + 1} had no finite gradient; lower lr={config.lr:g}", everywhere=True
            )
        record = {"step": (epoch + 1) * steps, "epoch": epoch + 1, **losses, "skipped_steps": skipped}
        record["images_per_s"] = steps * config.batch_size / (time.perf_counter() - start)
        state = {"epoch": epoch + 1, "losses": losses, "optimizer": optimizer.state_dict()}
        state["model"] = {name: value for name, value in model.named_parameters() if value.requires_grad}

        def save(record: dict[str, Any] = record, state: dict[str, Any] = state) -> None:
            # First: records of epochs after the saved one are dropped, and a saved epoch without its record lacks it.
            with records.open("a") as file:
                file.write(json.dumps(record) + "\n")
            kept.save(state)

        ranks.run_on_first(save)
    model.eval()
    return losses


def learning_rate_factor(config: DetectConfig, step: int, total: int) -> float:
    """Share of the highest learning rate: a linear rise from a thousandth, then a tenth after each of `decay_at`."""
    rise = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    warm = _WARMUP_START + (1 - _WARMUP_START) * rise
    return warm * _DECAY ** sum(step >= share * total for share in config.decay_at)


def _steps_and_share(job: Job) -> tuple[int, int]:
    """Steps of an epoch, and images in a backward pass of a rank."""
    config, world, images = job.config, job.ranks.world_size, len(job.train)
    if config.batch_size > images:
        raise ConfigError(f"batch_size={config.batch_size}; expected at most the {images} training images")
    if config.batch_size % (world * config.accumulation):
        raise ConfigError(
            f"batch_size={config.batch_size}; expected a multiple of {world * config.accumulation} ({world} ranks x "
            f"accumulation={config.accumulation})"
        )
    steps = images // config.batch_size
    if config.warmup_steps >= steps * config.epochs:
        raise ConfigError(
            f"{config.epochs} epochs of {images} images make {steps * config.epochs} steps of "
            f"batch_size={config.batch_size}; expected more than warmup_steps={config.warmup_steps} "
            "(--recipe detect_small is for small sets)"
        )
    return steps, config.batch_size // (world * config.accumulation)


def _train_epoch(
    network: nn.Module, optimizer: GuardedAdamW, job: Job, epoch: int, steps: int, share: int
) -> tuple[dict[str, float | None], int]:
    """Mean losses over steps, ranks and images, and how many steps changed nothing."""
    config, ranks = job.config, job.ranks
    network.train()
    batches = _batches(job, epoch, steps, share)
    names: list[str] = []
    total, skipped = torch.zeros((), device=ranks.device), torch.zeros(1, device=ranks.device)
    shown = tqdm(
        range(epoch * steps, (epoch + 1) * steps),
        desc=f"epoch {epoch + 1}/{config.epochs}",
        leave=False,
        disable=None if ranks.first else True,
    )
    for step in shown:
        factor = learning_rate_factor(config, step, steps * config.epochs)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"] * factor
        for micro in range(config.accumulation):
            images, targets = next(batches)
            # Anchors, proposals and dropped paths are drawn by torch's generator; of the step, they survive a stop.
            low, high, *_ = philox_4x32(config.seed, micro, step, ranks.rank, STREAM_DROP)
            torch.manual_seed(high << 32 | low)
            with _reduces(network, micro + 1 == config.accumulation):
                found = network(images, targets)
                names = sorted(found)
                values = torch.stack([found[name] for name in names])
                (values.sum() / config.accumulation).backward()
            total = total + values.detach() / (steps * config.accumulation)
        optimizer.step()
        optimizer.zero_grad()
        skipped += optimizer.found_inf
    *means, still = ranks.mean(torch.cat([total, skipped])).tolist()
    losses = {"loss": sum(means), **dict(zip(names, means, strict=True))}
    return {name: value if math.isfinite(value) else None for name, value in losses.items()}, round(still)


def _reduces(network: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients are averaged over ranks in the last backward pass of a step."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def _batches(job: Job, epoch: int, steps: int, share: int) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """This rank's images and targets of an epoch, in the order of steps and backward passes."""
    config, ranks = job.config, job.ranks
    places = np.arange(steps * config.batch_size).reshape(steps, config.accumulation, ranks.world_size, share)
    positions = epoch * len(job.train) + places[:, :, ranks.rank].ravel()
    data, side = job.trained.data, config.image_size
    crops = jittered_crops(job.train, positions, data, config.seed, side, config.scale, config.flip)
    return training_batches(job.train, data, crops, side, share, ranks.device)
