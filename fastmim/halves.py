"""float32 numbers in two halves: a bfloat16 tensor, which a model computes with, and 16 bits that complete it.

A float32 number is the nearest one that bfloat16 has, which is its upper 16 bits, or those and one, and its lower 16
bits, which say which: 2 + 2 bytes hold what a float32 copy beside the parameter holds in 2 + 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def join(low: Tensor, rest: Tensor) -> Tensor:
    """The float32 numbers, new, of two halves: bfloat16, and int16 of the same shape."""
    bits = low.detach().view(torch.int16).int()
    return torch.add(rest, bits, alpha=1 << 16).view(torch.float32)


def split(value: Tensor, low: Tensor, rest: Tensor) -> None:
    """Write float32 numbers as two halves, bfloat16 and int16 of the same shape. A tie is rounded away from zero."""
    bits = value.view(torch.int32)
    rest.copy_(bits)
    low.detach().view(torch.int16).copy_((bits + (1 << 15)).bitwise_right_shift_(16))


@dataclass(frozen=True)
class Master:
    """A parameter's float32 numbers in two halves; read and written as a tensor is."""

    low: Tensor
    rest: Tensor

    def detach(self) -> Tensor:
        """A new float32 tensor."""
        return join(self.low, self.rest)

    def copy_(self, value: Tensor) -> None:
        """Take the numbers of a float32 tensor."""
        split(value.detach().contiguous(), self.low, self.rest)
