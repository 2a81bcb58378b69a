"""An exponential moving average of the weights, kept in float32 and sharded as the optimiser's masters are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmim.halves import Master


class EMA:
    """Average of an optimiser's float32 master tensors.

    Args:
        masters: this rank's float32 masters; whole parameters or the shards of ZeRO.
        decay: weight of the past per step.
    """

    def __init__(self, masters: Sequence[Tensor | Master], decay: float):
        self.masters = masters
        self.decay = decay
        self.averages = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, skipped: Tensor | float) -> None:
        """average = decay * average + (1 - decay) * master; a skipped step (1) changes nothing."""
        if isinstance(skipped, Tensor):  # known to the device alone
            weight = (1 - self.decay) * (1 - skipped)
            for average, master in zip(self.averages, self.masters, strict=True):
                average.lerp_(master.detach(), weight)
        elif not skipped:
            torch._foreach_lerp_(self.averages, [m.detach() for m in self.masters], 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange averages and masters, so that whatever reads or writes the masters meets the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for master, average in zip(self.masters, self.averages, strict=True):
            held = master.detach().clone()
            master.copy_(average)
            average.copy_(held)
