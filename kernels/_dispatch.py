"""Which implementation an operation runs, how a kernel is launched, and the checks that all operations share.

Two environment variables are read once, when this module is imported:

`FASTMIM_KERNELS`
    `auto` (default): CUDA tensors go through the Triton kernels, all others through plain PyTorch, or C where an
        operation has it (`_native`).
    `interpret`: CPU tensors go through the Triton kernels too, in Triton's interpreter: slow, for tests.
    `reference`: plain PyTorch everywhere.

`FASTMIM_DEBUG`
    `1`: patch ids are checked to be in range on every device. On CUDA this waits for the device on each call.
    Without it ids are checked on the CPU only; an id out of range on CUDA is undefined behaviour.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction

logger = logging.getLogger("fastmim.kernels")

MODES = ("auto", "interpret", "reference")
INDEX_DTYPES = (torch.int64, torch.int32)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def read_mode() -> str:
    """Return the mode that FASTMIM_KERNELS asks for; ValueError if it is not one of `MODES`."""
    mode = os.environ.get("FASTMIM_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"FASTMIM_KERNELS is {mode!r}; expected one of {', '.join(MODES)}")
    return mode


def read_debug() -> bool:
    """Return whether FASTMIM_DEBUG is on; ValueError if it is neither 0 nor 1."""
    value = os.environ.get("FASTMIM_DEBUG", "0")
    if value not in ("0", "1"):
        raise ValueError(f"FASTMIM_DEBUG is {value!r}; expected 0 or 1")
    return value == "1"


MODE = read_mode()
DEBUG = read_debug()


class Kernel(JITFunction):
    """A Triton kernel that can be compiled and, in the same process, interpreted.

    `@triton.jit` decides between the two when a function is decorated, from TRITON_INTERPRET. Here the
    choice is made per launch, so one test process covers the kernels and the references, whatever was
    imported first.
    """

    @functools.cached_property
    def interpreted(self) -> InterpretedFunction:
        """This kernel for Triton's interpreter."""
        return InterpretedFunction(self.fn)

    def __call__(self, *args, **kwargs):
        """Run as a device function; reached from interpreted kernels only."""
        return self.interpreted(*args, **kwargs)


def kernel(function: Callable) -> Kernel:
    """Decorate a Triton kernel or device function."""
    return Kernel(function)


# Where Triton's interpreter replaces functions by its own.
_PATCHED = (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Make Triton's own @jit functions (`tl.sum`, `tl.philox`) interpretable, and leave Triton as it was after.

    The interpreter restores what a kernel replaced, but not what device functions called by it replaced: a
    kernel compiled later in the process would then be built from the interpreter's functions.
    """
    before = [dict(vars(place)) for place in _PATCHED]
    # `tl.philox` calls another @jit function by its name in `tl.random`.
    compiled = [
        (place, name, value)
        for place in (tl, tl.random)
        for name, value in vars(place).items()
        if isinstance(value, JITFunction)
    ]
    for place, name, value in compiled:
        setattr(place, name, _interpreted_library_function(value.fn))
    interpreter_builder.create_dot = _interpreted_dot
    try:
        yield
    finally:
        del interpreter_builder.create_dot
        for place, name, value in compiled:
            setattr(place, name, value)
        for place, attributes in zip(_PATCHED, before, strict=True):
            for name in vars(place).keys() - attributes.keys():
                delattr(place, name)
            for name, value in attributes.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)


def _interpreted_dot(a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
    """The interpreter's `tl.dot`, which would multiply the bits of bfloat16 as integers."""
    wide = (
        interpreter_builder.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )
    return type(interpreter_builder).create_dot(interpreter_builder, *wide, *rest)


@functools.cache
def _interpreted_library_function(function: Callable) -> InterpretedFunction:
    return InterpretedFunction(function)


def launch(function: Kernel, grid: tuple[int, ...], *args, num_warps: int = 4, **constants) -> None:
    """Launch a kernel on the device of its first tensor argument, interpreted if that is the CPU."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cpu":
        with _interpreter():
            function.interpreted[grid](*args, **constants)
    else:
        # Triton launches on the current device, which need not be the one that holds the tensors.
        with torch.cuda.device(device):
            function[grid](*args, num_warps=num_warps, **constants)


@functools.cache
def _log_backend(device_type: str, backend: str) -> None:
    logger.info("%s tensors: %s (FASTMIM_KERNELS=%s)", device_type, backend, MODE)


def use_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels; the choice is logged once per device type."""
    triton_runs = MODE != "reference" and (tensor.is_cuda or (MODE == "interpret" and tensor.is_cpu))
    _log_backend(tensor.device.type, "Triton kernels" if triton_runs else "plain PyTorch")
    return triton_runs


def cdiv(count: int, size: int) -> int:
    """Programs of `size` that cover `count`; `triton.cdiv` takes microseconds of the host for it."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is as large; as with `cdiv`."""
    return 1 << (number - 1).bit_length()


def warps_for(elements: int, per_thread: int) -> int:
    """Warps that leave each thread `per_thread` of a tile's elements, enough for a 128-bit load."""
    return max(1, min(8, elements // (32 * per_thread)))


def column_block(columns: int) -> int:
    """Columns of a tile: 256 divides every ViT width without waste; narrow rows take one power of two."""
    return min(256, next_power_of_2(columns))


def check_tensor(
    name: str, tensor: Tensor, wanted: str, dtypes: tuple, device: torch.device | None = None
) -> None:
    """Check an argument's type, dtype, number of dimensions and device.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        wanted: its dimensions, such as "[B, N, D]".
        dtypes: accepted dtypes.
        device: where it must be; None accepts any.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions, or on another device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; wanted a tensor {wanted}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; wanted {names}")
    if tensor.ndim != wanted.count(",") + 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted {wanted}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; wanted {device}, as the other arguments")


def check_shape(name: str, tensor: Tensor, wanted: str, sizes: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has these sizes (None: any)."""
    for got, size in zip(tensor.shape, sizes, strict=True):
        if size is not None and got != size:
            shown = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted {wanted} = [{shown}]")


def check_ids(name: str, ids: Tensor, like: Tensor, like_name: str, size: str) -> None:
    """Check indices [B, K] against the tensor that they index: dtype, device, batch, not empty."""
    check_tensor(name, ids, f"[B, {size}]", INDEX_DTYPES, like.device)
    if ids.shape[0] != like.shape[0]:
        raise ValueError(f"{name} has batch {ids.shape[0]}; wanted {like.shape[0]}, the batch of {like_name}")
    if ids.shape[1] == 0 or ids.shape[0] == 0:
        raise ValueError(f"{name} has shape {list(ids.shape)}; wanted at least one id per sample")


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a dtype that plain PyTorch accepts and the kernels do not (float64)."""
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; the Triton kernels take float32, bfloat16 or float16"
        )


def check_range(name: str, ids: Tensor, low: int, high: int) -> None:
    """Raise ValueError if an id is outside low..high-1; on CUDA, where it waits, under FASTMIM_DEBUG only."""
    if not (DEBUG or ids.device.type == "cpu"):
        return
    smallest, largest = (int(value) for value in ids.aminmax())
    if smallest < low or largest >= high:
        raise ValueError(f"{name} has values {smallest}..{largest}; wanted {low}..{high - 1}")
