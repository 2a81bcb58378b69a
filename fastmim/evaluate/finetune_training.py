"""The training of one classifier: epochs in, weights out, each epoch's end a place to go on from."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fastmim.config_training import OptimConfig
from fastmim.ema import EMA
from fastmim.errors import TrainingAborted
from fastmim.evaluate.augment import Regularisation, draws, folded_positions
from fastmim.evaluate.batches import centre_plan, decode, random_plan
from fastmim.evaluate.classifier import (
    Classifier,
    copy_encoder,
    finetuned_config,
    layer_decay_groups,
    timm_tensors,
)
from fastmim.evaluate.job import Job
from fastmim.evaluate.rand_augment import RandAugment
from fastmim.evaluate.resume import load_state, save_state
from fastmim.evaluate.scores import best_classes
from fastmim.evaluate.shards import gather_batches, own_batches
from fastmim.exchange.files import aside
from fastmim.exchange.outward import timm_call
from fastmim.kernels.philox import STREAM_DROP, philox_4x32
from fastmim.metrics import drop_records_after
from fastmim.optim import GuardedAdamW, learning_rate


class Training:
    """One classifier, trained on all ranks.

    Args:
        job: the evaluation; its encoder's weights are where the training starts.
        blocks: how much is trained, as of `Classifier`.
        name: of the files that belong to it.
    """

    def __init__(self, job: Job, blocks: float | None, name: str):
        config = self.config = job.config
        self.job, self.name, self.ranks = job, name, job.ranks
        self.device = job.encoder.cls_token.device
        self.trained = finetuned_config(job.trained, config.image_size, config.drop_path)
        self.data = self.trained.data.model_copy(update={"scale": config.scale, "flip": config.flip})
        self.classes = len(job.train.class_names)
        self.parts = self.ranks.world_size * config.accumulation
        self.steps = len(job.train) // config.batch_size
        torch.manual_seed(config.seed)
        encoder = copy_encoder(job.encoder, job.trained.grid, self.trained, config.precision)
        patches = self.trained.grid[0] * self.trained.grid[1]
        self.model = Classifier(encoder, patches, self.classes, config.pool, blocks).to(self.device)
        groups = layer_decay_groups(self.model, config.weight_decay, config.layer_decay)
        self.optimizer = GuardedAdamW(groups, config.clip_grad, lr=0.0, betas=config.betas)
        trained = [parameter for group in groups for parameter in group["params"]]
        self.parameters = sum(parameter.numel() for parameter in trained)
        self.ema = EMA(trained, config.ema_decay) if config.ema_decay else None
        keys = ("batch_size", "epochs", "warmup_epochs", "blr", "min_lr")
        self.schedule = OptimConfig.model_validate({key: getattr(config, key) for key in keys})
        self.network = self.model
        if self.ranks.world_size > 1:
            place = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=place, broadcast_buffers=False)
        self.policy = None
        if config.rand_augment is not None:
            self.policy = RandAugment(config.rand_augment, self.data, config.workers)
        self.regularise = Regularisation(config, self.classes, self.model.encoder.scale)
        self.epoch, self.loss = 0, None
        self.records = job.folder / ("metrics.jsonl" if name == "finetune" else f"{name}.jsonl")
        if state := load_state(job.folder, name, job.identity):
            self._restore(state)
        self.ranks.run_on_first(lambda: drop_records_after(self.records, self.epoch * self.steps))

    def run(self) -> None:
        """Train the epochs that are left; each is saved at its end."""
        epochs = self.config.epochs
        while self.epoch < epochs:
            start = time.perf_counter()
            self.loss, skipped = self._train_epoch()
            self.epoch += 1
            if skipped == self.steps:
                raise TrainingAborted(
                    f"epoch {self.epoch} of {self.name} had no finite gradient; lower blr={self.config.blr:g}, or set "
                    "clip_grad",
                    everywhere=True,
                )
            record = {
                "step": self.epoch * self.steps,
                "epoch": self.epoch,
                "loss": self.loss,
                "skipped_steps": skipped,
                "images_per_s": self.steps * self.config.batch_size / (time.perf_counter() - start),
            }
            if self.epoch % self.config.test_every == 0 or self.epoch == epochs:
                best = self.predict()[:, 0]
                record["test_top1"] = (best == torch.from_numpy(self.job.test.labels)).double().mean().item()
            self.ranks.run_on_first(lambda record=record: self._save(record))

    @torch.inference_mode()
    def predict(self) -> Tensor:
        """The likeliest classes of the test images, int64 [m, min(5, C)], on every rank."""
        images, size = self.job.test, self.config.images_at_once
        plan = centre_plan(images.index, images.rows, self.data, self.config.center)
        self.model.eval()

        def own() -> Iterator[Tensor]:
            part = own_batches(plan, size, self.ranks)
            for batch in decode(images.index, self.data, part, size, self.device):
                with self._autocast():
                    logits = self.model(batch)
                yield best_classes(logits.float()).to(self.device)

        none = torch.empty(0, min(5, self.classes), dtype=torch.int64, device=self.device)
        with self._tested():
            return torch.cat(list(gather_batches(own(), len(plan), size, none, self.ranks))).cpu()

    def save_model(self) -> str:
        """Write the model that was tested, in timm's layout; returns how it is loaded."""
        path = self.job.folder / (
            "model.safetensors" if self.name == "finetune" else f"{self.name}.safetensors"
        )
        told = {
            "classes": self.job.train.class_names,
            "mean": self.trained.data.mean,
            "std": self.trained.data.std,
            "image_size": self.trained.data.image_size,
            "positions_grid": self.trained.positions_grid,
        }
        metadata = {"format": "pt"} | {f"fastmim.{key}": json.dumps(value) for key, value in told.items()}
        with self._tested(), aside(path) as written:
            save_file(timm_tensors(self.model, self.trained), written, metadata)
        pool = "avg" if self.config.pool == "mean" else "token"
        return timm_call(path, self.trained, self.classes, pool)

    def told(self) -> dict[str, Any]:
        """What eval.json tells of the training."""
        return {"trained_parameters": self.parameters, "train_loss": self.loss}

    def close(self) -> None:
        """End the processes of the augmentation."""
        if self.policy is not None:
            self.policy.close()

    def _train_epoch(self) -> tuple[float | None, int]:
        """Mean loss over steps, ranks and images, None where one was not finite, and how many steps changed nothing."""
        self.network.train()
        config = self.config
        batches = self._batches()
        total = torch.zeros(2, device=self.device)
        bar = tqdm(
            range(self.epoch * self.steps, (self.epoch + 1) * self.steps),
            desc=f"{self.name} epoch {self.epoch + 1}/{config.epochs}",
            leave=False,
            disable=None if self.ranks.first else True,
        )
        for step in bar:
            lr = learning_rate(self.schedule, step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            for micro in range(config.accumulation):
                images, labels, words = next(batches)
                images, targets = self.regularise(images, labels, words, step)
                low, high, *_ = philox_4x32(config.seed, micro, step, self.ranks.rank, STREAM_DROP)
                torch.manual_seed(high << 32 | low)
                with self._reduces(micro + 1 == config.accumulation):
                    with self._autocast():
                        logits = self.network(images)
                    # Mixed targets are smoothed already.
                    smoothing = 0.0 if config.mixes else config.smoothing
                    loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                    (loss / config.accumulation).backward()
                total[0] += loss.detach() / (self.steps * config.accumulation)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total[1] += self.optimizer.found_inf
            if self.ema is not None:
                self.ema.update(self.optimizer.found_inf)
        loss, skipped = self.ranks.mean(total).tolist()
        return loss if math.isfinite(loss) else None, round(skipped)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """This rank's images and labels in an epoch, in the order of steps and backward passes, and their draws."""
        images, config = self.job.train, self.config
        plan = random_plan(images.index, images.rows, self.data, config.seed, self.epoch)
        shares = [
            folded_positions(
                self.steps, config.batch_size, self.parts, micro * self.ranks.world_size + self.ranks.rank
            )
            for micro in range(config.accumulation)
        ]
        positions = np.stack(shares, axis=1)
        size = positions.shape[2]
        own = plan.take(positions.ravel())
        words = list(draws(config.seed, self.epoch, own.position).reshape(-1, size, 4))
        labels = torch.from_numpy(images.labels_of(own.sample)).to(self.device).split(size)
        place = torch.device("cpu") if self.policy is not None else self.device
        decoded = decode(images.index, self.data, own, size, place)
        if self.policy is not None:
            decoded = self.policy(decoded, iter(words))
        for batch, kinds, their in zip(decoded, labels, words, strict=True):
            yield batch.to(self.device, non_blocking=True), kinds, their

    def _tested(self) -> AbstractContextManager:
        """The weights that are tested: the averaged ones, where there are."""
        return self.ema.swapped() if self.ema is not None else nullcontext()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _reduces(self, last: bool) -> AbstractContextManager:
        """Gradients are averaged over ranks in the last backward pass of a step."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _save(self, record: dict[str, Any]) -> None:
        state: dict[str, Any] = {"epoch": self.epoch, "loss": self.loss, "model": self.model.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.averages
        if self.epoch < self.config.epochs:  # at the end only the weights are needed again
            state["optimizer"] = self.optimizer.state_dict()
        # First: records of epochs after the saved one are dropped, and a saved epoch without its record would lack it.
        with self.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        save_state(self.job.folder, self.name, self.job.identity, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            for average, stored in zip(self.ema.averages, state["ema"], strict=True):
                average.copy_(stored)
        self.epoch, self.loss = state["epoch"], state["loss"]
