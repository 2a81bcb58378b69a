"""Files from which an evaluation that was stopped goes on; they are removed when its result is there."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmim.errors import CheckpointError
from fastmim.evaluate.identity import difference
from fastmim.evaluate.job import Job

_SUFFIX = ".unfinished"
_SECONDS = 60.0
"""Of work that a file of rows holds, about: what is lost at most."""
_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class State:
    """The file of a part of an evaluation, which is the same on every rank.

    Args:
        job: the evaluation.
        name: of its part.
    """

    job: Job
    name: str

    def load(self) -> dict[str, Any] | None:
        """What was saved, on every rank; None where there is nothing."""
        job = self.job
        return job.ranks.share(
            job.ranks.run_on_first(lambda: load_state(job.folder, self.name, job.identity))
        )

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file, from the first rank."""
        if self.job.ranks.first:
            save_state(self.job.folder, self.name, self.job.identity, state)


def keep_rows(job: Job, name: str, compute: Callable[[int], Iterator[Tensor]]) -> Iterator[Tensor]:
    """Rows in their order: those that are kept, then the rest as they are computed, kept about once a minute.

    Args:
        job: the evaluation.
        name: of the rows in it.
        compute: yields the rows [b, ...] from a place on, the same on every rank.
    """
    count = number = 0
    while (found := State(job, f"{name}-{number}").load()) is not None:
        yield found["rows"]
        count += len(found["rows"])
        number += 1
    fresh, since = [], time.monotonic()
    for rows in compute(count):
        yield rows
        fresh.append(rows)
        if time.monotonic() - since >= _SECONDS:
            State(job, f"{name}-{number}").save({"rows": torch.cat(fresh)})
            number += 1
            fresh, since = [], time.monotonic()
    if fresh:
        State(job, f"{name}-{number}").save({"rows": torch.cat(fresh)})


def save_state(folder: Path, name: str, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the file of `name`; a crash leaves the old one or the new one.

    Args:
        folder: of the evaluation.
        name: of the part of the evaluation.
        identity: what makes the evaluation the same one; JSON.
        state: tensors, numbers, text, lists and mappings.
    """
    temporary = _path(folder, f".{name}")
    with temporary.open("wb") as file:
        torch.save({"identity": identity, "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(_path(folder, name))


def load_state(folder: Path, name: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What `save_state` wrote, with its tensors on the CPU; None where there is nothing.

    Raises:
        CheckpointError: it is of another evaluation, or cannot be read.
    """
    path = _path(folder, name)
    if not path.exists():
        return None
    try:
        found = _read(path)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to start anew") from None
    if differing := difference(found["identity"], identity):
        key, there, here = differing
        raise CheckpointError(
            f"{path} was left by an evaluation with {key}={there!r}, this one has {here!r}; expected another --out, "
            "or --force"
        )
    return found["state"]


def remove_states(folder: Path, but: dict[str, Any] | None = None) -> None:
    """Remove what every part left, and of the evaluation `but` only what is not whole."""
    for path in folder.glob(f"*{_SUFFIX}"):
        if but is None or path.name.startswith(".") or _identity_in(path) != but:
            path.unlink()


def _identity_in(path: Path) -> dict[str, Any] | None:
    try:
        return _read(path)["identity"]
    except _UNREADABLE:
        return None


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}{_SUFFIX}"
