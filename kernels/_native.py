"""C for a CPU, where PyTorch's operators would go over memory again and again: compiled when it is first needed.

No library is kept, which could be another machine's or another compiler's.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _dispatch

_FLAGS = ("-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_FLAGS_OF = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
"""Of what PyTorch found the processor to have."""

HALF = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes that C takes -> whether it widens them."""


def native(source: str) -> ctypes.CDLL | None:
    """The library of a C file of this folder; None where FASTMIM_KERNELS or a missing compiler rules it out."""
    return _load(source) if _dispatch.MODE == "auto" else None


@functools.cache
def _load(source: str) -> ctypes.CDLL | None:
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        library = _compile(Path(__file__).with_name(source), _FLAGS_OF.get(capability, ()))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        _dispatch.logger.warning(
            "%s runs as plain PyTorch, which is slower on a CPU: %s (CC names the compiler, TMPDIR its folder)",
            source,
            why,
        )
        return None
    _dispatch.logger.info("cpu tensors: %s, compiled for %s", source, capability)
    return library


def _compile(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    # gcc: its OpenMP is that of PyTorch's wheels, and threads are shared.
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / source.with_suffix(".so").name
        command = [*compiler, *_FLAGS, *flags, str(source), "-o", str(library), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))  # stays mapped when its file is gone


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a CPU's memory as C takes it: in order, and as no subclass keeps it elsewhere."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()


def pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array:
    """What C takes for a list of tensors; they have to live until it returns."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def integers(numbers: Sequence[int]) -> ctypes.Array:
    """What C takes for a list of numbers, as int64_t."""
    return (ctypes.c_int64 * len(numbers))(*numbers)
