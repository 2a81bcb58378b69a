"""A profile as text."""

import textwrap
from collections.abc import Iterator, Sequence

from fastmim.profiling.figures import Figures

# The phase in whose forward pass a module's products are; other modules are phases of their own name.
PHASE_OF_MODULE = {"patch_embed": "gather", "head": "loss", "second_head": "loss", "contrast": "loss"}
_WIDTH = 100


def describe(figures: Figures, advice: Sequence[str]) -> str:
    """Tables of time, FLOPs and memory, and the advice."""
    told = [textwrap.fill(f"- {sentence}", _WIDTH, subsequent_indent="  ") for sentence in advice]
    time = _table(("phase", "ms", "of step", "GFLOP", "MFU"), _phases(figures))
    work = _table(("module", "forward", "backward", "GFLOP"), _modules(figures))
    peak = f"peak {figures.peak_flops / 1e9:,.0f} GFLOP/s, measured by a large matrix product in {figures.precision}"
    memory = _table(("memory", "MiB"), _memory(figures))
    return "\n".join(
        [
            *_headline(figures),
            "",
            *time,
            "",
            *work,
            peak,
            "",
            *memory,
            "",
            *(told or ["nothing to advise: no part stands out"]),
        ]
    )


def _headline(figures: Figures) -> Iterator[str]:
    accumulated = f" in {figures.accumulation} parts" if figures.accumulation > 1 else ""
    ranks = f", rank 0 of {figures.ranks}" if figures.ranks > 1 else ""
    yield (
        f"{figures.recipe} on {figures.device}, {figures.precision}, ZeRO {figures.zero_stage}{ranks}: "
        f"{figures.steps} steps of {figures.images} images{accumulated}"
    )
    yield (
        f"{1000 * figures.step:.1f} ms a step ({1000 * figures.fastest:.1f} to {1000 * figures.slowest:.1f}), "
        f"{figures.images * figures.ranks / figures.step:,.0f} images/s"
    )


def _phases(figures: Figures) -> Iterator[tuple[str, ...]]:
    work = dict.fromkeys(figures.seconds, 0)
    for module, flops in figures.flops.items():
        phase = PHASE_OF_MODULE.get(module, module)
        work[phase] = work.get(phase, 0) + figures.images * flops.forward
        work["backward"] += figures.images * flops.backward
    for phase, seconds in figures.seconds.items():
        yield _phase(figures, phase, seconds, work[phase])
    yield _phase(figures, "step", figures.step, figures.step_flops)


def _phase(figures: Figures, name: str, seconds: float, flops: int) -> tuple[str, ...]:
    told = (f"{flops / 1e9:.2f}", f"{figures.mfu(flops, seconds):.1%}") if flops else ("", "")
    return (name, f"{1000 * seconds:.2f}", f"{seconds / figures.step:.1%}", *told)


def _modules(figures: Figures) -> Iterator[tuple[str, ...]]:
    for name, flops in figures.flops.items():
        forward, backward = (figures.images * part / 1e9 for part in flops)
        yield name, f"{forward:.2f}", f"{backward:.2f}", f"{forward + backward:.2f}"


def _memory(figures: Figures) -> Iterator[tuple[str, ...]]:
    for kind, held in figures.memory.items():
        yield kind, f"{held / 2**20:,.1f}"
    where = "allocated on the device" if figures.on_cuda else "resident in the process"
    yield f"peak {where}", f"{figures.peak_memory / 2**20:,.1f}"


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]
