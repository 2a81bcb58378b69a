"""nvJPEG, by which DALI decodes on GPUs: several may be installed, and the first that a process loads is everybody's.

torchvision brings one of its own, which is older than the one that comes with DALI, and both call themselves
libnvjpeg.so.13: whoever asks for that name is given the one that is there already. One before version 13.2 may get a
pixel at the edge of a window wrong where chroma is interpolated, so that nvImageCodec, which DALI decodes by, leaves
such windows to the CPU.
"""

import contextlib
import ctypes
import functools
import importlib.util
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_WITH_WINDOWS = 13, 2


def load_packaged() -> None:
    """Load the one of NVIDIA's packages, where it is installed; to be called before torchvision is imported."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found and found.submodule_search_locations) or ():
        for path in Path(folder).glob("*/lib/libnvjpeg.so.*"):
            with contextlib.suppress(OSError):  # `interpolates_windows` tells what came of it
                ctypes.CDLL(str(path))


def found_version(cuda: int) -> tuple[int, int] | None:
    """Major and minor version of the one that a build for this major version of CUDA gets, if there is one."""
    try:
        library = ctypes.CDLL(f"libnvjpeg.so.{cuda}")
    except OSError:
        return None
    numbers = ctypes.c_int(), ctypes.c_int()
    for place, number in enumerate(numbers):
        library.nvjpegGetProperty(place, ctypes.byref(number))
    return numbers[0].value, numbers[1].value


@functools.cache
def interpolates_windows(cuda: int) -> bool:
    """Whether GPUs decode windows with interpolated chroma; if not, a warning says so once.

    Args:
        cuda: the major version that DALI is built for.
    """
    version = found_version(cuda)
    if version is None or version >= _WITH_WINDOWS:
        return True
    logger.warning(
        "nvJPEG is %s.%s; interpolated chroma wants %s.%s (pip install -U nvidia-nvjpeg, and import fastmim before "
        "torchvision): the GPU repeats chroma instead",
        *version,
        *_WITH_WINDOWS,
    )
    return False
