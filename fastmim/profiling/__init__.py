"""Where a step's time, work and memory go: a trace beside a run, and the `fastmim profile` command."""

from fastmim.profiling.trace import start_profiler

__all__ = ["start_profiler"]
