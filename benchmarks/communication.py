"""A model of a data-parallel step: compute, and bytes over links, by ZeRO stage. Nothing here is measured."""

import math
from dataclasses import dataclass

ROUNDS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""Times that (n - 1) / n of the bytes cross a rank's link in each collective, as a ring of n ranks makes it."""

COLLECTIVES = {
    0: ["all_reduce"],
    1: ["all_reduce", "all_gather"],
    2: ["all_reduce", "all_gather"],
    3: ["all_gather", "reduce_scatter"],
}
"""Of a step, by ZeRO stage: gradients are summed, and parameters gathered.

Source: Rajbhandari et al., ZeRO, SC 2020, section 7, but for two habits of DeepSpeed. At stages 1 and 2 it sends every
rank all gradients, although each keeps a share. At stage 3 it keeps what the forward pass gathered for the backward
pass, up to 10^9 parameters.
"""

HIDEABLE = {0: [], 1: ["all_reduce"], 2: ["all_reduce"], 3: ["all_gather", "reduce_scatter"]}
"""Those that can go on while a pass computes: not the sum without ZeRO, nor the gathering of what was just updated."""


@dataclass(frozen=True)
class Link:
    """A connection of one rank to the others."""

    bandwidth: dict[str, float]
    """Bytes per second that a rank sends while it receives as many, by collective."""
    latency: float
    """Seconds of a message of no length."""


@dataclass(frozen=True)
class Step:
    """A step of one rank that sums and updates as each of several does, but sends nothing."""

    compute: float
    """Seconds of forward and backward."""
    update: float
    """Seconds of the optimiser over all parameters."""
    gradient_bytes: int
    """Of all parameters, in the precision of the products; gathered parameters are as many."""


def communication_seconds(
    step: Step, ranks: int, stage: int, link: Link, of: dict[int, list[str]] = COLLECTIVES
) -> float:
    """Seconds on the wire of a step's collectives: a ring's bytes, a tree's latencies."""
    if ranks == 1:
        return 0.0
    crossing = (ranks - 1) / ranks * step.gradient_bytes
    hops = math.ceil(math.log2(ranks))
    return sum(ROUNDS[name] * (crossing / link.bandwidth[name] + hops * link.latency) for name in of[stage])


def step_seconds(step: Step, ranks: int, stage: int, link: Link, overlap: float = 0.0) -> float:
    """Seconds of a step of each of `ranks` ranks, with the same images a rank.

    Args:
        step: of one rank.
        ranks: how many.
        stage: of ZeRO; from 1 on each rank updates its share.
        link: the slowest that a ring crosses.
        overlap: share of what can hide behind computation that does, if there is enough.
    """
    update = step.update / (ranks if stage else 1)
    sent = communication_seconds(step, ranks, stage, link)
    hidden = overlap * communication_seconds(step, ranks, stage, link, HIDEABLE)
    return step.compute + update + sent - min(hidden, step.compute)


def efficiency(step: Step, ranks: int, stage: int, link: Link, overlap: float = 0.0) -> float:
    """Images per second and rank, over those of one rank alone."""
    return (step.compute + step.update) / step_seconds(step, ranks, stage, link, overlap)
