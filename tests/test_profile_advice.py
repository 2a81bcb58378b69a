"""What `fastmim profile` says of made-up figures: a report that sums, and advice."""

import dataclasses

import pytest

from fastmim.flops import Flops
from fastmim.profiling.advice import advise
from fastmim.profiling.figures import Figures
from fastmim.profiling.report import describe

BALANCED = Figures(
    recipe="made up",
    device="GPU",
    on_cuda=True,
    precision="bf16",
    best_precision="bf16",
    ranks=2,
    ranks_here=2,
    cores=16,
    micro_batch=64,
    accumulation=1,
    steps=10,
    source="tar",
    threads=8,
    zero_stage=1,
    parameters=10**8,
    checkpointing=False,
    compiled=True,
    seconds={
        "data": 0.01,
        "encoder": 0.3,
        "loss": 0.01,
        "backward": 0.6,
        "optimiser": 0.05,
        "communication": 0.02,
        "other": 0.01,
    },
    fastest=0.9,
    slowest=1.1,
    flops={"patch_embed": Flops(10**9, 10**9), "encoder": Flops(10**12, 2 * 10**12)},
    peak_flops=4e14,
    memory={"parameters": 2 * 10**8, "buckets": 2 * 10**8, "gradients": 10**8, "activations": 55 * 10**9},
    peak_memory=56 * 10**9,
    memory_limit=80 * 10**9,
)
ON_CPU = {"on_cuda": False, "device": "cpu", "compiled": False}


def changed(seconds=(), **values) -> Figures:
    """`BALANCED` with other values; the seconds of some phases are replaced."""
    return dataclasses.replace(BALANCED, seconds={**BALANCED.seconds, **dict(seconds)}, **values)


def test_a_balanced_step_needs_no_advice():
    assert advise(BALANCED) == []
    assert describe(BALANCED, []).endswith("nothing to advise: no part stands out")


ADVICE = {
    "data, few threads": (
        changed({"data": 0.25}, threads=2),
        ["waits for data for 20%", "data.threads=8 (now 2)", "mask.repeats=2"],
        ["tar shards", "GPU decodes"],
    ),
    "data, a folder on a CPU": (
        changed({"data": 0.25}, source="folder", **ON_CPU),
        ["waits for data for 20%", "tar shards or an .npy array", "a GPU decodes JPEG"],
        ["data.threads"],
    ),
    "data, an array": (changed({"data": 0.25}, source="npy"), ["mask.repeats"], ["tar", "decodes JPEG"]),
    "memory": (
        changed(peak_memory=76 * 10**9),
        [
            "memory is 95% full, most of it activations (51.2 GiB)",
            "activation_checkpointing=true",
            "zero_optimization.stage=2 (now 1)",
            "optim.accumulation=2 (now 1)",
        ],
        [],
    ),
    "memory, and nothing left to do": (
        changed(peak_memory=76 * 10**9, checkpointing=True, zero_stage=3, micro_batch=1),
        ["memory is 95% full", "a smaller model"],
        ["zero_optimization", "accumulation"],
    ),
    "communication": (
        changed({"communication": 0.3}, zero_stage=3),
        ["communication takes 23% of a step", "stage=1 (now 3)"],
        [],
    ),
    "communication, without ZeRO": (changed({"communication": 0.3}, zero_stage=0), ["23%"], ["stage"]),
    "optimiser": (
        changed({"optimiser": 0.2375}, zero_stage=0),
        ["the optimiser takes 20% of a step", "more than 64 images", "stage=1 shares it"],
        [],
    ),
    "low utilisation": (
        changed(compiled=False, precision="fp32", peak_flops=1e15, peak_memory=10**10),
        [
            "reaches 20% of the measured peak",
            "train.precision=bf16 (now fp32)",
            "train.compile=true",
            "12% full",
        ],
        [],
    ),
    "low utilisation of a CPU": (
        changed(peak_flops=1e15, peak_memory=10**10, **ON_CPU),
        ["reaches 20%", "a larger optim.batch_size"],
        ["compile"],
    ),
    "the loop": (changed({"other": 0.25}), ["20% of a step (250.0 ms) is the loop around the model"], []),
    "ranks without cores": (changed(cores=1, threads=1, **ON_CPU), ["2 ranks share 1 cores"], []),
    "buckets": (
        changed(memory={**BALANCED.memory, "buckets": 10**9}),
        ["buckets of 954 MiB", "reduce_bucket_size=100000000"],
        [],
    ),
    "needless checkpointing": (
        changed(checkpointing=True, peak_memory=20 * 10**9),
        ["memory is 25% full with train.activation_checkpointing=true"],
        [],
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_follows_from_the_figures(case):
    figures, wanted, unwanted = ADVICE[case]
    advice = advise(figures)
    assert len(advice) == 1, advice
    assert all(words in advice[0] for words in wanted), advice
    assert not any(words in advice[0] for words in unwanted), advice


def test_waiting_for_data_is_no_low_utilisation():
    advice = advise(changed({"data": 9.0}))
    assert len(advice) == 1 and advice[0].startswith("a step waits for data for 90%")


def test_the_report_sums_and_gives_flops_to_phases():
    told = describe(BALANCED, advise(BALANCED))
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line}
    assert rows["step"][:2] == ["1000.00", "100.0%"]
    # 64 images of 1e12 in 0.3 s against a peak of 4e14.
    assert rows["backward"] == ["600.00", "60.0%", "128064.00", "53.4%"]
    assert rows["optimiser"] == ["50.00", "5.0%"]
    assert "2 steps" not in told and "128 images/s" in told
