"""Attributes every moment of a step to one phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

OTHER = "other"
STEP = "step"
"""The range of a whole step in a trace."""


class Timeline:
    """Phases nest, and a moment belongs to the innermost one that is open, so that they sum to the step.

    On CUDA a moment is when the device reaches it on its default stream: what the host does meanwhile costs nothing
    while the device has work, and a wait of the device is told by the phase that it waits for. Nothing is
    synchronised before `seconds`. Elsewhere it is the clock.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device):
        self._tracing = False
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._open: list[str] = [OTHER]
        self._ranges: list[Any] = []
        self._steps: list[list[tuple[str, Any]]] = []

    def start_step(self) -> None:
        """End the step that is going on, if any, and start another one; no phase is open."""
        assert self._open == [OTHER], f"a step ends inside {self._open[1:]}"
        mark = OTHER, self._now()
        if self._steps:
            self._steps[-1].append(mark)
        self._steps.append([mark])
        if self._tracing:
            self._close_range()
            self._open_range(STEP)

    def trace(self, tracing: bool) -> None:
        """Begin or end, between steps, to make phases and steps ranges of `torch.profiler` too."""
        if self._tracing:
            self._close_range()
        self._tracing = tracing
        if tracing:
            self._open_range(STEP)

    def enter(self, phase: str) -> None:
        """Open a phase inside those that are open."""
        self._open.append(phase)
        self._mark()
        if self._tracing:
            self._open_range(phase)

    def leave(self) -> None:
        """Close the innermost phase."""
        if self._tracing:
            self._close_range()
        self._open.pop()
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`enter` and `leave`."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def seconds(self, first: int, last: int) -> list[dict[str, float]]:
        """Seconds of each phase in the steps [first, last), which have ended; waits for the device."""
        if self._stream is not None:
            self._stream.synchronize()
        return [_durations(marks) for marks in self._steps[first:last]]

    def _mark(self) -> None:
        if self._steps:
            self._steps[-1].append((self._open[-1], self._now()))

    def _open_range(self, name: str) -> None:
        self._ranges.append(torch.profiler.record_function(name).__enter__())

    def _close_range(self) -> None:
        self._ranges.pop().__exit__(None, None, None)

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


def _durations(marks: list[tuple[str, Any]]) -> dict[str, float]:
    spent: dict[str, float] = {}
    for (phase, start), (_, end) in pairwise(marks):
        seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        spent[phase] = spent.get(phase, 0.0) + seconds
    return spent
