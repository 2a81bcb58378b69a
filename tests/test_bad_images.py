"""launch.py on images that cannot be decoded: named and replaced; of too many, the run is saved and ends."""

import pytest

from tests.launching import TINY_YAML, launch, start, wait_for, write_images


def launch_on(folder):
    """launch.py on `folder`/images, of which a fifth may be bad."""
    (folder / "tiny.yaml").write_text(TINY_YAML)
    words = ["data.source=images", "output=run", "train.max_steps=8", "data.max_bad_fraction=0.2"]
    return launch(folder / "tiny.yaml", *words)


def corrupted(jpeg):
    """A header that reads well and a body that does not: only decoding finds out."""
    return jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xda\x00\x02" + b"\x00" * 200 + b"\xff\xd9"


def test_bad_images_are_named_and_the_run_goes_on(tmp_path):
    folder = write_images(tmp_path / "images", 16, suffix=".jpg")
    whole = (folder / "0003.jpg").read_bytes()
    (folder / "empty.jpg").touch()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.jpg").write_bytes(corrupted(whole))
    done = launch_on(tmp_path)
    assert done.returncode == 0, done.stdout
    for name in ("empty.jpg", "truncated.jpg", "corrupt.jpg"):
        assert name in done.stdout


def test_too_many_bad_images_end_the_run_with_their_names(tmp_path):
    folder = write_images(tmp_path / "images", 16, suffix=".jpg")
    for path in sorted(folder.iterdir())[:8]:
        path.write_bytes(corrupted(path.read_bytes()))
    done = launch_on(tmp_path)
    assert done.returncode == 3, done.stdout
    told = done.stdout[done.stdout.index("launch.py: ") :]
    assert "4 of 16 images cannot be decoded; expected at most 3 (data.max_bad_fraction=0.2)" in told
    assert told.count(".jpg: ") == 4 and "Traceback" not in done.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_storage_fails_the_run_is_saved_and_goes_on_later(tmp_path, ranks):
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    folder, away = write_images(tmp_path / "images", 64, suffix=".png"), tmp_path / "away"
    arguments = ["data.source=images", "output=run", "log.every_steps=1", "optim.epochs=2000"]
    log = tmp_path / "background.log"
    process = start(tmp_path / "tiny.yaml", *arguments, ranks=ranks)
    wait_for(lambda: " step 3/" in log.read_text(), process)
    folder.rename(away)
    process.wait(300)
    told = log.read_text()
    assert process.returncode == 3, told
    messages = [line for line in told.splitlines() if line.startswith("launch.py: ")]
    assert len(messages) == 1 and "images cannot be decoded; expected at most 1" in messages[0], told
    assert "Traceback" not in told
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert step >= 3
    away.rename(folder)
    done = launch(tmp_path / "tiny.yaml", *arguments, f"train.max_steps={step + 4}", ranks=ranks)
    assert done.returncode == 0 and f"resuming after step {step} of " in done.stdout, done.stdout


def test_bad_images_are_counted_over_all_ranks(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    folder = write_images(tmp_path / "images", 24, suffix=".png")
    for i in range(4):  # two for each rank, most likely; either alone is within the limit of three
        whole = (folder / f"{i:04d}.png").read_bytes()
        (folder / f"{i:04d}.png").write_bytes(whole[:60] + bytes(len(whole) - 80) + whole[-20:])
    arguments = ["data.source=images", "output=run", "data.max_bad_fraction=0.125", "train.max_steps=12"]
    done = launch(tmp_path / "tiny.yaml", *arguments, ranks=2)
    assert done.returncode == 3, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("launch.py: ")]
    assert "4 of 24 images cannot be decoded; expected at most 3" in told[0]
