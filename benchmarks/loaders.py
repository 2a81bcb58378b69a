"""The loaders that `dataloading.py` compares, at MAE's augmentation: random resized crop, bicubic, flip."""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastmim.config import DataConfig
from fastmim.data.decoder import Decoder
from fastmim.data.index import build_index
from fastmim.data.loader import Loader
from fastmim.data.schedule import Schedule

CONFIG = DataConfig()
WARMUP = 2
"""Batches a worker before the clock starts: until then pipelines fill."""

_CROP = {"scale": CONFIG.scale, "ratio": CONFIG.aspect}
_STATISTICS = CONFIG.mean, CONFIG.std
_REPEATS = 1000


def fastmim_batches(source: Path, batch: int, workers: int, device: str = "cpu") -> Iterator[Tensor]:
    """This engine's: uint8 [B, H, W, C]; pixels are normalised by the kernel that gathers the visible patches."""
    index = build_index(str(source), CONFIG, progress=False)
    loader = Loader(
        index,
        CONFIG,
        seed=0,
        micro_batch=batch,
        accumulation=1,
        rank=0,
        world_size=1,
        device=torch.device(device),
        threads=workers,
    )
    with closing(loader):
        for made in loader:
            yield made.images


def torchvision_batches(source: Path, batch: int, workers: int, normalise: bool = True) -> Iterator[Tensor]:
    """ImageFolder and DataLoader: float32 [B, C, H, W], or uint8 where pixels are not normalised."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(*_STATISTICS)]
    transform = [
        transforms.RandomResizedCrop(
            CONFIG.image_size, **_CROP, interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(CONFIG.flip),
        *(to_tensor if normalise else [transforms.PILToTensor()]),
    ]
    dataset = ImageFolder(str(source), transforms.Compose(transform))
    dataset.samples *= _REPEATS  # an epoch's end would stop the clock's steady state
    for images, _ in DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True):
        yield images


def timm_batches(source: Path, batch: int, workers: int) -> Iterator[Tensor]:
    """timm's loader over its folder or tar reader: float32 [B, C, H, W]."""
    dataset = create_dataset("", root=str(source))
    dataset.reader.samples = list(dataset.reader.samples) * _REPEATS
    if source.suffix == ".tar":
        dataset.reader.targets = list(dataset.reader.targets) * _REPEATS
    for images, _ in timm_loader(dataset, batch, workers):
        yield images


def timm_loader(dataset, batch: int, workers: int) -> DataLoader:
    """timm's training loader at MAE's augmentation."""
    return create_loader(
        dataset,
        (3, *CONFIG.image_size),
        batch,
        is_training=True,
        **_CROP,
        hflip=CONFIG.flip,
        color_jitter=None,
        interpolation="bicubic",
        mean=_STATISTICS[0],
        std=_STATISTICS[1],
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
    )


def cuda_batches(source: Path, batch: int, workers: int) -> Iterator[Tensor]:
    """This engine's, decoded on the GPU."""
    for images in fastmim_batches(source, batch, workers, "cuda"):
        torch.cuda.synchronize()
        yield images


def torchvision_bytes(source: Path, batch: int, workers: int) -> Iterator[Tensor]:
    """ImageFolder and DataLoader without normalisation, which this engine does elsewhere."""
    return torchvision_batches(source, batch, workers, normalise=False)


BASELINE, UINT8 = "torchvision", "torchvision, uint8"

LOADERS: dict[str, tuple[Callable[[Path, int, int], Iterator[Tensor]], str]] = {
    BASELINE: (torchvision_batches, "folder"),
    UINT8: (torchvision_bytes, "folder"),
    "timm": (timm_batches, "folder"),
    "timm, tar": (timm_batches, "tar"),
    "fastmim": (fastmim_batches, "folder"),
    "fastmim, tar": (fastmim_batches, "tar"),
}
"""Name -> what makes batches, and from what."""

if torch.cuda.is_available():
    LOADERS |= {"fastmim, GPU": (cuda_batches, "folder"), "fastmim, tar, GPU": (cuda_batches, "tar")}


def measure(name: str, folder: Path, batch: int, cores: list[int], batches: int) -> tuple[float, float]:
    """Make batches on these cores, in this process and those that it starts.

    Returns:
        Wall seconds, and CPU seconds of all processes, of `batches` batches.
    """
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    make, kind = LOADERS[name]
    source = folder if kind == "folder" else folder.with_suffix(".tar")
    with closing(make(source, batch, len(cores))) as made:
        for _ in range(WARMUP * len(cores)):
            next(made)
        spent, started = _cpu_seconds(), time.perf_counter()
        for _ in range(batches):
            next(made)
        return time.perf_counter() - started, _cpu_seconds() - spent


def _cpu_seconds() -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


@contextmanager
def processes(names: list[str]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A process of its own for each loader: workers are forked from it, and its cores are set."""
    pools = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in names}
    try:
        yield pools
    finally:
        for pool in pools.values():
            pool.shutdown()


def require_same_work(folder: Path, images: int = 32, draws: int = 2000) -> dict[str, float]:
    """Refuse to compare loaders that crop, scale or flip otherwise.

    Returns:
        Mean share of the image that each crops, and the mean difference of this engine's images from Pillow's of the
        same windows, in levels of 255.
    """
    index = build_index(str(folder), CONFIG, progress=False)
    config = CONFIG.model_copy(update={"flip": 0.0})
    schedule = Schedule(index.heights, index.widths, 0, config)
    plan = schedule.plan(np.arange(draws))
    photograph = Image.open(os.fsdecode(index.path(0)))
    area = photograph.height * photograph.width
    torch.manual_seed(0)
    random.seed(0)  # timm's
    crop = timm_loader(create_dataset("", root=str(folder)), 1, 0).dataset.transform.transforms[0]
    draw = {
        "torchvision": transforms.RandomResizedCrop.get_params,
        "timm": RandomResizedCropAndInterpolation.get_params,
    }
    shares = {"fastmim": (plan.height * plan.width).mean() / area}
    for name, get_params in draw.items():
        windows = [get_params(photograph, crop.scale, crop.ratio) for _ in range(draws)]
        shares[name] = np.mean([height * width for _, _, height, width in windows]) / area
    decoder = Decoder(index, config, torch.device("cpu"), batch_size=images, threads=1)
    part = plan.take(slice(images))
    decoder.start(part)
    ours = decoder.result().numpy().astype(np.int16)
    difference = np.mean([abs(ours[row] - _by_pillow(index, part, row)).mean() for row in range(images)])
    if max(shares.values()) - min(shares.values()) > 0.02 or difference > 1:
        sys.exit(
            f"crops hold {shares} of an image and pixels differ by {difference:.2f} levels; expected equal shares "
            "within 0.02 and less than one level: no speed-up is told of different work"
        )
    return {
        **{f"{name}_crop": float(share) for name, share in shares.items()},
        "difference": float(difference),
    }


def _by_pillow(index, plan, row: int) -> np.ndarray:
    photograph = Image.open(os.fsdecode(index.path(int(plan.sample[row])))).convert("RGB")
    top, left, height, width = (int(getattr(plan, key)[row]) for key in ("top", "left", "height", "width"))
    window = photograph.crop((left, top, left + width, top + height))
    return np.asarray(window.resize(CONFIG.image_size[::-1], Image.Resampling.BICUBIC), np.int16)
