"""A network that is used and never trained: a tokenizer or a teacher."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


class Frozen:
    """Calls a module without gradients, in evaluation mode and in its own precision.

    It is no module itself, so that an objective which holds one does not register it: the optimiser, ZeRO's shards,
    averages, checkpoints and `module.bfloat16()` do not meet the frozen weights.

    Args:
        module: what is called; it is put into evaluation mode and its parameters need no gradient any more.

    Attributes:
        module: that.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)
        self._device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """What the module gives for `x`, on whose device it moves at the first call."""
        if self._device != x.device:
            self.module.to(x.device)
            self._device = x.device
        return self.module(x, *arguments, **options)

    def fingerprint(self) -> str:
        """SHA-256 of all parameters and buffers: a run that goes on must go on with the same network."""
        digest = hashlib.sha256()
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
