"""Checkpoint directories: whole or absent, and every alteration noticed."""

import shutil

import pytest

from fastmim import manifest as manifests
from fastmim.errors import CheckpointError


def write(run, step, content=b"weights", keep=2, **more):
    folder = manifests.unfinished_path(run, step)
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "deepspeed" / "states.pt").write_bytes(content)
    (folder / "model.safetensors").write_bytes(content * 2)
    manifest = {"step": step, "files": manifests.describe(folder, manifests.list_files(folder)), **more}
    return manifests.publish(run, step, manifest, keep)


def test_a_published_checkpoint_verifies(tmp_path):
    path = write(tmp_path, 7)
    assert manifests.verify(path)["step"] == 7
    assert (tmp_path / "latest").read_text().strip() == path.name
    assert set(manifests.verify(path)["files"]) == {"deepspeed/states.pt", "model.safetensors"}


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100):
        write(tmp_path, step, keep=2)
    assert [path.name for path in manifests.list_checkpoints(tmp_path)] == [
        "step-000000100",
        "step-000000010",
    ]


def test_a_step_saved_twice_is_replaced(tmp_path):
    write(tmp_path, 5, b"old")
    path = write(tmp_path, 5, b"fresh")
    assert (path / "model.safetensors").read_bytes() == b"freshfresh"
    manifests.verify(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b"short"),
            "has 5 bytes; the manifest says 14",
        ),
        (lambda path: (path / "model.safetensors").write_bytes(b"WEIGHTSweights"), "another SHA-256"),
        (lambda path: (path / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "manifest.json").write_text("[]"), "is not a manifest of fastmim"),
    ],
)
def test_damage_is_named_and_the_older_one_is_used(tmp_path, damage, message, caplog):
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        manifests.verify(newest)
    assert manifests.newest_whole(tmp_path)[1]["step"] == 5


def test_unfinished_checkpoints_are_never_found_and_removed(tmp_path):
    write(tmp_path, 5)
    leftover = manifests.unfinished_path(tmp_path, 10)
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert manifests.newest_whole(tmp_path)[1]["step"] == 5
    manifests.remove_unfinished(tmp_path)
    assert not leftover.exists()


def test_resolve_takes_a_run_or_a_checkpoint(tmp_path):
    path = write(tmp_path, 5)
    assert manifests.resolve(tmp_path)[0] == manifests.resolve(path)[0] == path
    with pytest.raises(CheckpointError, match="does not exist; expected a run or a checkpoint"):
        manifests.resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        manifests.resolve(path / "deepspeed")


def test_durable_writes_leave_no_temporary(tmp_path):
    manifests.write_durably(tmp_path / "latest", "one")
    manifests.write_durably(tmp_path / "latest", "two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "two"


def test_damaged_checkpoints_alone_are_no_reason_to_begin_anew(tmp_path):
    assert manifests.find(tmp_path, "auto") is None
    for step in (5, 10):
        (write(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"damaged checkpoints only \(step-000000010, step-000000005; "):
        manifests.find(tmp_path, "auto")


def test_a_repeated_resume_from_elsewhere_goes_on_from_the_run_s_own(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    begun = write(there, 50)
    assert manifests.find(here, str(begun))[1]["step"] == 50
    state = {"begun_from": manifests.begun_from(str(begun))}
    write(here, 60, state=state)
    assert (
        manifests.find(here, str(there / "checkpoints" / ".." / "checkpoints" / begun.name))[1]["step"] == 60
    )
    shutil.rmtree(there)  # the source may be gone by then
    assert manifests.find(here, str(begun))[1]["step"] == 60
    write(there, 40)
    with pytest.raises(
        CheckpointError, match=r"there is at step 40, but .*here already holds step-000000060"
    ):
        manifests.find(here, str(there))


def test_a_damaged_checkpoint_of_a_later_step_takes_no_whole_one_s_place(tmp_path):
    write(tmp_path, 50)
    (write(tmp_path, 100) / "model.safetensors").unlink()
    for step in (60, 70):
        write(tmp_path, step, keep=2)
    names = [path.name[-3:] for path in manifests.list_checkpoints(tmp_path)]
    assert names == ["100", "070", "060"]
    write(tmp_path, 100, keep=2)  # overtakes it
    assert manifests.find(tmp_path, "auto")[1]["step"] == 100
    assert len(manifests.list_checkpoints(tmp_path)) == 2


def test_a_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", f"{path}/model.safetensors")

    write(tmp_path, 5)
    monkeypatch.setattr(manifests.shutil, "rmtree", refuse)
    assert write(tmp_path, 10, keep=1).name == "step-000000010"
    assert f"{tmp_path}/checkpoints/step-000000005 cannot be deleted (Permission denied)" in caplog.text


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests.os, "fsync", refuse)
    with pytest.raises(OSError, match=r"No space left on device: .*latest"):
        manifests.write_durably(tmp_path / "latest", "step-5")
