"""Advice that follows from a profile by plain rules; every sentence holds the figure that it is drawn from."""

from collections.abc import Iterator

from fastmim.profiling.figures import Figures

DATA_SHARE = 0.10
OPTIMISER_SHARE = 0.15
COMMUNICATION_SHARE = 0.10
OTHER_SHARE = 0.10
LOW_MFU = 0.35
FULL_MEMORY = 0.90
SPARE_MEMORY = 0.50
LARGE_BUCKETS = 4
"""Times the parameters."""


def advise(figures: Figures) -> list[str]:
    """What would make these steps faster or smaller, the most telling first; empty where nothing stands out."""
    rules = (
        _oversubscribed,
        _memory,
        _data,
        _communication,
        _optimiser,
        _arithmetic,
        _host,
        _buckets,
        _checkpointing,
    )
    return [sentence for rule in rules for sentence in rule(figures)]


def _oversubscribed(figures: Figures) -> Iterator[str]:
    if not figures.on_cuda and figures.ranks_here > figures.cores:
        yield (
            f"{figures.ranks_here} ranks share {figures.cores} cores: they wait for each other. Start at most "
            f"{figures.cores}"
        )


def _memory(figures: Figures) -> Iterator[str]:
    full = figures.peak_memory / figures.memory_limit
    if full <= FULL_MEMORY:
        return
    ways = []
    if not figures.checkpointing:
        ways.append(
            "train.activation_checkpointing=true stores one tensor a block and computes the rest again"
        )
    if figures.ranks > 1 and figures.zero_stage < 3:
        ways.append(
            f"deepspeed.zero_optimization.stage={figures.zero_stage + 1} (now {figures.zero_stage}) shards more"
        )
    if figures.micro_batch > 1:
        ways.append(
            f"optim.accumulation={2 * figures.accumulation} (now {figures.accumulation}) halves the "
            f"{figures.micro_batch} images of a backward pass, at the same batch"
        )
    largest = max(figures.memory, key=lambda kind: figures.memory[kind])
    yield (
        f"memory is {full:.0%} full, most of it {largest} ({figures.memory[largest] / 2**30:.1f} GiB): "
        + "; ".join(ways or ["a smaller model is left"])
    )


def _data(figures: Figures) -> Iterator[str]:
    share = figures.share("data")
    if share <= DATA_SHARE:
        return
    ways, cores = [], max(1, figures.cores // figures.ranks_here)
    if figures.threads < cores:
        ways.append(f"data.threads={cores} (now {figures.threads}) decodes with all cores of this rank")
    if figures.source == "folder":
        ways.append("tar shards or an .npy array spare opening a file for each image")
    if figures.source != "npy":
        ways.append("an .npy array of smaller images spares decoding")
        if not figures.on_cuda:
            ways.append("a GPU decodes JPEG itself")
    ways.append("mask.repeats=2 masks each decoded image twice")
    yield f"a step waits for data for {share:.0%} of its time: " + "; ".join(ways)


def _communication(figures: Figures) -> Iterator[str]:
    share = figures.share("communication")
    if share <= COMMUNICATION_SHARE:
        return
    ways = [
        "a larger optim.batch_size, by optim.accumulation where memory is short, reduces gradients less often"
    ]
    if figures.zero_stage > 1:
        ways.append(f"deepspeed.zero_optimization.stage=1 (now {figures.zero_stage}) sends less, if it fits")
    yield f"communication takes {share:.0%} of a step: " + "; ".join(ways)


def _optimiser(figures: Figures) -> Iterator[str]:
    share = figures.share("optimiser")
    if share <= OPTIMISER_SHARE:
        return
    ways = [
        f"it costs the same for any batch, so more than {figures.images} images a step and rank pay for it"
    ]
    if figures.ranks > 1 and figures.zero_stage == 0:
        ways.append("deepspeed.zero_optimization.stage=1 shares it among the ranks")
    yield f"the optimiser takes {share:.0%} of a step: " + "; ".join(ways)


def _arithmetic(figures: Figures) -> Iterator[str]:
    waiting = figures.seconds.get("data", 0.0) + figures.seconds.get("communication", 0.0)
    mfu = figures.mfu(figures.step_flops, figures.step - waiting)
    if mfu >= LOW_MFU:
        return
    ways = []
    if figures.precision == "fp32" and figures.best_precision != "fp32":
        ways.append(f"train.precision={figures.best_precision} (now fp32)")
    if figures.on_cuda and not figures.compiled and figures.zero_stage < 3:  # slower on CPUs
        ways.append("train.compile=true fuses what is not a matrix product")
    if figures.peak_memory < SPARE_MEMORY * figures.memory_limit:
        used = figures.peak_memory / figures.memory_limit
        ways.append(
            f"more images at once than {figures.micro_batch}, as memory is {used:.0%} full: a larger "
            + ("optim.batch_size" if figures.accumulation == 1 else "batch, or less optim.accumulation")
        )
    if ways:
        yield f"a step reaches {mfu:.0%} of the measured peak while it computes: " + "; ".join(ways)


def _host(figures: Figures) -> Iterator[str]:
    share = figures.share("other")
    if share > OTHER_SHARE:
        yield (
            f"{share:.0%} of a step ({1000 * figures.seconds['other']:.1f} ms) is the loop around the model, the same "
            f"for any batch: more images at once than {figures.micro_batch} pay for it"
        )


def _buckets(figures: Figures) -> Iterator[str]:
    buckets = figures.memory.get("buckets", 0)
    if buckets > LARGE_BUCKETS * figures.memory["parameters"]:
        yield (
            f"ZeRO allocates buckets of {buckets / 2**20:.0f} MiB in every step, for a model of "
            f"{figures.parameters:,} parameters: deepspeed.zero_optimization.reduce_bucket_size="
            f"{figures.parameters} holds all their gradients"
        )


def _checkpointing(figures: Figures) -> Iterator[str]:
    used = figures.peak_memory / figures.memory_limit
    if figures.checkpointing and used < SPARE_MEMORY:
        yield (
            f"memory is {used:.0%} full with train.activation_checkpointing=true, which computes each block twice: "
            "try it without"
        )
