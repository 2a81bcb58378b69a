"""Where a loader's time goes: CPU milliseconds of each stage alone, on one core, for the same windows."""

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from torchvision.io import decode_jpeg

from benchmarks.loaders import CONFIG
from fastmim.data.index import build_index
from fastmim.data.schedule import Plan, Schedule

SIZE = list(CONFIG.image_size)
_BATCH = 64


def stage_rows(folder: Path, size: str, rounds: int) -> list[dict]:
    """A row a stage; meant for a process of its own, which it holds to one core.

    Args:
        folder: of JPEGs.
        size: what to call them.
        rounds: samples of each stage, taken in turns.
    """
    os.sched_setaffinity(0, sorted(psutil.Process().cpu_affinity())[:1])
    torch.set_num_threads(1)
    index = build_index(str(folder), CONFIG, progress=False)
    plan = Schedule(index.heights, index.widths, 0, CONFIG).plan(np.arange(_BATCH))
    files = [Path(os.fsdecode(index.path(sample))).read_bytes() for sample in plan.sample.tolist()]
    stages = {**dict(_pillow_and_torch(files, plan)), **dict(_dali(files, plan))}
    samples: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name, run in stages.items():
            started = time.process_time()
            run()
            if number:
                samples[name].append((time.process_time() - started) / _BATCH)
    return [
        {"variant": name, "size": size, "cpu_s_per_image": float(np.median(taken)), "samples": taken}
        for name, taken in samples.items()
    ]


def _pillow_and_torch(files: list[bytes], plan: Plan) -> Iterator[tuple[str, Callable[[], object]]]:
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    photographs = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    boxes = zip(*(getattr(plan, key).tolist() for key in ("top", "left", "height", "width")), strict=True)
    windows = [
        photograph.crop((left, top, left + width, top + height))
        for photograph, (top, left, height, width) in zip(photographs, boxes, strict=True)
    ]
    # [1, C, h, w] in channels_last order, as a decoder's [h, w, C] is: PyTorch resizes bytes of it with AVX2.
    bytes_ = [torch.from_numpy(np.array(window)).permute(2, 0, 1)[None] for window in windows]
    yield "decode, Pillow", lambda: [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    yield "decode, torchvision.io", lambda: [decode_jpeg(tensor) for tensor in tensors]
    yield "resize, Pillow", lambda: [w.resize(SIZE[::-1], Image.Resampling.BICUBIC) for w in windows]
    yield (
        "resize, PyTorch",
        lambda: [F.interpolate(x, SIZE, mode="bicubic", antialias=True) for x in bytes_],
    )


def _dali(files: list[bytes], plan: Plan) -> Iterator[tuple[str, Callable[[], object]]]:
    resize = {"size": SIZE, "interp_type": types.INTERP_CUBIC}
    window = {"axes": (0, 1), "output_type": types.RGB}

    def decode(encoded, start, shape, fancy=True):
        return fn.decoders.image_slice(
            encoded, start=start, shape=shape, jpeg_fancy_upsampling=fancy, **window
        )

    graphs = {
        "DALI, inputs alone": lambda *inputs: inputs[0],
        "DALI, decode all": lambda encoded, *_: fn.decoders.image(
            encoded, output_type=types.RGB, jpeg_fancy_upsampling=True
        ),
        "DALI, decode the window": decode,
        "DALI, decode the window, plain upsampling": lambda *inputs: decode(*inputs, fancy=False),
        "DALI, window and resize": lambda *inputs: fn.resize(decode(*inputs), antialias=True, **resize),
        "DALI, window and resize without antialias": lambda *inputs: fn.resize(
            decode(*inputs), antialias=False, **resize
        ),
        "DALI, window, resize and flip": lambda *inputs: fn.flip(
            fn.resize(decode(*inputs), antialias=True, **resize), horizontal=1
        ),
    }
    fed = {
        "encoded": [np.frombuffer(file, np.uint8) for file in files],
        "start": np.stack([plan.top, plan.left], axis=1).astype(np.int32),
        "shape": np.stack([plan.height, plan.width], axis=1).astype(np.int32),
    }
    for name, graph in graphs.items():
        yield name, _runner(graph, fed)


def _runner(graph: Callable, fed: dict) -> Callable[[], None]:
    pipeline = Pipeline(batch_size=_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        start, shape = (
            fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape")
        )
        # Inputs that a graph does not read would not be fed.
        pipeline.set_outputs(graph(encoded, start, shape), start, shape)
    pipeline.build()

    def run() -> None:
        for name, value in fed.items():
            pipeline.feed_input(name, value)
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()

    return run
