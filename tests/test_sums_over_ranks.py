"""What two real gloo ranks send each other of gradients, and in how many sums."""

import deepspeed
import pytest
import torch

from benchmarks.gloo import FixedBatch, Group, make_config
from fastmim.deepspeed_fragment import sums_in_place

TINY = [
    *("model.size=null", "model.width=64", "model.depth=2", "model.heads=2", "data.image_size=64"),
    *("objective.decoder_width=32", "objective.decoder_depth=1", "objective.decoder_heads=2"),
    "optim.batch_size=4",
]


@pytest.fixture(scope="module")
def pair():
    with Group(2, threads=1) as group:
        yield group


def sent_in_a_step(words):
    """The dtype and length of each sum over ranks in a step, how many numbers there are in all parameters, and the sum
    of each after it."""
    fixed, found = FixedBatch(make_config([*TINY, *words])), []
    all_reduce = deepspeed.comm.all_reduce

    def seen(tensor, *args, **kwargs):
        found.append((tensor.dtype, tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    deepspeed.comm.all_reduce = seen
    try:
        fixed.step()
    finally:
        deepspeed.comm.all_reduce = all_reduce
    parameters = list(fixed.objective.parameters())
    numbers = sum(parameter.numel() for parameter in parameters)
    return found, numbers, [float(parameter.detach().double().sum()) for parameter in parameters]


STAGE, BUCKET = "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.reduce_bucket_size"


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (["train.precision=bf16"], torch.bfloat16),
        (["train.precision=bf16", "deepspeed.communication_data_type=fp32"], torch.float32),
        (["train.precision=fp32"], torch.float32),
    ],
    ids=["bf16", "bf16, sent in fp32", "fp32"],
)
def test_gradients_are_sent_once_in_the_dtype_that_is_asked_for(pair, words, dtype):
    (found, numbers, first), (_, _, second) = pair.call(sent_in_a_step, [f"{STAGE}=0", *words])
    assert {sent for sent, _ in found} == {dtype} and sum(count for _, count in found) == numbers
    assert first == second


def test_without_zero_a_bucket_is_as_large_as_it_is_told(pair):
    (whole, numbers, first), _ = pair.call(sent_in_a_step, [f"{STAGE}=0"])
    (found, _, second), _ = pair.call(sent_in_a_step, [f"{STAGE}=0", f"{BUCKET}=20000"])
    assert len(whole) == 1 and 4 < len(found) <= numbers // 20000 + 1
    assert sum(count for _, count in found) == numbers and first == second


def settings_of_sums(words):
    """What DeepSpeed was told of sums over ranks."""
    engine = FixedBatch(make_config([*TINY, *words])).engine
    return engine.optimizer.reduce_scatter, engine.optimizer.postscale_gradients


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_zero_sums_in_place_what_it_would_sum_from_a_copy(pair, stage, precision):
    words = [f"{STAGE}={stage}", f"train.precision={precision}", "optim.batch_size=8", "optim.accumulation=2"]
    copied = [*words, "deepspeed.zero_optimization.reduce_scatter=true"]
    assert pair.call(settings_of_sums, words) == 2 * [(False, False)]
    assert pair.call(settings_of_sums, copied) == 2 * [(True, True)]
    (found, numbers, in_place), (_, _, other) = pair.call(sent_in_a_step, words)
    (_, _, from_a_copy), _ = pair.call(sent_in_a_step, copied)
    assert in_place == other == from_a_copy
    assert sum(count for _, count in found if count > 1) >= numbers


@pytest.mark.parametrize(
    "word",
    [
        "deepspeed.gradient_predivide_factor=2",
        "deepspeed.prescale_gradients=false",
        "deepspeed.communication_data_type=fp32",
        "deepspeed.zero_optimization.reduce_bucket_size=20000",
        "deepspeed.zero_optimization.use_multi_rank_bucket_allreduce=false",
    ],
)
def test_a_fragment_that_says_how_gradients_are_summed_is_left_as_it_is(pair, word):
    assert pair.call(settings_of_sums, [f"{STAGE}=1", word]) == 2 * [(True, True)]


def test_gradients_that_are_added_in_another_dtype_than_sent_are_summed_by_deepspeeds_default():
    assert sums_in_place({"zero_optimization": {"stage": 1}}, 1)
    assert not sums_in_place(
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}, 1
    )
