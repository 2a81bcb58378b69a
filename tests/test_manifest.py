"""Checkpoint directories: whole or absent, and every alteration noticed."""

import pytest

from fastmim import manifest as manifests
from fastmim.errors import CheckpointError


def write(run, step, content=b"weights", keep=2):
    folder = manifests.unfinished_path(run, step)
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "deepspeed" / "states.pt").write_bytes(content)
    (folder / "model.safetensors").write_bytes(content * 2)
    manifest = {"step": step, "files": manifests.describe(folder, manifests.list_files(folder))}
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
