"""Contenders in processes of their own: none holds another's memory, and an allocator's habits are its own."""

import contextlib
import importlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import PeakMemory

Build = Callable[..., Callable[[], Tensor]]
"""Of a module: builds what makes one step and returns its loss."""


class Worker:
    """A process that makes a step whenever it is asked to; idle between.

    A step that a contender compiled is run as it is, or with `compiled=False` as if it were not.

    Args:
        build: a module's function, called in the process.
        args: of `build`.
        imports: modules that `build` imports; what they hold is not counted as memory, nor what compilers hold.

    Raises:
        RuntimeError: from every method, what went wrong in the process.
    """

    def __init__(self, build: Build, *args: Any, imports: tuple[str, ...] = ()):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, args, imports), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def step(self, compiled: bool = False) -> float:
        """Make a step and return its loss; the device is done when this returns."""
        return self.measure_step(_make, compiled)

    def measure_step(self, measure: Callable[[Callable[[], Tensor]], Any], compiled: bool = False) -> Any:
        """What a module's function, or a `functools.partial` of one, returns that is given the step in the process."""
        return self._ask(("compiled" if compiled else "eager", measure))

    def peak_memory(self) -> int:
        """Bytes held at most since the process began to build, or `forget_peak`; its imports not counted."""
        return self._ask("memory")

    def forget_peak(self) -> None:
        """Let the peak begin anew on a GPU; a CPU's allocator keeps what it took."""
        self._ask("forget")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join()

    def _ask(self, what: str | tuple[str, Callable]) -> Any:
        self._pipe.send(what)
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contender's process ended with {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise RuntimeError(f"{type(answer).__name__}: {answer}") from answer
        return answer


def _serve(pipe: Connection, build: Build, args: tuple, imports: tuple[str, ...]) -> None:
    for name in ("torch._inductor.compile_fx", *imports):
        importlib.import_module(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = PeakMemory(device)
    step = None
    while (wanted := pipe.recv()) is not None:
        try:
            if step is None:
                step = build(*args)
            if wanted == "memory":
                pipe.send(memory.bytes())
                continue
            if wanted == "forget":
                pipe.send(torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None)
                continue
            mode, measure = wanted
            with torch.compiler.set_stance("default" if mode == "compiled" else "force_eager"):
                pipe.send(measure(step))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _make(step: Callable[[], Tensor]) -> float:
    return float(step())
