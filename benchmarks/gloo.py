"""Ranks of a run without a launcher: processes on this machine that a script starts, and the bare step they make."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch

from fastmim import recipes
from fastmim.config import Config
from fastmim.engine import build_engine, start_distributed
from fastmim.models.attention import choose_attention
from fastmim.objectives import build_objective
from fastmim.objectives.base import Images
from fastmim.precision import choose_precision
from fastmim.ranks import Ranks

SMALL = [
    "train.precision=auto",
    "model.size=small",
    "objective.decoder_width=128",
    "objective.decoder_depth=1",
    "objective.decoder_heads=4",
]
"""Words of ViT-S/16 with a light decoder, whose states outweigh the activations of few images; in the precision that
the hardware multiplies fastest."""


class Group:
    """Fresh processes that can join each other, kept for several calls; close it, or use it in a `with`.

    Args:
        ranks: how many.
        threads: of each, for its computations.
        gpu: of the first rank, where there are GPUs.
    """

    def __init__(self, ranks: int, threads: int, gpu: int = 0):
        self.ranks = ranks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # A pool each: two tasks of one pool could both be taken by its first process.
        self._pools = [
            ProcessPoolExecutor(1, get_context("spawn"), _enter, (rank, ranks, port, threads, gpu))
            for rank in range(ranks)
        ]
        self._pids = self.start(os.getpid)

    def start(self, function: Callable[..., Any], *args: Any) -> list[Future]:
        """Call a module's function on every rank; the results, in the ranks' order, come later."""
        return [pool.submit(function, *args) for pool in self._pools]

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a module's function returns on each rank."""
        return [result.result() for result in self.start(function, *args)]

    def close(self) -> None:
        """End the processes, once they have done what was started."""
        for pool in self._pools:
            pool.shutdown()

    def kill(self) -> None:
        """End the processes at once: where a rank failed, the others wait for it for ever."""
        for pool, pid in zip(self._pools, self._pids, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid.result(), signal.SIGKILL)
            pool.shutdown()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.kill()


def _enter(rank: int, ranks: int, port: int, threads: int, gpu: int) -> None:
    if gpu:  # before CUDA starts
        every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpu + ranks)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(every.split(",")[gpu:])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def make_config(words: list[str]) -> Config:
    """A run of ViT-B's recipe, changed by `key=value` words; source and epochs do not matter to a fixed batch."""
    return recipes.load("mae_vit_base", words)


class FixedBatch:
    """The engine of a run and one batch that every step is given: a step without loader, log and checkpoint.

    Args:
        config: of the run.
        batch: this rank's micro-batch, as a loader makes it; random images unless given.
    """

    def __init__(self, config: Config, batch: Images | None = None):
        self.config, self.ranks = config, Ranks()
        start_distributed(self.ranks)
        device, micro_batch = self.ranks.device, config.micro_batch(self.ranks.world_size)
        self.precision = choose_precision(config.train.precision, device)
        torch.manual_seed(config.train.seed)
        attention = choose_attention(config.train.attention, device.type, self.precision)
        self.objective = build_objective(config, attention)
        if config.train.compile:
            self.objective.compile_blocks()
        self.engine = build_engine(config, self.objective, self.precision, micro_batch)
        self.batch = batch or self._random_batch(micro_batch)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = config.optim.lr

    def _random_batch(self, micro_batch: int) -> Images:
        shape = (micro_batch, *self.config.data.image_size, self.config.data.channels)
        device = self.ranks.device
        images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
        positions = torch.arange(micro_batch, device=device) + self.ranks.rank * micro_batch
        return SimpleNamespace(images=images, epochs=torch.zeros_like(positions), positions=positions)

    def step(self) -> torch.Tensor:
        """One optimiser step; returns the loss, float32 scalar."""
        for _ in range(self.config.optim.accumulation):
            loss = self.engine(self.batch)["loss"]
            self.engine.backward(loss)
            self.engine.step()
        return loss.detach()

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
