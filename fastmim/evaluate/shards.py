"""Work on a plan's images by all ranks: whole batches each, and every rank holds the results of all."""

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from torch import Tensor

from fastmim.data.schedule import Plan
from fastmim.ranks import Ranks


def own_batches(plan: Plan, size: int, ranks: Ranks) -> Plan:
    """What this rank computes: one of each `world_size` batches, whole, so that an image's batch is that of one rank.

    Args:
        plan: of all ranks.
        size: images in a batch; the last one may hold fewer.
        ranks: this process among all.
    """
    batch = np.arange(len(plan)) // size
    return plan.take(batch % ranks.world_size == ranks.rank)


def gather_batches(
    own: Iterator[Tensor], images: int, size: int, none: Tensor, ranks: Ranks
) -> Iterator[Tensor]:
    """The results of all batches in the plan's order, on every rank.

    Args:
        own: a result [b, ...] for each batch of `own_batches`, in their order.
        images: of all ranks.
        size: images in a batch.
        none: a result of no image, [0, ...]; tells shape, dtype and device.
        ranks: this process among all.
    """
    if ranks.world_size == 1:
        yield from own
        return
    for first in range(0, images, size * ranks.world_size):
        counts = [min(size, max(0, images - first - rank * size)) for rank in range(ranks.world_size)]
        mine = none.new_zeros(size, *none.shape[1:])
        if counts[ranks.rank]:
            mine[: counts[ranks.rank]] = next(own)
        everyone = [none.new_empty(mine.shape) for _ in counts]
        dist.all_gather(everyone, mine)
        yield from (rows[:count] for rows, count in zip(everyone, counts, strict=True) if count)
