"""Batches of several ranks against those of one."""

import threading

import numpy as np
import pytest
import torch

from fastmim.config_data import DataConfig
from fastmim.data.schedule import Schedule
from fastmim.evaluate import shards


class Rank:
    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize(
    "images, size, world_size", [(23, 4, 2), (23, 4, 3), (8, 4, 3), (3, 4, 2), (12, 1, 2)]
)
def test_every_rank_has_all_batches_in_order(monkeypatch, images, size, world_size):
    sides = np.full(images, 32)
    plan = Schedule(sides, sides, 0, DataConfig(crop="center_crop")).plan(np.arange(images))
    meeting, sent, seen = threading.Barrier(world_size), {}, {}
    here = threading.local()

    def all_gather(everyone, mine):
        sent[here.rank] = mine
        meeting.wait(10)
        for rank, place in enumerate(everyone):
            place.copy_(sent[rank])
        meeting.wait(10)

    monkeypatch.setattr(shards.dist, "all_gather", all_gather)

    def work(rank):
        here.rank, ranks = rank, Rank(rank, world_size)
        own = torch.from_numpy(shards.own_batches(plan, size, ranks).sample)
        # What was computed of a batch tells which batch it was.
        results = (
            torch.stack([batch, batch.sum().expand(len(batch))], 1) for batch in own.split(size) if len(batch)
        )
        seen[rank] = list(
            shards.gather_batches(results, images, size, torch.empty(0, 2, dtype=torch.int64), ranks)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wanted = torch.from_numpy(plan.sample).split(size)
    for rank in range(world_size):
        assert [batch[:, 0].tolist() for batch in seen[rank]] == [batch.tolist() for batch in wanted]
        assert [batch[0, 1].item() for batch in seen[rank]] == [batch.sum().item() for batch in wanted]
