"""What two real gloo ranks send each other of gradients, without ZeRO."""

import deepspeed
import pytest
import torch

from benchmarks.gloo import FixedBatch, Group, make_config

TINY = [
    *("model.size=null", "model.width=64", "model.depth=2", "model.heads=2", "data.image_size=64"),
    *("objective.decoder_width=32", "objective.decoder_depth=1", "objective.decoder_heads=2"),
    *("optim.batch_size=4", "deepspeed.zero_optimization.stage=0"),
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
    (found, numbers, first), (_, _, second) = pair.call(sent_in_a_step, words)
    assert {sent for sent, _ in found} == {dtype} and sum(count for _, count in found) == numbers
    assert first == second
