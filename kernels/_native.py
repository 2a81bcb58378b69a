"""C for a CPU, where PyTorch's operators would go over memory again and again: compiled when it is first needed.

A library is compiled in a fraction of a second and kept in Triton's cache, which TRITON_CACHE_DIR moves.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from triton.runtime.cache import get_cache_manager

from . import _dispatch

_FLAGS = ("-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_FLAGS_OF = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
"""Of what PyTorch found the processor to have."""


def native(source: str) -> ctypes.CDLL | None:
    """The library of a C file of this folder; None where FASTMIM_KERNELS or a missing compiler rules it out."""
    return _load(source) if _dispatch.MODE == "auto" else None


@functools.cache
def _load(source: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_compiled(Path(__file__).with_name(source)))
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        _dispatch.logger.warning("%s runs as plain PyTorch, which is slower on a CPU: %s", source, why)
        return None


def _compiled(source: Path) -> str:
    """The path of the library, compiled unless it is in the cache already."""
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*_compiler(), *_FLAGS, *_FLAGS_OF.get(capability, ()), str(source)]
    read = b"".join(file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(" ".join([*command, platform.machine()]).encode() + read).hexdigest()
    cache, name = get_cache_manager(key), source.with_suffix(".so").name
    if (kept := cache.get_file(name)) is not None:
        return kept
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / name
        subprocess.run([*command, "-o", library, "-lm"], check=True, capture_output=True, text=True)
        # Several ranks may do this at once; a file is moved to its place when it is whole.
        return cache.put(library.read_bytes(), name, binary=True)


def _compiler() -> list[str]:
    if "CC" in os.environ:
        return shlex.split(os.environ["CC"])
    names = ("gcc", "cc", "clang")
    if found := next(filter(None, map(shutil.which, names)), None):
        return [found]
    raise FileNotFoundError(f"no C compiler: none of {', '.join(names)} is on the PATH")


def pointers(tensors: list[torch.Tensor]) -> ctypes.Array:
    """What C takes for a list of tensors; they have to live until it returns."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def integers(numbers: list[int]) -> ctypes.Array:
    """What C takes for a list of numbers, as int64_t."""
    return (ctypes.c_int64 * len(numbers))(*numbers)
