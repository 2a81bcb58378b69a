"""The training loop: batches in, optimiser steps, records, pictures and checkpoints out."""

import json
import logging
import signal
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from tqdm.contrib.logging import logging_redirect_tqdm

from fastmim import checkpoint as checkpoints
from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.bad_images import BadImages
from fastmim.beginning import begin
from fastmim.config import Config
from fastmim.data.loader import Loader
from fastmim.data.shared import open_index
from fastmim.ema import EMA
from fastmim.engine import build_engine, check_fragment, start_distributed
from fastmim.errors import ConfigError, TrainingAborted
from fastmim.flops import peak_flops
from fastmim.kernels.philox import STREAM_DROP, philox_4x32
from fastmim.metrics import Metrics, check_sinks, describe_end, read_records, set_up_logging
from fastmim.models.attention import choose_attention
from fastmim.objectives import build_objective
from fastmim.optim import GuardedAdamW, learning_rate
from fastmim.pictures import draw_loss
from fastmim.precision import choose_precision
from fastmim.profiling import start_profiler
from fastmim.ranks import Ranks
from fastmim.reconstruct import open_sheet
from fastmim.signals import StopSignals
from fastmim.split_adamw import SplitAdamW
from fastmim.window import Window, peak_memory_bytes

logger = logging.getLogger("fastmim")


def train(config: Config, resume: str = "auto") -> int:
    """Run a configuration to its end, or to a signal.

    Args:
        config: of the run.
        resume: auto, none, or the path of a run or checkpoint.

    Returns:
        The process's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        FastmimError: a configuration, source or checkpoint that cannot be used, or a run that was aborted.
    """
    ranks = Ranks()
    set_up_logging(ranks.first)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with StopSignals() as signals, logging_redirect_tqdm([logger]):
        trainer = Trainer(config, ranks, resume)
        try:
            trainer.run(signals)
        finally:
            trainer.close()
    if trainer.step >= trainer.last_step:
        images = (config.log.images or config.require_source()) if config.draws_pictures else None
        logger.info(describe_end(trainer.run_folder, trainer.step, images))
        return 0
    return signals.exit_code


class Trainer:
    """One run on one rank.

    Args:
        config: of the run.
        ranks: this process among all.
        resume: auto, none, or a path.
    """

    def __init__(self, config: Config, ranks: Ranks, resume: str):
        self.config, self.ranks = config, ranks
        self.run_folder = Path(config.output)
        micro_batch = config.micro_batch(ranks.world_size)
        self.precision = precision = choose_precision(config.train.precision, ranks.device)
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)  # where an attention is tried out
        attention = choose_attention(config.train.attention, ranks.device.type, precision)
        check_sinks(config)
        start_distributed(ranks)
        check_fragment(config, precision, micro_batch)
        self._stop_file = self.run_folder / "stop"
        self._lock = ranks.run_on_first(self._take_folder)
        self.index = open_index(config.require_source(), config.data, ranks)
        self.sheet = open_sheet(config, ranks, self.index) if config.log.reconstruct_every_steps else None
        found = ranks.share(ranks.run_on_first(lambda: manifests.find(self.run_folder, resume)))
        if found is not None:
            checkpoints.check_same_run(found[1], config, ranks, precision, self.index.fingerprint)

        torch.manual_seed(config.train.seed)
        self.objective = build_objective(config, attention)
        self.fingerprints = self.objective.fingerprints()
        if found is not None:
            checkpoints.check_same_networks(found[1], config, self.fingerprints)
        if found is None:
            begin(self.objective, config, ranks, self.index)
        if config.train.compile:
            self.objective.compile_blocks()
        self.engine = build_engine(config, self.objective, precision, micro_batch)
        decay = config.train.ema_decay
        self.ema = EMA(checkpoints.master_tensors(self.engine), decay) if decay else None
        self.step, self.skipped = 0, 0
        self._begun_from: str | None = None
        bad: dict[int, str] = {}
        if found is not None:
            folder, manifest = found
            checkpoints.load(self.engine, folder, self.ema)
            self.step, self.skipped = manifest["step"], manifest["state"]["skipped"]
            own = folder.resolve().is_relative_to(self.run_folder.resolve())
            self._begun_from = manifest["state"].get("begun_from") if own else manifests.begun_from(resume)
            bad = {int(sample): name for sample, name in manifest["state"]["bad_images"].items()}

        self.loader = Loader(
            self.index,
            config.data,
            seed=config.train.seed,
            micro_batch=micro_batch,
            accumulation=config.optim.accumulation,
            repeats=config.mask.repeats,
            repeat_crops=config.mask.repeat_crops,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            start_step=self.step,
            ends_with_ranks=True,
        )
        self.bad_images = BadImages(self.loader, ranks, bad)
        epoch = self.loader.samples_per_epoch
        self.total_steps = -(-int(config.optim.epochs * epoch) // config.optim.batch_size)
        if not self.total_steps:
            raise ConfigError(
                f"optim.epochs={config.optim.epochs:g} of {epoch} images make no step of "
                f"optim.batch_size={config.optim.batch_size}; expected more epochs"
            )
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.window = Window(ranks.device)
        self.metrics: Metrics | None = None
        ranks.run_on_first(self._open_run)
        self._flops_per_image = self.objective.step_flops()
        self._peak_flops = peak_flops(_device_name(ranks.device), precision, config.train.peak_tflops)
        if self.step:
            logger.info("resuming after step %d of %d", self.step, self.total_steps)

    def run(self, signals: StopSignals) -> None:
        """Train until the schedule, `train.max_steps`, a signal or a stop file ends it; the last step is saved."""
        config, window = self.config, self.window
        batches = iter(self.loader)
        recent: deque[Any] = deque(maxlen=config.train.max_skipped_in_a_row + config.log.every_steps)
        saved_at = time.monotonic()
        profiling = config.train.profile and self.ranks.first and self.step < self.last_step
        profiler = start_profiler(self.run_folder, self.last_step - self.step) if profiling else None
        window.reset()
        if self.ranks.first:
            signals.watch(self._stop_file)
        # A wish that came while the run was set up ends it before a step.
        stop = self.ranks.start_flags(signals.wanted()).wait()[0]
        while self.step < self.last_step and not stop:
            flags = self.ranks.start_flags(
                signals.wanted(), self._is_save_due(saved_at), self.bad_images.rank_failed
            )
            lr = self._set_learning_rate()
            self.objective.progress = self.step / self.total_steps
            recent.append((self.step + 1, self._train_step(batches)))
            self.step += 1
            if profiler is not None:
                profiler.step()
            stop, save, failed = flags.wait()
            ending = stop or failed or self.step == self.last_step
            if ending or self.step % config.log.every_steps == 0:
                self._log(lr, recent)
            every = config.checkpoint.every_steps
            started = time.perf_counter()
            aborting = self.bad_images.why_end(failed)
            if ending or save or aborting or (every and self.step % every == 0):
                self._save()
                saved_at = time.monotonic()
            if aborting:
                raise aborting
            every = config.log.reconstruct_every_steps
            if every and (self.step == self.last_step or self.step % every == 0):
                self._draw()
            window.pause(time.perf_counter() - started)
        if stop:
            signals.received = signals.received or signal.SIGTERM  # another rank's is this one's too
            logger.info(
                "stopped, as asked, after step %d; the same command goes on from there (not with --resume none)",
                self.step,
            )
        if profiler is not None:
            profiler.stop()

    def close(self) -> None:
        """Release decoding threads, files and the process group."""
        self.loader.close()
        if self.metrics is not None:
            self.metrics.close()
        dist.destroy_process_group()

    def _train_step(self, batches) -> list[Any]:
        """One optimiser step; returns the sample ids of its micro-batches, for the record of a failure."""
        samples = []
        for micro in range(self.config.optim.accumulation):
            started = time.perf_counter()
            batch = next(batches)
            self.window.waited += time.perf_counter() - started
            if self.objective.stochastic:
                self._seed_random_draws(micro)
            losses = self.engine(batch)
            self.engine.backward(losses["loss"])
            self.engine.step()
            self.window.add_losses(losses)
            samples.append(batch.samples)
        optimizer = self.engine.optimizer
        guarded = isinstance(optimizer, GuardedAdamW | SplitAdamW)
        skipped = optimizer.found_inf if guarded else float(getattr(optimizer, "overflow", False))
        self.window.add_step(skipped)
        if self.ema is not None:
            self.ema.update(skipped)
        return samples

    def _seed_random_draws(self, micro: int) -> None:
        # Stochastic depth and the like draw from torch's generator; seeded by the step, a resumed run is the same.
        low, high, *_ = philox_4x32(self.config.train.seed, micro, self.step, self.ranks.rank, STREAM_DROP)
        torch.manual_seed(high << 32 | low)

    def _set_learning_rate(self) -> float:
        epoch = self.step * self.config.optim.batch_size / self.loader.samples_per_epoch
        lr = learning_rate(self.config.optim, epoch)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _is_save_due(self, saved_at: float) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return self.ranks.first and minutes is not None and time.monotonic() - saved_at >= 60 * minutes

    def _log(self, lr: float, recent: deque) -> None:
        """Tell a record and start the next window; the one place where the host waits for the device."""
        most_in_a_row = self.window.most_in_a_row()
        loss, finite, skipped, *parts = self.ranks.mean(self.window.sums()).tolist()
        names = [f"loss_{name}" for name in self.window.parts()]
        self.skipped += round(skipped)
        self.bad_images.gather()
        speed = self.window.throughput(self.config.optim.batch_size)
        achieved = speed["images_per_s"] / self.ranks.world_size * self._flops_per_image
        self.window.reset()
        if self.metrics is not None:
            record = {
                "step": self.step,
                "epoch": self.step * self.config.optim.batch_size / self.loader.samples_per_epoch,
                "loss": loss / finite if finite else None,
                **{name: part / finite if finite else None for name, part in zip(names, parts, strict=True)},
                "lr": lr,
                "grad_norm": self._gradient_norm(),
                **speed,
                "peak_memory_bytes": peak_memory_bytes(self.ranks.device),
                "skipped_steps": self.skipped,
                "bad_images": self.bad_images.count,
                "mfu": achieved / self._peak_flops if self._peak_flops else None,
            }
            self.metrics.write(record)
        if most_in_a_row >= self.config.train.max_skipped_in_a_row:
            self._abort(most_in_a_row, recent)

    def _gradient_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        if norm is None and isinstance(self.engine.optimizer, GuardedAdamW | SplitAdamW):
            norm = self.engine.optimizer.grad_norm
        norm = None if norm is None else float(norm)
        return norm if norm is not None and 0 <= norm < float("inf") else None

    def _abort(self, most_in_a_row: int, recent: deque) -> None:
        path = self.run_folder / f"skipped-rank{self.ranks.rank}.json"
        steps = [{"step": step, "samples": [ids.tolist() for ids in samples]} for step, samples in recent]
        manifests.write_durably(path, json.dumps(steps))
        raise TrainingAborted(
            f"{most_in_a_row} steps in a row had a non-finite loss or gradient "
            f"(train.max_skipped_in_a_row={self.config.train.max_skipped_in_a_row}); their samples are in "
            f"{path.parent}/skipped-rank*.json. Lower optim.blr, set optim.clip_grad, or use train.precision=bf16",
            everywhere=True,
        )

    def _save(self) -> None:
        state = {
            "epoch": self.step * self.config.optim.batch_size / self.loader.samples_per_epoch,
            "fingerprint": self.index.fingerprint,
            "skipped": self.skipped,
            "bad_images": self.bad_images.stored,
            "frozen": self.fingerprints,
            "begun_from": self._begun_from,
        }
        checkpoints.save(self.engine, self.ranks, self.config, self.precision, self.step, state, self.ema)

    def _draw(self) -> None:
        """Reconstruct held-out images; every rank computes, since ZeRO-3 needs them all, and the first draws."""
        rebuilt = self.sheet.rebuild(self.objective)
        if self.metrics is not None:
            path = self.run_folder / "reconstructions.png"
            self.sheet.draw(path, self.objective, rebuilt, f"step {self.step}")
            self.metrics.add_image("reconstructions", path, self.step)
            draw_loss(self.run_folder / "loss.png", read_records(self.metrics.path))

    def _take_folder(self) -> IO[str]:
        lock = manifests.lock(self.run_folder)
        if self._stop_file.exists():
            logger.warning("removing %s, which was meant for an earlier run", self._stop_file)
            self._stop_file.unlink()
        return lock

    def _open_run(self) -> None:
        config = self.config
        manifests.remove_unfinished(self.run_folder)
        self.run_folder.mkdir(parents=True, exist_ok=True)
        manifests.write_durably(self.run_folder / "config.yaml", recipes.dump(config))
        self.metrics = Metrics(config, self.step, self.last_step)
        optim = config.optim
        micro_batch = config.micro_batch(self.ranks.world_size)
        logger.info("%s", self.index.summary())
        logger.info(
            f"{self.total_steps} steps of {optim.batch_size} images ({self.ranks.world_size} ranks x "
            f"{optim.accumulation} accumulation x {micro_batch}); "
            f"lr {optim.lr:.3e} = blr {optim.blr:.3e} x {optim.batch_size} / 256"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
