"""Puts phases around what a trainer calls, and takes them away again."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from fastmim.profiling.timeline import Timeline
from fastmim.targets import Head

# What torch.distributed's functions, and through them DeepSpeed's, call on a group of ranks.
_COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


@contextmanager
def instrumented(trainer: Any, timeline: Timeline, on_step: Callable[[], None]) -> Iterator[None]:
    """Time a trainer's phases while this is entered; without it a run has no hook and no range.

    Phases: data (the wait for the loader), gather (masks, and patches until they enter the encoder's blocks),
    encoder, every other part of the objective by its name, loss (heads, and what the objective compares itself),
    backward, optimiser, communication.

    Args:
        trainer: a `fastmim.trainer.Trainer`.
        timeline: of this rank.
        on_step: called between steps: when the trainer asks for a step's first images.
    """
    engine, objective = trainer.engine, trainer.objective
    loader = trainer.loader
    accumulation = trainer.config.optim.accumulation
    with ExitStack() as undo:
        trainer.loader = _TimedLoader(loader, timeline, accumulation, on_step)
        undo.callback(setattr, trainer, "loader", loader)
        for owner, name, phase in (
            (objective, "sample_mask", "gather"),
            (engine, "backward", "backward"),
            (engine, "step", "optimiser"),
        ):
            setattr(owner, name, _timed(getattr(owner, name), timeline, phase))
            undo.callback(delattr, owner, name)
        for module, phase in _phases_of(objective):
            # First of all hooks: ZeRO-3 collects a module's weights in one of its own.
            before = module.register_forward_pre_hook(
                lambda *_, phase=phase: timeline.enter(phase), prepend=True
            )
            after = module.register_forward_hook(lambda *_: timeline.leave(), always_call=True)
            undo.callback(before.remove)
            undo.callback(after.remove)
        if trainer.ranks.world_size > 1:
            undo.enter_context(_timed_collectives(timeline))
        yield


def _phases_of(objective: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose forward pass is a phase, or a part of one."""
    yield objective, "loss"
    child: Any
    for name, child in objective.named_children():
        if name == "encoder" and hasattr(child, "blocks"):
            # Before its blocks run, an encoder gathers and embeds.
            yield child, "gather"
            yield child.blocks, "encoder"
            yield child.norm, "encoder"
        else:
            yield child, "loss" if isinstance(child, Head) else name
        if isinstance(child, Head):
            for key, network in child.frozen().items():
                yield network.module, key.rpartition(".")[2]


class _TimedLoader:
    """A loader whose waits are a phase, and that tells when a step begins."""

    def __init__(self, loader: Any, timeline: Timeline, accumulation: int, on_step: Callable[[], None]):
        self._loader, self._timeline = loader, timeline
        self._accumulation, self._on_step = accumulation, on_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            self._on_step()
            for _ in range(self._accumulation):
                with self._timeline.phase("data"):
                    batch = next(batches)
                yield batch


def _timed(function: Callable, timeline: Timeline, phase: str) -> Callable:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with timeline.phase(phase):
            return function(*arguments, **options)

    return call


@contextmanager
def _timed_collectives(timeline: Timeline) -> Iterator[None]:
    """Time what starts a collective and what waits for one, on every group of ranks."""
    with ExitStack() as undo:
        calls = [(dist.ProcessGroup, name) for name in _COLLECTIVES]
        for owner, name in [*calls, (dist.Work, "wait")]:
            if name in vars(owner):  # not every version of torch has all
                # What `getattr` gives would not be bound to an instance again.
                undo.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, _timed(getattr(owner, name), timeline, "communication"))
        yield
