"""A trace of a few steps."""

from pathlib import Path

import torch


def start_profiler(run: Path, steps: int) -> torch.profiler.profile:
    """Trace three steps after seven, or as much of that as a run of `steps` has, into `run`/trace.json.

    Call its `step()` after each step and `stop()` at the end.
    """
    active = min(3, steps)
    warmup = min(2, steps - active)
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=min(5, steps - active - warmup), warmup=warmup, active=active, repeat=1
        ),
        record_shapes=True,
        on_trace_ready=lambda done: done.export_chrome_trace(str(run / "trace.json")),
    )
    profiler.start()
    return profiler
