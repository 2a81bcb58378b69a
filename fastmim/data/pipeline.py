"""The DALI pipeline: one definition for CPU and GPU, one external input a source, no random operator.

Crop windows come from the index, so only the window is decoded; every output is a function of its row of the
plan alone.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nvidia.dali import backend, fn, types
from nvidia.dali.pipeline import Pipeline

from fastmim import nvjpeg
from fastmim.config import DataConfig
from fastmim.data.index import Index

_PIXELS = {1: types.GRAY, 3: types.RGB}
_CUDA = backend.__cuda_version__ // 1000


def image_pipeline(
    index: Index,
    config: DataConfig,
    *,
    batch_size: int,
    threads: int,
    prefetch: int,
    crops: int,
    device_id: int | None,
) -> Pipeline:
    """Decode, resize, flip and colour windows of images to uint8 [B, H, W, C]; [B, crops, H, W, C] of several crops.

    Args:
        index: what the samples are.
        config: image_size, channels and color_jitter are read.
        batch_size: most images in one run.
        threads: CPU threads of DALI.
        prefetch: runs that may be under way at once.
        crops: of each image, which is decoded once.
        device_id: the CUDA device that decodes; None is the CPU. An old nvJPEG (`nvjpeg.py`) gives JPEGs whose chroma
            is stored at half the resolution slightly other pixels.

    Returns:
        A built pipeline whose inputs `decoder.SampleReader.inputs` makes.
    """
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch
    )
    resize = None
    if device_id is None:
        resize = functools.partial(_resize_on_cpu, ThreadPoolExecutor(threads), config.image_size)
    with pipeline:
        # The reader keeps what it feeds alive until the run is collected, so DALI need not copy it.
        source = fn.external_source(
            name="source",
            dtype=types.UINT8,
            ndim=3 if index.kind == "npy" else 1,
            layout="HWC" if index.kind == "npy" else None,
            no_copy=True,
        )
        window = _window("")
        if index.kind == "npy":
            images = fn.slice(source, **window)
            images = _move(images, device_id)
        else:
            encoded = fn.io.file.read(source) if index.kind == "folder" else source
            images = fn.decoders.image_slice(
                encoded,
                device="cpu" if device_id is None else "mixed",
                output_type=_PIXELS.get(config.channels, types.ANY_DATA),
                # A GPU's decoder else repeats chroma where the CPU's interpolates; one that cannot has to.
                jpeg_fancy_upsampling=device_id is None or nvjpeg.interpolates_windows(_CUDA),
                **window,
            )
        stored = npy_channels(index)
        if stored and stored != config.channels:
            images = fn.color_space_conversion(
                images, image_type=_PIXELS[stored], output_type=_PIXELS[config.channels]
            )
        if crops == 1:
            images = _view(images, config, 0, resize)
        else:
            windows = [fn.slice(images, **_window(str(crop))) for crop in range(crops)]
            images = fn.stack(*(_view(window, config, crop, resize) for crop, window in enumerate(windows)))
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _move(images: Any, device_id: int | None) -> Any:
    return images if device_id is None else images.gpu()


def _window(name: str) -> dict[str, Any]:
    start, shape = (
        fn.external_source(name=f"{key}{name}", dtype=types.INT32, ndim=1) for key in ("start", "shape")
    )
    return {"start": start, "shape": shape, "axes": (0, 1)}


def _view(images: Any, config: DataConfig, crop: int, resize: Callable | None) -> Any:
    """Resize, flip and colour one crop of each image; DALI resizes unless it is told what does."""
    if resize is None:
        images = fn.resize(
            images, size=list(config.image_size), interp_type=types.INTERP_CUBIC, antialias=True
        )
    else:
        images = fn.python_function(images, function=resize, batch_processing=True, output_layouts="HWC")
    images = fn.flip(images, horizontal=fn.external_source(name=f"flip{crop}", dtype=types.INT32, ndim=0))
    return images if config.color_jitter is None else _color(images, config.channels, crop)


def _resize_on_cpu(
    pool: ThreadPoolExecutor, size: tuple[int, int], images: list[np.ndarray]
) -> list[np.ndarray]:
    """Bicubic with antialias: on a CPU, PyTorch is several times as fast as DALI, and closer to Pillow.

    Args:
        pool: as many threads as the pipeline has.
        size: height and width of the results.
        images: uint8 [h, w, C] each.
    """

    def resize(image: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        return F.interpolate(pixels, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()

    return list(pool.map(resize, images))


def _color(images: Any, channels: int, crop: int) -> Any:
    """Brightness, contrast around mid-grey, saturation and hue: torchvision's ranges, in one pass."""
    factors = {
        name: fn.external_source(name=f"{name}{crop}", dtype=types.FLOAT, ndim=0)
        for name in color_inputs(channels)
    }
    return fn.brightness_contrast(images, **factors) if channels == 1 else fn.color_twist(images, **factors)


def color_inputs(channels: int) -> tuple[str, ...]:
    """The colour factors that grey and RGB images have, in the order of `Plan.color`."""
    return ("brightness", "contrast") if channels == 1 else ("brightness", "contrast", "saturation", "hue")


def npy_channels(index: Index) -> int | None:
    """Channels of an .npy source; None for files, which DALI converts as it decodes."""
    if index.kind != "npy":
        return None
    return int(index.sizes[0]) // (int(index.heights[0]) * int(index.widths[0]))
