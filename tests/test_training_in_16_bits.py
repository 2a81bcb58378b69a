"""launch.py in fp16 and bf16: close to float32, the same on two ranks, and averages of the masters."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmim.manifest import EMA_WEIGHTS, WEIGHTS, checkpoint_path
from tests.launching import TINY_YAML, environment, launch, losses, records, train, write_images


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sixteen_bits")
    write_images(folder / "images", 24)
    (folder / "tiny.yaml").write_text(TINY_YAML)
    return folder / "tiny.yaml"


FP16 = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().is_fp16_supported = lambda: True  # slow on most CPUs, but computed
import fastmim.trainer as trainer
from fastmim import recipes
trainer.choose_precision = lambda *_: "fp16"
sys.exit(trainer.train(recipes.load(sys.argv[1], sys.argv[2:])))
"""


# Full steps from the first on, so that one of another size would show.
FULL = ["data.source=images", "train.max_steps=10", "optim.warmup_epochs=0"]


@pytest.fixture(scope="module")
def full_fp32(recipe):
    return losses(train(recipe, *FULL, "output=full_fp32"))


def train_in_fp16(recipe, stage):
    (recipe.parent / "fp16.py").write_text(FP16)
    arguments = [recipe.name, *FULL, f"output=fp16_{stage}", f"deepspeed.zero_optimization.stage={stage}"]
    return subprocess.run(
        [sys.executable, "fp16.py", *arguments],
        cwd=recipe.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_with_loss_scaling_follows_fp32(recipe, full_fp32, stage):
    done = train_in_fp16(recipe, stage)
    assert done.returncode == 0, done.stderr
    got = records(recipe.parent / f"fp16_{stage}")
    assert got[-1]["skipped_steps"] == 0
    np.testing.assert_allclose(losses(got), full_fp32, rtol=2e-3)


def test_fp16_without_zero_is_refused(recipe):
    done = train_in_fp16(recipe, 0)
    assert (
        done.returncode != 0
        and "stage=0 with fp16, whose loss DeepSpeed scales under ZeRO only" in done.stderr
    )
    assert not (recipe.parent / "fp16_0/metrics.jsonl").exists()


def test_a_sum_in_float32_without_zero_is_refused_where_ranks_sum_in_bf16(recipe):
    words = [*BF16, "output=sums", "deepspeed={data_types: {grad_accum_dtype: fp32}}"]
    done = launch(recipe, *words, ranks=2)
    assert done.returncode == 2 and "grad_accum_dtype='fp32' with deepspeed.zero" in done.stdout


@pytest.mark.parametrize("wanted", ["bf16", "fp16"])
def test_a_sum_in_fewer_bits_than_float32_has_is_refused(recipe, wanted):
    done = launch(
        recipe,
        "data.source=images",
        "output=sums",
        f"deepspeed={{data_types: {{grad_accum_dtype: {wanted}}}}}",
    )
    assert done.returncode == 2
    assert f"grad_accum_dtype='{wanted}' with precision fp32; expected fp32" in done.stdout


BF16 = [*FULL, "train.precision=bf16"]


@pytest.fixture(scope="module")
def one_rank_bf16(recipe):
    return losses(train(recipe, *BF16, "output=bf16", "deepspeed.zero_optimization.stage=1"))


def test_bf16_follows_fp32(full_fp32, one_rank_bf16):
    np.testing.assert_allclose(one_rank_bf16, full_fp32, rtol=0.03)


AVERAGED = ["deepspeed.zero_optimization.stage=1", "optim.accumulation=2", "train.ema_decay=0.5"]
ON_TWO_RANKS = {
    "0": ["deepspeed.zero_optimization.stage=0"],
    "1": AVERAGED,
    "1_sums_in_float32": [*AVERAGED, "deepspeed.data_types={grad_accum_dtype: fp32}"],
    # Buckets of a few parameters, as on GPUs: they are summed while the backward pass goes on.
    "2_overlapped": ["deepspeed.zero_optimization={stage: 2, overlap_comm: true, reduce_bucket_size: 5000}"],
    "3": ["deepspeed.zero_optimization.stage=3"],
}


@pytest.fixture(scope="module")
def on_two_ranks(recipe):
    """The run of a variant and its records."""

    @functools.cache
    def run(variant):
        output = f"bf16_{variant}"
        got = train(recipe, *BF16, f"output={output}", *ON_TWO_RANKS[variant], ranks=2)
        return recipe.parent / output, got

    return run


@pytest.mark.parametrize("variant", ON_TWO_RANKS)
def test_bf16_is_the_same_on_two_ranks(on_two_ranks, one_rank_bf16, variant):
    """Two ranks go through DeepSpeed's optimisers, one does not where it has nothing to shard."""
    np.testing.assert_allclose(losses(on_two_ranks(variant)[1]), one_rank_bf16, rtol=2e-3)


def test_the_average_is_of_the_masters_of_either_optimiser(on_two_ranks):
    """Of float32 numbers, which move by less than bfloat16 can tell, and not of what is trained."""
    runs = [on_two_ranks(variant)[0] for variant in ("1", "1_sums_in_float32")]
    averages, weights = (
        [load_file(checkpoint_path(run, 10) / file) for run in runs] for file in (EMA_WEIGHTS, WEIGHTS)
    )
    assert averages[0].keys() == weights[0].keys()
    for name, average in averages[0].items():
        torch.testing.assert_close(averages[1][name], average, rtol=0, atol=2e-3)
    moved = [(averages[1][name] - weights[1][name]).abs().max() for name in weights[1]]
    assert max(moved) > 1e-4
