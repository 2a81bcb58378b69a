"""Checkpoint directories that are whole or absent: written aside, listed with their hashes, then renamed.

RUN/checkpoints/step-000001200/   manifest.json, model.safetensors, deepspeed/...
RUN/latest                        the name of the one written last, for people and scripts
RUN/.lock                         held while a run writes here
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import IO, Any

from fastmim.errors import CheckpointError

logger = logging.getLogger("fastmim")

MANIFEST = "manifest.json"
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
_UNFINISHED = ".unfinished-"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run / "checkpoints" / f"step-{step:09d}"


def unfinished_path(run: Path, step: int) -> Path:
    """Where it is written before it is whole."""
    return run / "checkpoints" / f"{_UNFINISHED}step-{step:09d}"


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, as sorted relative paths; the manifest itself is left out."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST)


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, flushed to the disk on the way."""
    described = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            described[name] = {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return described


def publish(run: Path, step: int, manifest: dict[str, Any], keep: int) -> Path:
    """Make a written checkpoint the newest: manifest, flush, rename, pointer; then drop older ones but `keep` - 1.

    One of a later step stays and does not count: it was damaged, or the run would have gone on from there.
    """
    written, path = unfinished_path(run, step), checkpoint_path(run, step)
    write_durably(written / MANIFEST, json.dumps(manifest, indent=1))
    for folder in [written, *(entry for entry in written.rglob("*") if entry.is_dir())]:
        _flush_folder(folder)
    if path.exists():
        shutil.rmtree(path)
    written.rename(path)
    _flush_folder(path.parent)
    write_durably(run / "latest", path.name + "\n")
    for old in [other for other in list_checkpoints(run) if other.name < path.name][keep - 1 :]:
        _delete(old)
    return path


def _delete(folder: Path) -> None:
    """Delete what is not needed; if that fails, the run goes on."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be deleted (%s)", folder, error.strerror or error)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old one or the new one.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk names none
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(run: Path) -> IO[str]:
    """Hold a run's folder for this process; the lock ends with it, or when the file is closed.

    Raises:
        CheckpointError: another process holds it.
    """
    if run.exists() and not run.is_dir():
        raise CheckpointError(
            f"{run} is a file; expected a folder to write to, or a path where one can be made"
        )
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise CheckpointError(
            f"{run} is being written by {holder or 'another run'}; expected another output"
        ) from None
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): take care that no other run writes there", run, error.strerror
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def list_checkpoints(run: Path) -> list[Path]:
    """The published checkpoints of a run, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def remove_unfinished(run: Path) -> None:
    """Delete what a killed run was writing."""
    for leftover in (run / "checkpoints").glob(f"{_UNFINISHED}*"):
        logger.info("removing %s, a checkpoint that was never finished", leftover.name)
        _delete(leftover)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or not {"step", "files"} <= manifest.keys():
            raise CheckpointError(f"{path} is not a manifest of fastmim")
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} holds no {MANIFEST}; expected a checkpoint directory") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file was found with the size and SHA-256 that it names.

    Raises:
        CheckpointError: the first file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    for name, wanted in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint}: {name} is missing; the manifest lists it")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(
                f"{checkpoint}: {name} has {size} bytes; the manifest says {wanted['bytes']}"
            )
        if describe(checkpoint, [name])[name]["sha256"] != wanted["sha256"]:
            raise CheckpointError(
                f"{checkpoint}: {name} has another SHA-256 than the manifest; it was altered"
            )
    return manifest


def newest_whole(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that verifies, and its manifest; damaged ones are named in the log."""
    for checkpoint in list_checkpoints(run):
        try:
            return checkpoint, verify(checkpoint)
        except CheckpointError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    return None


def resolve(path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint from its own path or from its run's.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if (path / MANIFEST).exists():
        return path, verify(path)
    found = newest_whole(path)
    if found is None:
        what = "does not exist" if not path.exists() else "holds no whole checkpoint"
        raise CheckpointError(f"{path} {what}; expected a run or a checkpoint directory of fastmim")
    return found


def begun_from(resume: str) -> str | None:
    """What a run's checkpoints remember of `--resume PATH`; None of `auto` and `none`."""
    return None if resume in ("auto", "none") else os.path.realpath(resume)


def find(run: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `--resume` asks for, and its manifest; None to start anew.

    A run that has gone on from PATH goes on from its own newest checkpoint: schedulers repeat a command.

    Args:
        run: output folder.
        resume: auto, none, or the path of a run or checkpoint.

    Raises:
        CheckpointError: PATH holds none, `none` would mix two runs in one folder, or `auto` finds damaged ones only.
    """
    if resume not in ("auto", "none"):
        own = newest_whole(run)
        if own is not None and own[1].get("state", {}).get("begun_from") == begun_from(resume):
            logger.info("%s has begun from %s and goes on from its own newest checkpoint", run, resume)
            return own
        if not Path(resume).exists():
            raise CheckpointError(
                f"--resume {resume} does not exist; expected auto, none, a run or a checkpoint directory"
            )
        checkpoint, manifest = resolve(Path(resume))
        later = [
            path.name
            for path in list_checkpoints(run)
            if path.name > checkpoint_path(run, manifest["step"]).name
        ]
        if later:
            raise CheckpointError(
                f"--resume {resume} is at step {manifest['step']}, but {run} already holds {later[0]}; "
                "expected another output"
            )
        return checkpoint, manifest
    if resume == "auto":
        found = newest_whole(run)
        if found is None and (damaged := list_checkpoints(run)):
            names = ", ".join(path.name for path in damaged)
            raise CheckpointError(
                f"{run} holds damaged checkpoints only ({names}; the log tells why), which a run that began anew would "
                "overwrite; repair or remove them, or give another output"
            )
        return found
    if list_checkpoints(run):
        raise CheckpointError(
            f"--resume none: {run} already holds checkpoints; expected another output, or --resume auto"
        )
    return None
