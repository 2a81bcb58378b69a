"""The ranks of a run and the few things they agree on, over a host-side (gloo) group."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmim.errors import ConfigError, FastmimError

T = TypeVar("T")


def local_world_size() -> int:
    """Ranks on this node: torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def cores_per_rank() -> int:
    """CPU cores for each rank of this node, of those that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


_PATIENCE = timedelta(days=1)


class Ranks:
    """Who this process is among the processes of the run.

    Attributes:
        rank, world_size: over all nodes.
        local_rank, local_world_size: on this node.
        device: where this rank computes.

    Raises:
        ConfigError: more ranks on this node than it has GPUs.
    """

    def __init__(self):
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, alone)
        self.rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_world_size = local_world_size()
        on_cuda = torch.cuda.is_available()
        if on_cuda and self.local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"{self.local_world_size} ranks on a node with {torch.cuda.device_count()} GPUs; expected one rank per"
                " GPU, or CUDA_VISIBLE_DEVICES= for ranks that compute on the CPU"
            )
        self.device = torch.device("cuda", self.local_rank) if on_cuda else torch.device("cpu")
        self._host_group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    def open_host_group(self) -> None:
        """Make the gloo group; every rank calls it, once, after the default group exists.

        Ranks wait in it for what one does alone, such as a first scan of millions of files: longer than half an hour,
        which gloo would wait.
        """
        if self.world_size > 1:
            self._host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self._host_group is not None:
            dist.barrier(self._host_group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self._host_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def run_on_first(self, act: Callable[[], T], each_node: bool = False) -> T | None:
        """Run `act` on rank 0 (or on each node's first rank) while the others wait.

        An error is raised on every rank, so that all end alike and none waits for ever; one of the system, such
        as a full disk, becomes a FastmimError that names the file.

        Returns:
            What `act` returned, on the ranks that ran it; None elsewhere.
        """
        result, problem, unexpected = None, None, None
        acts = self.local_rank == 0 if each_node else self.first
        if acts:
            try:
                result = act()
            except FastmimError as error:
                problem = error
            except OSError as error:
                problem = FastmimError(f"{error.filename or 'a file'}: {error.strerror or error}")
            except Exception as error:
                problem, unexpected = FastmimError(f"rank {self.rank} failed: {error!r}"), error
        problems = [error for error in self.gather(problem) if error is not None]
        if unexpected is not None:
            raise unexpected
        if problems:
            problems[0].everywhere = True
            raise problems[0]
        return result

    def start_flags(self, *flags: bool) -> "Flags":
        """Begin an OR of host-side flags over all ranks; it overlaps with the step that follows."""
        values = torch.tensor(flags, dtype=torch.uint8)
        work = None
        if self._host_group is not None:
            work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)
        return Flags(values, work)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a small tensor on the training device."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values


class Flags:
    """The pending result of `Ranks.start_flags`."""

    def __init__(self, values: Tensor, work: Any):
        self._values, self._work = values, work

    def wait(self) -> list[bool]:
        """The agreed flags."""
        if self._work is not None:
            self._work.wait()
        return [bool(value) for value in self._values]
