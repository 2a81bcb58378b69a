"""Runs that are killed, stopped or continued: nothing is lost, and what differs is refused by name."""

import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim import manifest as manifests
from tests.launching import (
    TINY_YAML,
    command,
    environment,
    launch,
    losses,
    records,
    signal_group,
    start,
    train,
    wait_for,
    write_images,
)

STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_images(folder / "images", 24)
    (folder / "tiny.yaml").write_text(TINY_YAML)
    return folder / "tiny.yaml"


COMMON = ["data.source=images", f"train.max_steps={STEPS}", "checkpoint.every_steps=3", "train.ema_decay=0.9"]


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    train(recipe, *COMMON, "output=whole", "model.drop_path=0.2")
    return recipe.parent / "whole"


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    folder = manifests.checkpoint_path(run, STEPS)
    manifests.verify(folder)
    tensors = {}
    for name in ("model.safetensors", "ema.safetensors"):
        tensors |= {f"{name}:{key}": value for key, value in load_file(folder / name).items()}
    return tensors


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = final_weights(run), final_weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
    assert losses(records(run)) == losses(records(other))
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))


def test_killed_at_any_moment_it_ends_bitwise_the_same(recipe, uninterrupted):
    run = recipe.parent / "killed"
    arguments = [*COMMON, "output=killed", "model.drop_path=0.2"]
    chance = random.Random(0)

    def is_writing():
        return any((run / "checkpoints").glob(".unfinished-*/*"))

    moments = [
        lambda: is_writing(),
        lambda: len(records(run)) >= chance.randint(7, 11),
        lambda: is_writing() and manifests.list_checkpoints(run)[0].name >= "step-000000009",
    ]
    for moment in moments:
        process = start(recipe, *arguments)
        wait_for(moment, process)
        signal_group(process, signal.SIGKILL)
    done = launch(recipe, *arguments)
    assert done.returncode == 0, done.stdout
    assert "resuming after step" in done.stdout
    assert not list((run / "checkpoints").glob(".unfinished-*"))
    assert_same_run(run, uninterrupted)


def test_bf16_goes_on_from_its_masters(recipe):
    words = [
        "data.source=images",
        "train.precision=bf16",
        "train.ema_decay=0.9",
        "deepspeed.zero_optimization.stage=1",
    ]
    train(recipe, *words, "train.max_steps=12", "output=bf16_whole")
    train(recipe, *words, "train.max_steps=5", "output=bf16_parts")
    train(recipe, *words, "train.max_steps=12", "output=bf16_parts")
    whole, parts = (recipe.parent / name for name in ("bf16_whole", "bf16_parts"))
    assert losses(records(parts)) == losses(records(whole))
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (load_file(manifests.checkpoint_path(run, 12) / name) for run in (parts, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_ends_with_its_code(recipe, uninterrupted, number):
    output = f"stopped_{number.name}"
    run = recipe.parent / output
    arguments = [*COMMON, f"output={output}", "model.drop_path=0.2"]
    process = start(recipe, *arguments)
    wait_for(lambda: len(records(run)) >= 4, process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    stopped_at = records(run)[-1]["step"]
    assert stopped_at < STEPS
    assert manifests.newest_whole(run)[1]["step"] == stopped_at
    train(recipe, *arguments)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_file_ends_all_ranks_as_a_signal_does(recipe, ranks):
    arguments = ["data.source=images", f"output=asked{ranks}", "optim.epochs=100000"]
    run = recipe.parent / f"asked{ranks}"
    run.mkdir()
    (run / "stop").touch()  # was meant for another run
    process = start(recipe, *arguments, ranks=ranks)
    wait_for(lambda: len(records(run)) >= 2, process)
    (run / "stop").touch()
    code = process.wait(60)
    assert code == 128 + signal.SIGTERM if ranks == 1 else code
    assert not (run / "stop").exists()
    stopped_at = records(run)[-1]["step"]
    assert manifests.newest_whole(run)[1]["step"] == stopped_at


def test_a_run_that_began_elsewhere_goes_on_when_its_command_is_repeated(recipe):
    arguments = ["data.source=images", "checkpoint.every_steps=2"]
    train(recipe, *arguments, "output=first", "train.max_steps=2")
    first = str(manifests.checkpoint_path(recipe.parent / "first", 2))
    command = [*arguments, "output=second", "--resume", first]
    train(recipe, *command, "train.max_steps=4")
    train(recipe, *arguments, "output=second", "train.max_steps=5")  # with --resume auto between
    done = launch(recipe, *command, "train.max_steps=6")
    assert done.returncode == 0, done.stdout
    assert "resuming after step 5" in done.stdout
    assert [record["step"] for record in records(recipe.parent / "second")] == [3, 4, 5, 6]
    # Its own folder is no other place to begin from.
    train(recipe, *arguments, "output=second", "train.max_steps=7", "--resume", "second")
    assert train(recipe, *command, "train.max_steps=8")[-1]["step"] == 8


def test_two_zero_ranks_stop_together_and_go_on(recipe):
    arguments = [*COMMON, "deepspeed.zero_optimization.stage=2"]
    expected = losses(train(recipe, *arguments, "output=pair_whole", ranks=2))
    run = recipe.parent / "pair"
    process = start(recipe, *arguments, "output=pair", ranks=2)
    wait_for(lambda: len(records(run)) >= 4, process)
    signal_group(process, signal.SIGTERM)
    stopped_at = manifests.newest_whole(run)[1]["step"]
    assert 4 <= stopped_at == records(run)[-1]["step"] < STEPS
    assert losses(train(recipe, *arguments, "output=pair", ranks=2)) == expected
    refused = launch(recipe, *arguments, "output=pair")
    assert refused.returncode == 2
    assert "world size 1 (the checkpoint has 2)" in refused.stdout


def test_checkpoints_come_by_the_clock_too_and_the_last_are_kept(recipe):
    arguments = ["output=clock", "checkpoint.every_minutes=1.0e-9", "checkpoint.keep=3", "train.max_steps=5"]
    train(recipe, "data.source=images", *arguments, ranks=2)
    kept = manifests.list_checkpoints(recipe.parent / "clock")
    assert [path.name for path in kept] == [f"step-{step:09d}" for step in (5, 4, 3)]


def test_a_finished_run_is_told_to_be_finished(recipe, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = launch(recipe, *COMMON, "output=whole", "model.drop_path=0.2")
    assert done.returncode == 0
    assert f"finished {STEPS} steps" in done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_by_name(recipe):
    arguments = ["data.source=images", "output=damaged", "checkpoint.every_steps=2"]
    train(recipe, *arguments, "train.max_steps=4")
    newest = manifests.checkpoint_path(recipe.parent / "damaged", 4)
    (newest / "model.safetensors").write_bytes(b"gone")
    done = launch(recipe, *arguments, "train.max_steps=5")
    assert done.returncode == 0, done.stdout
    assert "passing over a damaged checkpoint" in done.stdout and "model.safetensors" in done.stdout
    assert "resuming after step 2" in done.stdout


REFUSED = [
    (["train.seed=1"], "train.seed=1 (the checkpoint has 0)"),
    (["optim.blr=0.5"], "optim.blr=0.5 (the checkpoint has 0.01)"),
    (["mask.ratio=0.5"], "mask.ratio=0.5 (the checkpoint has 0.75)"),
    (["model.depth=1"], "model.depth=1 (the checkpoint has 2)"),
    (["data.source=others"], "data.source='others' holds other images"),
    (["deepspeed.zero_optimization.stage=1"], "zero stage 1 (the checkpoint has 0)"),
    (["--resume", "none"], "already holds checkpoints; expected another output, or --resume auto"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[change[-1] for change, _ in REFUSED])
def test_another_run_is_refused_by_name(recipe, uninterrupted, change, message):
    write_images(recipe.parent / "others", 24, seed=1)
    done = launch(recipe, *COMMON, "output=whole", "model.drop_path=0.2", *change)
    assert done.returncode == 2, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("launch.py: ")]
    assert len(told) == 1 and message in told[0]


def test_a_run_is_not_rewound_in_its_own_folder(recipe):
    arguments = ["data.source=images", "output=rewound", "checkpoint.every_steps=2"]
    train(recipe, *arguments, "train.max_steps=4")
    first = manifests.checkpoint_path(recipe.parent / "rewound", 2)
    done = launch(recipe, *arguments, "train.max_steps=6", "--resume", str(first))
    assert done.returncode == 2
    assert "is at step 2, but rewound already holds step-000000004; expected another output" in done.stdout
    assert len(records(recipe.parent / "rewound")) == 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_cannot_be_written_is_told_in_one_line(recipe, ranks):
    """Files may grow to 64 KiB only, which a checkpoint does not keep to: as a full disk, but for the error's name."""
    words = ["data.source=images", f"output=full{ranks}", "checkpoint.every_steps=2", "train.max_steps=4"]
    train(recipe, *words[:3], "train.max_steps=2", ranks=ranks)
    limited = ["bash", "-c", 'ulimit -f 64; exec "$0" "$@"', *command(recipe, *words, ranks=ranks)]
    done = subprocess.run(
        limited,
        env=environment(),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    # Of two ranks the other one may end first, by the loss of its peer.
    assert done.returncode == 3 or (ranks == 2 and done.returncode)
    told = [line for line in done.stderr.splitlines() if line.startswith("launch.py: ")]
    assert told and all(
        f"the checkpoint of step 4 cannot be written below full{ranks} (" in line for line in told
    )
    assert ranks > 1 or "Traceback" not in done.stderr
    assert manifests.newest_whole(recipe.parent / f"full{ranks}")[1]["step"] == 2
    assert train(recipe, *words, ranks=ranks)[-1]["step"] == 4


def test_two_runs_do_not_share_a_folder(recipe):
    run = recipe.parent / "shared"
    process = start(recipe, "data.source=images", "output=shared", "optim.epochs=1000")
    wait_for(lambda: len(records(run)) >= 2, process)
    done = launch(recipe, "data.source=images", "output=shared", "optim.epochs=1000")
    signal_group(process, signal.SIGTERM)
    assert done.returncode == 2, done.stdout
    assert f"shared is being written by process {process.pid} on " in done.stdout


def test_another_precision_is_another_run(recipe, uninterrupted):
    done = launch(recipe, *COMMON, "output=whole", "model.drop_path=0.2", "train.precision=bf16")
    assert done.returncode == 2
    assert "precision bf16 (the checkpoint has fp32)" in done.stdout


def test_an_array_with_other_pixels_is_another_set(recipe):
    import numpy as np

    path = recipe.parent / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    train(recipe, "data.source=pixels.npy", "output=array", "train.max_steps=2")
    np.save(path, np.zeros((16, 32, 32, 3), dtype=np.uint8))
    done = launch(recipe, "data.source=pixels.npy", "output=array", "train.max_steps=4")
    assert done.returncode == 2
    assert "data.source='pixels.npy' holds other images" in done.stdout


def test_a_moved_set_and_other_cadences_are_the_same_run(recipe, uninterrupted):
    (recipe.parent / "elsewhere").mkdir()
    (recipe.parent / "images").rename(recipe.parent / "elsewhere" / "images")
    try:
        arguments = [
            "data.source=elsewhere/images",
            "output=moved",
            "train.max_steps=26",
            "log.every_steps=2",
        ]
        done = launch(
            recipe,
            *COMMON,
            "model.drop_path=0.2",
            *arguments,
            "--resume",
            str(uninterrupted),
            "data.threads=2",
        )
    finally:
        (recipe.parent / "elsewhere" / "images").rename(recipe.parent / "images")
    assert done.returncode == 0, done.stdout
    assert f"resuming after step {STEPS}" in done.stdout
    assert records(recipe.parent / "moved")[-1]["step"] == 26
