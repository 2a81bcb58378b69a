"""launch.py as its users run it, in a process of its own: one run with its records, and turns of a run."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastmim import recipes
from fastmim.metrics import read_records

ROOT = Path(__file__).resolve().parents[1]

_QUIET = ["log.reconstruct_every_steps=null", "log.images=null", "checkpoint.every_minutes=null"]
"""Words that leave out pictures, and checkpoints but those that a caller asks for."""


def command(words: list[str], output: Path) -> list[str]:
    """Train by launch.py.

    Args:
        words: the recipe, then its `key=value` overrides.
        output: the run's folder.
    """
    return [sys.executable, "launch.py", "--config", *words, *_QUIET, f"output={output}"]


def step_of(line: str) -> int | None:
    """The step whose record a line of launch.py tells, if it does."""
    found = re.search(r" step (\d+)/", line)
    return int(found[1]) if found else None


def start(train: list[str]) -> subprocess.Popen:
    """A process of `command`, in a group of its own."""
    return subprocess.Popen(
        train, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def await_record(process: subprocess.Popen) -> tuple[int, float]:
    """The step of the next record, and the clock when it was told; exits with what the process said if it fails."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if step := step_of(line):
            return step, time.perf_counter()
        lines.append(line)
    sys.exit(f"launch.py ended with {process.wait()}\n{''.join(lines)}")


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started, wherever it is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def first_loss(words: list[str]) -> float:
    """The loss of launch.py's first step.

    Args:
        words: the recipe, then its `key=value` overrides.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        process = start([*command(words, run), "log.every_steps=1", "train.max_steps=2"])
        try:
            await_record(process)
        finally:
            end(process)
        return read_records(run / "metrics.jsonl")[0]["loss"]


def run_launch(words: list[str], steps: int, warmup: int) -> dict[str, float]:
    """Train by launch.py: `warmup` steps, then `steps` between two records, with a checkpoint among them.

    Args:
        words: the recipe, then its `key=value` overrides.
        steps: how many are looked at; even.
        warmup: how many come before.

    Returns:
        Seconds of one checkpoint, by the clock of who reads the lines; share of time that the loop waited for data;
        most bytes that the process held.
    """
    every = steps // 2
    # Records come at multiples of `every`: warm-up ends at the first that is late enough.
    first = -(-warmup // every) * every
    seen: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train = [*command(words, run), f"log.every_steps={every}", f"train.max_steps={first + steps + 1}"]
        process = start([*train, f"checkpoint.every_steps={first + every}"])
        try:
            while first + steps not in seen:
                step, clock = await_record(process)
                seen[step] = clock
        finally:
            end(process)
        records = {record["step"]: record for record in read_records(run / "metrics.jsonl")}
    batch = recipes.load(words[0], words[1:]).optim.batch_size
    window = [records[first + every], records[first + steps]]
    # By the records' own count, which leaves saving out.
    step_s = sum(batch / record["images_per_s"] for record in window) / len(window)
    elapsed = seen[first + steps] - seen[first]
    return {
        "checkpoint_s": max(0.0, elapsed - steps * step_s),
        "data_wait": sum(record["data_wait"] for record in window) / len(window),
        "memory": window[-1]["peak_memory_bytes"],
    }


class Launched:
    """A run of launch.py, without checkpoints, that stands still between its turns.

    Its process and all that it started are stopped by a signal as soon as a record is there, and go on where they were:
    they neither compute nor load ahead while another contender has its turn. A GPU still does what was queued in the
    millisecond before the signal, so turns there have to be long.

    Args:
        words: the recipe, then its `key=value` overrides.
        steps: of a turn, and of a record.
        warmup: steps at least before the first turn.
        turns: how many there will be.
    """

    def __init__(self, words: list[str], steps: int, warmup: int, turns: int):
        self._folder = tempfile.TemporaryDirectory()
        before = -(-warmup // steps)
        train = [*command(words, Path(self._folder.name) / "run"), f"log.every_steps={steps}"]
        # One step more, which nobody waits for: the last one saves.
        train += [f"train.max_steps={(before + turns) * steps + 1}", "checkpoint.every_steps=null"]
        self._process = start(train)
        self._ahead = 0.0
        try:
            for _ in range(before):
                await_record(self._process)
            self._stop()
        except BaseException:
            self.close()
            raise

    def turn(self) -> float:
        """Go on until the next record; seconds of a turn's steps."""
        started = time.perf_counter() - self._ahead
        os.killpg(self._process.pid, signal.SIGCONT)
        _, ended = await_record(self._process)
        self._stop()
        self._ahead = time.perf_counter() - ended
        return ended - started

    def close(self) -> None:
        """End the run where it is."""
        end(self._process)
        self._folder.cleanup()

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)
