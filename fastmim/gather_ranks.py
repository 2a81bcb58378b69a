"""The rows of all ranks, with gradients: what a contrast over the global batch needs."""

import torch
import torch.distributed as dist
from torch import Tensor

# Older versions of torch know them by their longer names, which newer ones warn of.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        everyone = rows.new_empty(dist.get_world_size() * rows.shape[0], *rows.shape[1:])
        _all_gather(everyone, rows.contiguous())
        return everyone

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each rank's loss reads every row, so a row's gradient is the sum of what all ranks found.
        own = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        _reduce_scatter(own, grad.contiguous())
        return own


def gather_ranks(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks in the order of ranks, and where this rank's begin.

    The gradient of a row is the sum over all ranks of that of their losses. A trainer that averages gradients over
    ranks then has the gradient of the mean of the ranks' losses.

    Args:
        rows: [R, ...], of one shape on every rank.

    Returns:
        [world size x R, ...] and this rank's first row there; `rows` itself and 0 where there is one rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    return _GatherRanks.apply(rows), dist.get_rank() * rows.shape[0]
