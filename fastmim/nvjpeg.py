"""nvJPEG, by which DALI decodes on GPUs: several may be installed, and the first that a process loads is everybody's.

torchvision brings one of its own, which is older than the one that comes with DALI, and both call themselves
libnvjpeg.so.13: whoever asks for that name is given the one that is there already. Before version 13.2 it does not
decode a window of an image with interpolated chroma, and DALI then decodes on the CPU.
"""

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

NAMES = ("libnvjpeg.so.13", "libnvjpeg.so.12")
_WITH_WINDOWS = 13, 2


def load_packaged() -> None:
    """Load the one of NVIDIA's packages, where it is installed; to be called before torchvision is imported."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found and found.submodule_search_locations) or ():
        for path in (path for name in NAMES for path in Path(folder).glob(f"*/lib/{name}")):
            with contextlib.suppress(OSError):  # `interpolates_windows` tells what came of it
                ctypes.CDLL(str(path))


def loaded_version() -> tuple[int, int] | None:
    """Major and minor version of the one that this process has loaded, if it has."""
    for name in NAMES:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            numbers = ctypes.c_int(), ctypes.c_int()
            for place, number in enumerate(numbers):
                library.nvjpegGetProperty(place, ctypes.byref(number))
            return numbers[0].value, numbers[1].value
    return None


@functools.cache
def interpolates_windows() -> bool:
    """Whether the loaded one decodes windows with interpolated chroma; if not, a warning says so once."""
    version = loaded_version()
    if version is None or version >= _WITH_WINDOWS:
        return True
    logger.warning(
        "nvJPEG is %s.%s; interpolated chroma wants %s.%s (pip install -U nvidia-nvjpeg, and import fastmim before "
        "torchvision): the GPU repeats chroma instead",
        *version,
        *_WITH_WINDOWS,
    )
    return False
