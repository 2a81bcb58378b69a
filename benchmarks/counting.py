"""Bytes that an operation reads and writes, counted: interpreted Triton kernels by lane, PyTorch by ATen call."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from fastmim.kernels import _dispatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

SECTOR = 32
"""Bytes that a GPU's memory moves at least."""

ALLOCATIONS = {
    f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
}
OVERWRITES = {f"aten::{name}" for name in ("copy_", "fill_", "zero_")}
FILLS = {
    f"aten::{name}"
    for name in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like")
}
GATHERS = {f"aten::{name}" for name in ("gather", "index_select", "index", "embedding")}
SCATTERS = {
    f"aten::{name}"
    for name in ("scatter_", "scatter_add_", "index_put_", "_index_put_impl_", "index_add_", "index_copy_")
}


def _distinct(values: np.ndarray) -> np.ndarray:
    # In place of `np.unique`, which hashes integers and takes five times as long.
    values = np.sort(values)
    first = np.ones(values.size, dtype=bool)
    first[1:] = values[1:] != values[:-1]
    return values[first]


@dataclass
class Traffic:
    """What one pass moves."""

    bytes: int = 0
    """Distinct bytes of each program, read plus written; what two programs touch counts twice."""
    sector_bytes: int = 0
    """The same in whole 32-byte sectors: more than `bytes` where rows do not fill them."""
    distinct_bytes: int = 0
    """Distinct bytes of each launch: what reaches memory if the cache keeps what programs share."""
    launches: int = 0
    """Triton launches, and ATen calls other than views and allocations."""

    def add_call(self, moved: int) -> None:
        """Add one ATen call."""
        self.bytes += moved
        self.sector_bytes += moved
        self.distinct_bytes += moved
        self.launches += 1


class _LaunchCounter:
    """Collects the addresses of one launch, program by program."""

    def __init__(self, traffic: Traffic):
        self.traffic = traffic
        self.program = None
        self.current = {}
        self.whole = {}

    def access(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Note the lanes that a load or a store touches."""
        program = tuple(interpreter.interpreter_builder.grid_idx)
        if program != self.program:
            self.end_program()
            self.program = program
        lanes = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))
        lanes = lanes[np.broadcast_to(mask, lanes.shape).astype(bool)]
        self.current.setdefault((kind, size), []).append(lanes.ravel().astype(np.int64))

    def end_program(self) -> None:
        """Add the program's distinct bytes and sectors, and keep its addresses for the launch's."""
        for (kind, size), parts in self.current.items():
            distinct = _distinct(np.concatenate(parts))
            self.traffic.bytes += distinct.size * size
            self.traffic.sector_bytes += _distinct(distinct // SECTOR).size * SECTOR
            self.whole.setdefault((kind, size), []).append(distinct)
        self.current = {}

    def end_launch(self) -> None:
        """Add the launch's distinct bytes."""
        self.end_program()
        for (_, size), parts in self.whole.items():
            self.traffic.distinct_bytes += _distinct(np.concatenate(parts)).size * size
        self.traffic.launches += 1


@contextlib.contextmanager
def _instrumented_interpreter(traffic: Traffic) -> Iterator[None]:
    """Run fastmim's kernels in Triton's interpreter and count their loads, stores and atomics."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    swap, update = builder.create_atomic_cas, builder.create_atomic_rmw
    launch = _dispatch.launch
    counters = []

    def note(kinds, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for kind in kinds:
            counters[-1].access(kind, pointers.data, mask, size)

    def counted_load(self, pointers, mask, *rest):
        note(("load",), pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        note(("store",), pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def counted_swap(self, pointers, *rest):
        note(("load", "store"), pointers, np.ones_like(pointers.data, dtype=bool))
        return swap(self, pointers, *rest)

    def counted_update(self, operation, pointers, value, mask, *rest):
        note(("load", "store"), pointers, mask.data)
        return update(self, operation, pointers, value, mask, *rest)

    def counted_launch(*args, **kwargs):
        counters.append(_LaunchCounter(traffic))
        # The interpreter's own copies of tensors are no traffic of the kernel.
        with _disable_current_modes():
            launch(*args, **kwargs)
        counters.pop().end_launch()

    hooks = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_cas": counted_swap,
        "create_atomic_rmw": counted_update,
    }
    # The check of ids reads them on the CPU; on CUDA it is off.
    settings = {"MODE": "interpret", "launch": counted_launch, "check_range": lambda *args: None}
    with mock.patch.multiple(builder, **hooks), mock.patch.multiple(_dispatch, **settings):
        yield


def footprint(tensor: Tensor) -> int:
    """Bytes that a tensor's elements occupy; an expanded dimension counts once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride != 0 or size == 0) * tensor.element_size()


def bytes_of_call(func, args: tuple, kwargs: dict, out) -> int | None:
    """Least bytes that one ATen call reads and writes; None for a view or an allocation.

    A gather reads as much of its source as it returns, a scatter in place touches as much as it is given, and
    whatever an operation needs in between is free: in doubt the count favours PyTorch.
    """
    name = func._schema.name
    if name in ALLOCATIONS:
        return None
    given = [*args, *kwargs.values()]
    names = [argument.name for argument in func._schema.arguments]
    inputs = [tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)]
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    outputs = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
    fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in storages]
    written_names = {
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    by_name = dict(zip(names, args, strict=False)) | kwargs
    written = [by_name[key] for key in written_names if isinstance(by_name.get(key), Tensor)]
    if not fresh and not written:
        return None
    if name in SCATTERS:
        rest = [tensor for tensor in inputs if tensor is not args[0]]
        touched = max((footprint(tensor) for tensor in rest if tensor.dtype == args[0].dtype), default=0)
        times = 2 if "add" in name else 1
        return sum(map(footprint, rest)) + times * min(touched, footprint(args[0]))
    overwritten = name in OVERWRITES or "out" in written_names
    reads = [tensor for tensor in inputs if not (overwritten and any(tensor is each for each in written))]
    if name in FILLS:
        reads = []
    moved = sum(map(footprint, reads)) + sum(map(footprint, fresh)) + sum(map(footprint, written))
    if name in GATHERS:
        moved -= max(0, footprint(args[0]) - sum(map(footprint, fresh)))
    return moved


class _CallCounter(TorchDispatchMode):
    """Counts ATen calls, those inside fastmim's operations too."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastmim":
            # A mode is off while it handles a call. On again, and past its own key, it sees what is inside.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        out = func(*args, **kwargs)
        moved = bytes_of_call(func, args, kwargs, out)
        if moved is not None:
            self.traffic.add_call(moved)
        return out


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what runs inside on CPU tensors: fastmim's operations as Triton kernels, the rest as ATen calls."""
    traffic = Traffic()
    with _instrumented_interpreter(traffic), _CallCounter(traffic):
        yield traffic
