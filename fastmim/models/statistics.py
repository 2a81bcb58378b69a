"""Constants of the data, which the precision of a model must not round."""

from torch import nn


class Statistics(nn.Module):
    """A module of buffers that follow the model to its device and stay float32 whatever its precision.

    `module.bfloat16()` would round them, and with them every target.
    """

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(buffer.new_empty(0)).device
                self._buffers[name] = buffer.to(device)
        return self
