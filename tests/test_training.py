"""launch.py on real images: ranks, ZeRO stages, sources, kernels, precisions and bad luck."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastmim import recipes
from fastmim.engine import deepspeed_config
from tests.launching import (
    TINY_YAML,
    environment,
    launch,
    losses,
    records,
    train,
    write_images,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_images(folder / "images", 24)
    (folder / "tiny.yaml").write_text(TINY_YAML)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def one_rank(recipe):
    """Losses of 20 steps on one rank, in float32, without ZeRO."""
    return losses(train(recipe, "data.source=images", "output=one", "train.max_steps=20"))


def test_it_learns(one_rank):
    assert len(one_rank) == 20
    assert np.mean(one_rank[-4:]) < 0.9 * np.mean(one_rank[:4])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_and_any_zero_stage_give_the_losses_of_one(recipe, one_rank, stage):
    got = train(
        recipe,
        "data.source=images",
        f"output=zero{stage}",
        "train.max_steps=20",
        f"deepspeed.zero_optimization.stage={stage}",
        ranks=2,
    )
    np.testing.assert_allclose(losses(got), one_rank, rtol=1e-4)


VARIANTS = {
    "accumulation": ["optim.accumulation=4"],
    "activation checkpointing": ["train.activation_checkpointing=true"],
    "compile": ["train.compile=true"],
    "ema": ["train.ema_decay=0.9"],
    "more threads": ["data.threads=3", "data.prefetch=5"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_a_step_is_computed_does_not_change_it(recipe, one_rank, variant):
    output = f"output={variant.replace(' ', '_')}"
    got = train(recipe, "data.source=images", output, "train.max_steps=5", *VARIANTS[variant])
    np.testing.assert_allclose(losses(got), one_rank[:5], rtol=1e-4)


ON_A_GPU = {
    "float32": [],
    "bf16": ["train.precision=bf16"],
    "ZeRO 1": ["train.precision=bf16", "deepspeed.zero_optimization.stage=1"],
    "ZeRO 3": ["train.precision=bf16", "deepspeed.zero_optimization.stage=3"],
    "compile": ["train.precision=bf16", "train.compile=true"],
    "activation checkpointing": ["train.activation_checkpointing=true"],
    "ema": ["train.ema_decay=0.9"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ON_A_GPU)
def test_it_learns_on_a_gpu(recipe, variant):
    words = ["data.source=images", "train.max_steps=20", *ON_A_GPU[variant]]
    got = losses(train(recipe, *words, f"output=gpu_{variant.replace(' ', '_')}"))
    assert len(got) == 20
    assert np.mean(got[-4:]) < 0.9 * np.mean(got[:4])


def test_the_real_kernels_interpreted_give_the_references_losses(recipe, one_rank):
    arguments = ["data.source=images", "output=interpret", "train.max_steps=3"]
    done = launch(recipe, *arguments, FASTMIM_KERNELS="interpret")
    assert done.returncode == 0, done.stdout
    assert "cpu tensors: Triton kernels (FASTMIM_KERNELS=interpret)" in done.stdout
    np.testing.assert_allclose(losses(records(recipe.parent / "interpret")), one_rank[:3], rtol=1e-5)


WAITS = """
import sys
from deepspeed.accelerator import get_accelerator
waits = []
get_accelerator().synchronize = lambda *_: waits.append(1)
import fastmim.trainer as trainer
from fastmim import recipes
code = trainer.train(recipes.load(sys.argv[1], sys.argv[2:]))
print(f"{len(waits)} waits")
sys.exit(code)
"""


def test_deepspeed_does_not_wait_for_the_device_in_a_step(recipe):
    """Its own timer would, twice in every micro-batch from the third step on."""
    (recipe.parent / "waits.py").write_text(WAITS)
    words = ["data.source=images", "output=waits", "train.max_steps=6", "optim.accumulation=2"]
    done = subprocess.run(
        [sys.executable, "waits.py", recipe.name, *words],
        cwd=recipe.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\n0 waits" in f"\n{done.stdout}"


def test_clipping_bounds_the_step(recipe, one_rank):
    got = train(recipe, "data.source=images", "output=clip", "train.max_steps=3", "optim.clip_grad=1.0e-9")
    # The first step has learning rate 0 and the others next to no gradient: only weight decay acts.
    assert losses(got)[1] == pytest.approx(one_rank[1], rel=1e-5)
    assert got[0]["grad_norm"] > 0.01


@pytest.mark.parametrize("stage", [0, 2])
def test_nothing_is_clipped_unless_asked(recipe, stage):
    """DeepSpeed clips to a norm of 1 where it is told nothing."""
    got = train(
        recipe,
        *("data.source=images", f"output=free_{stage}", "train.max_steps=1", "data.std=[0.01,0.01,0.01]"),
        f"deepspeed.zero_optimization.stage={stage}",
    )
    assert got[0]["grad_norm"] > 2
    config = deepspeed_config(recipes.load(str(recipe)), "fp32", 8)
    assert config["gradient_clipping"] == 0.0


def test_one_image_makes_an_epoch_of_many_crops_and_repeats_are_masked_anew(recipe):
    write_images(recipe.parent / "one", 1)
    words = ["data.source=one", "data.samples_per_epoch=32", "train.max_steps=8"]
    got = train(recipe, *words, "output=single")
    assert [record["epoch"] for record in got] == [step / 4 for step in range(1, 9)]
    assert len(set(losses(got))) == 8  # other crops and masks each time
    # Eight masks of one crop: less varied data, at the same number of steps.
    repeated = train(recipe, *words, "output=repeated", "mask.repeats=8")
    assert losses(repeated)[0] != losses(got)[0] and len(set(losses(repeated))) == 8
    crops = train(recipe, *words, "output=crops", "mask.repeats=8", "mask.repeat_crops=true")
    # Eight crops of one decoding are the eight of as many decodings; the later epoch's count on.
    assert losses(crops)[:4] == losses(got)[:4] and losses(crops)[4] != losses(got)[4]
    refused = launch(recipe, *words, "output=refused", "mask.repeats=3")
    assert refused.returncode == 2 and "mask.repeats=3; expected a divisor of the 8 images" in refused.stdout


def test_folder_tar_and_npy_of_the_same_images_give_the_same_losses(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (16, 6, 6, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(one).resize((56, 40), Image.Resampling.BICUBIC)) for one in small]
    np.save(tmp_path / "images.npy", np.stack(images))
    (tmp_path / "images").mkdir()
    with (
        tarfile.open(tmp_path / "shard-000.tar", "w") as first,
        tarfile.open(tmp_path / "shard-001.tar", "w") as last,
    ):
        for i, image in enumerate(images):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            (tmp_path / "images" / f"{i:03d}.png").write_bytes(encoded.getvalue())
            member = tarfile.TarInfo(f"{i:03d}.png")
            member.size = len(encoded.getvalue())
            (first if i < 7 else last).addfile(member, io.BytesIO(encoded.getvalue()))
    sources = {"folder": "images", "tar": "shard-*.tar", "npy": "images.npy"}
    got = {
        name: losses(
            train(tmp_path / "tiny.yaml", f"data.source={source}", f"output={name}", "train.max_steps=5")
        )
        for name, source in sources.items()
    }
    assert got["folder"] == got["tar"] == got["npy"]


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 2), ("bf16", 1), ("bf16", 2)])
def test_non_finite_steps_are_skipped_then_the_run_aborts(recipe, precision, stage):
    output = f"diverge_{precision}_{stage}"
    done = launch(
        recipe,
        "data.source=images",
        f"output={output}",
        "optim.blr=1.0e+37",
        "train.max_skipped_in_a_row=4",
        f"train.precision={precision}",
        f"deepspeed.zero_optimization.stage={stage}",
        ranks=2 if stage == 2 else 1,
    )
    assert done.returncode == 3, done.stdout
    assert "4 steps in a row had a non-finite loss or gradient" in done.stdout
    skipped = json.loads((recipe.parent / output / "skipped-rank0.json").read_text())
    assert len(skipped[-1]["samples"][0]) == (4 if stage == 2 else 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mask.ratio=2"], "mask.ratio=2; expected a number > 0 and < 1"),
        (["data.source=nowhere"], "nowhere"),
        (["train.attention=xformers"], "train.attention='xformers' on cpu: it runs on CUDA only"),
        (
            ["deepspeed.zero_optimization.stagee=1"],
            "deepspeed.zero_optimization.stagee=1: unknown key; expected one of stage, ",
        ),
        (["deepspeed.flops_profiler=5"], "deepspeed: {'flops_profiler': 5} was refused"),
        (["output=tiny.yaml"], "tiny.yaml is a file; expected a folder to write to"),
        (["optim.epochs=0.001", "optim.warmup_epochs=0"], "optim.epochs=0.001 of 24 images make no step"),
        (["optim.batch_size=9"], "optim.batch_size=9; expected a multiple of 2 (2 ranks x"),
        (["log.wandb=true"], "log.wandb=true: wandb is not installed; pip install wandb"),
        (["train.precision=fp16"], "train.precision='fp16': this cpu does not compute it"),
        (
            ["--resume", "nowhere"],
            "--resume nowhere does not exist; expected auto, none, a run or a checkpoint",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(recipe, arguments, message):
    ranks = 2 if arguments == ["optim.batch_size=9"] else 1
    done = launch(recipe, "data.source=images", "output=bad", *arguments, ranks=ranks)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("launch.py: ")]
    assert len(told) == 1 and message in told[0]


def test_an_unknown_kernel_mode_is_refused(recipe):
    done = launch(recipe, "data.source=images", "output=bad", FASTMIM_KERNELS="foo")
    assert done.returncode == 2 and "launch.py: FASTMIM_KERNELS is 'foo'; expected one of" in done.stdout


@pytest.mark.parametrize("steps", [2, 11])
def test_a_trace_is_written_when_asked_for(recipe, steps):
    output = f"profile{steps}"
    train(recipe, "data.source=images", f"output={output}", f"train.max_steps={steps}", "train.profile=true")
    trace = json.loads((recipe.parent / output / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "fastmim::masked_pixel_loss" in names or any("masked_pixel_loss" in str(name) for name in names)
