"""What was measured of a step, and what it was measured with."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastmim.flops import Flops


@dataclass(frozen=True)
class Figures:
    """A step of one rank. Seconds are means over the measured steps, so that phases sum to the step."""

    recipe: str
    device: str
    """cpu, or the GPU's name."""
    on_cuda: bool
    precision: str
    best_precision: str
    """The fastest that this device computes."""
    ranks: int
    ranks_here: int
    """On this node."""
    cores: int
    """That this node's ranks may use."""
    micro_batch: int
    accumulation: int
    steps: int
    source: str
    """folder, tar or npy."""
    threads: int
    """Decoding threads of this rank."""
    zero_stage: int
    parameters: int
    """Of the whole model, those that are learned."""
    checkpointing: bool
    compiled: bool
    seconds: dict[str, float]
    """By phase, in the order in which they are told."""
    fastest: float
    slowest: float
    """Steps, in seconds."""
    flops: dict[str, Flops]
    """Of one image, by module."""
    peak_flops: float
    """Per second, measured by a large matrix product in the same precision."""
    memory: dict[str, int]
    """Bytes by kind on the device."""
    peak_memory: int
    """Bytes: allocated on a GPU, resident in the process on a CPU."""
    memory_limit: int
    """Bytes of the device, or of the machine over the ranks that share it."""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def share(self, phase: str) -> float:
        """Of a step's time, 0 to 1."""
        return self.seconds.get(phase, 0.0) / self.step

    @property
    def images(self) -> int:
        """Of a step, on this rank."""
        return self.micro_batch * self.accumulation

    @property
    def step_flops(self) -> int:
        """Of a step, on this rank."""
        return self.images * sum(sum(flops) for flops in self.flops.values())

    def mfu(self, flops: float, seconds: float) -> float:
        """Share of the measured peak that these FLOPs in these seconds are."""
        return flops / seconds / self.peak_flops

    @property
    def step_mfu(self) -> float:
        """Model FLOPs utilisation of whole steps."""
        return self.mfu(self.step_flops, self.step)

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        derived = {
            "step_seconds": self.step,
            "images_per_s": self.images * self.ranks / self.step,
            "flops_per_step": self.step_flops,
            "mfu": self.step_mfu,
        }
        flops = {name: part._asdict() for name, part in self.flops.items()}
        return {**asdict(self), "flops": flops, **derived}


def memory_limit(device: torch.device, ranks_here: int) -> int:
    """Bytes that a rank can hold: its GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
