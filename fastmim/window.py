"""What is summed between two records, on the device, so that no step waits for the host."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Window:
    """Sums over the steps since the last record.

    Args:
        device: where the losses are.

    Attributes:
        waited: seconds the loop waited for data.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.waited = 0.0
        self._steps = 0
        self._paused = 0.0
        self._started = time.perf_counter()
        self._loss, self._finite, self._skipped, self._in_a_row, self._most = torch.zeros(5, device=device)
        self._parts: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Start over; a row of skipped steps goes on."""
        in_a_row = self._in_a_row
        self.__init__(self.device)
        self._in_a_row = in_a_row

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Sum a micro-step's losses, float32 scalars; where "loss" is not finite all are left out of the means."""
        losses = {name: loss.detach() for name, loss in losses.items()}
        total = losses.pop("loss")
        finite = total.isfinite()
        self._loss = self._loss + torch.where(finite, total, 0.0)
        self._finite = self._finite + finite
        for name, part in losses.items():
            self._parts[name] = self._parts.get(name, 0.0) + torch.where(finite, part, 0.0)

    def add_step(self, skipped: Tensor | float) -> None:
        """Count an optimiser step, 1 where it was skipped."""
        self._steps += 1
        self._skipped = self._skipped + skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._most = torch.maximum(self._most, self._in_a_row)

    def pause(self, seconds: float) -> None:
        """Leave seconds spent on saving or drawing out of the throughput."""
        self._paused += seconds

    def sums(self) -> Tensor:
        """float32 [3 + parts]: sum of the finite losses, their count, skipped steps, sums of the losses' parts."""
        return torch.stack([self._loss, self._finite, self._skipped, *self._parts.values()])

    def parts(self) -> list[str]:
        """The names of what else `sums` holds, in its order."""
        return list(self._parts)

    def most_in_a_row(self) -> int:
        """Most skipped steps in a row, the same on every rank; waits for the device."""
        return int(self._most)

    def throughput(self, batch_size: int) -> dict[str, Any]:
        """Images per second over all ranks, and the share of time this rank waited for data."""
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        return {"images_per_s": self._steps * batch_size / seconds, "data_wait": self.waited / seconds}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: there a process that was started by a larger one has that one's peak.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
