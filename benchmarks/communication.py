"""A model of a data-parallel step: compute, and bytes over links, by ZeRO stage. Nothing here is measured."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A connection of one rank to the others."""

    bandwidth: float
    """Bytes per second that a rank sends while it receives as many."""
    latency: float
    """Seconds of a message of no length."""


@dataclass(frozen=True)
class Step:
    """A step of one rank alone."""

    compute: float
    """Seconds of forward and backward."""
    update: float
    """Seconds of the optimiser over all parameters."""
    gradient_bytes: int
    """Of all parameters, in the precision of the products; gathered parameters are as many."""


def rounds_of(stage: int) -> float:
    """Times that (n - 1) / n of the parameters cross a rank's link in a step.

    Gradients are summed: 2 in a ring's all-reduce, or 1 in a reduce-scatter, after which updated parameters are
    gathered: 1 (ZeRO 1 and 2). ZeRO 3 gathers them in the forward and the backward pass: 1 + 1 + 1.

    Source: Rajbhandari et al., ZeRO, SC 2020, section 7.
    """
    return 3.0 if stage == 3 else 2.0


def communication_seconds(step: Step, ranks: int, stage: int, link: Link) -> float:
    """Seconds on the wire: a ring's bytes, a tree's latencies."""
    if ranks == 1:
        return 0.0
    volume = rounds_of(stage) * (ranks - 1) / ranks * step.gradient_bytes
    return volume / link.bandwidth + 2 * math.ceil(math.log2(ranks)) * link.latency


def step_seconds(
    step: Step, ranks: int, stage: int, link: Link, overlap: float = 0.0, contention: float = 1.0
) -> float:
    """Seconds of a step of each of `ranks` ranks, with the same images a rank.

    Args:
        step: of one rank alone.
        ranks: how many.
        stage: of ZeRO; from 1 on each rank updates its share.
        link: the slowest that a ring crosses.
        overlap: share of the communication that hides behind computation, if there is enough.
        contention: how many times slower ranks on one machine compute when all do, for what they share.
    """
    update = step.update / (ranks if stage else 1)
    computing = contention * step.compute
    sent = communication_seconds(step, ranks, stage, link)
    return computing + contention * update + sent - min(overlap * sent, computing)


def efficiency(step: Step, ranks: int, stage: int, link: Link, overlap: float = 0.0) -> float:
    """Images per second and rank, over those of one rank alone."""
    return (step.compute + step.update) / step_seconds(step, ranks, stage, link, overlap)
