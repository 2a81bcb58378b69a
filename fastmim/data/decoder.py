"""From rows of a plan to images: what DALI is fed, how its runs start, and how their results are handed over."""

import mmap
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmim.config import DataConfig
from fastmim.data.index import Index
from fastmim.data.pipeline import color_inputs, image_pipeline
from fastmim.data.schedule import Plan
from fastmim.errors import DataError

_OPEN_SHARDS = 256

# What DALI raises for an image or a file that it cannot read.
DECODE_ERRORS = (RuntimeError, ValueError, IndexError, OSError)

# DALI's messages that say nothing to a person.
_MEANINGS = {
    "Failed to decode sample": "damaged or truncated pixels",
    "nvImageCodec failure": "damaged header",
}


class SampleReader:
    """Turns the rows of a plan into the pipeline's inputs, without reading or copying an image.

    A folder's image is its path, which DALI's threads open; a shard's and an .npy array's are views of a memory
    map, which DALI's threads page in.
    """

    def __init__(self, index: Index, channels: int):
        self.index = index
        self._channels = channels
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        if index.kind == "npy":
            array = np.asarray(np.load(index.root, mmap_mode="r"))  # views of a plain array are cheaper
            self._array = array[..., None] if array.ndim == 3 else array

    def inputs(self, plan: Plan) -> dict[str, Any]:
        """What to feed by input name. Keep it until the run that it feeds has been collected."""
        start = np.stack([plan.top, plan.left], axis=-1).astype(np.int32)
        shape = np.stack([plan.height, plan.width], axis=-1).astype(np.int32)
        inputs: dict[str, Any] = {"source": [self._source(sample) for sample in plan.sample.tolist()]}
        if start.ndim == 2:
            return inputs | {"start": start, "shape": shape} | self._view(plan.flip, plan.color, 0)
        # One window around all crops is decoded, and each crop is a window of that.
        first = start.min(1)
        inputs |= {"start": first, "shape": (start + shape).max(1) - first}
        for crop in range(start.shape[1]):
            color = None if plan.color is None else plan.color[:, crop]
            inputs |= self._view(plan.flip[:, crop], color, crop)
            inputs |= {f"start{crop}": start[:, crop] - first, f"shape{crop}": shape[:, crop].copy()}
        return inputs

    def _view(self, flip: np.ndarray, color: np.ndarray | None, crop: int) -> dict[str, np.ndarray]:
        """What one crop of each image is made with."""
        inputs = {f"flip{crop}": flip.astype(np.int32)}
        if color is not None:
            units = (1, 1, 1, 360)  # DALI takes hue in degrees
            for column, name in enumerate(color_inputs(self._channels)):
                inputs[f"{name}{crop}"] = color[:, column] * np.float32(units[column])
        return inputs

    def _source(self, sample: int) -> np.ndarray:
        index = self.index
        if index.kind == "folder":
            return np.frombuffer(index.path(sample), np.uint8)
        if index.kind == "npy":
            return self._array[sample]
        offset = int(index.offsets[sample])
        return self._shard(int(index.shard_ids[sample]))[offset : offset + int(index.sizes[sample])]

    def _shard(self, shard: int) -> np.ndarray:
        """The bytes of a shard. Views outlive their map's place in this cache."""
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        path = self.index.shard_path(shard)
        try:
            with open(path, "rb") as file:
                data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error})") from error
        self._maps[shard] = data
        if len(self._maps) > _OPEN_SHARDS:
            self._maps.popitem(last=False)
        return data


class Decoder:
    """Runs of one pipeline. After an error it is of no use: DALI's pipelines do not survive one.

    Args:
        index: the images.
        config: how they become tensors.
        device: where they are decoded.
        batch_size: most images in one run.
        threads: CPU threads of DALI.
        prefetch: runs to start before the first result is asked for, and to keep started.
        crops: of each image, as in the plans.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        device: torch.device,
        *,
        batch_size: int,
        threads: int,
        prefetch: int = 1,
        crops: int = 1,
    ):
        self._fed: deque[dict[str, Any]] = deque()
        self._pipeline: Any = None
        self._device = device
        self._reader = SampleReader(index, config.channels)
        self._prefetch, self._started = prefetch, 0
        self._pipeline = image_pipeline(
            index,
            config,
            batch_size=batch_size,
            threads=threads,
            prefetch=prefetch,
            crops=crops,
            device_id=device.index if device.type == "cuda" else None,
        )

    def start(self, plan: Plan) -> None:
        """Start one run."""
        inputs = self._reader.inputs(plan)
        for name, value in inputs.items():
            self._pipeline.feed_input(name, value)
        self._fed.append(inputs)
        self._started += 1
        # DALI's first schedule_run takes `prefetch` batches at once; each later one takes one.
        if self._started >= self._prefetch:
            self._pipeline.schedule_run()

    def result(self) -> Tensor:
        """The oldest run's images, uint8 [B * crops, H, W, C], without a copy: the tensor owns DALI's buffer.

        An image's crops stand side by side.

        On the GPU the buffer is bound to the current stream: work queued there comes after the decoding, and
        the memory is reused only after that work.

        Raises:
            one of DECODE_ERRORS: when an image of this run, or of one started after it, cannot be decoded.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = self._pipeline.share_outputs(cuda_stream=stream)
        tensor = torch.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        self._fed.popleft()
        return tensor.flatten(0, 1) if tensor.ndim == 5 else tensor

    def close(self) -> None:
        """Free the pipeline, and only then the inputs that its threads may still be reading."""
        self._pipeline = None
        self._fed.clear()

    def __del__(self):
        self.close()


class Probe:
    """Decodes images one at a time, to find which one of a batch is bad.

    Args:
        index, config, device, crops: as for `Decoder`.
    """

    def __init__(self, index: Index, config: DataConfig, device: torch.device, crops: int = 1):
        self._arguments, self._crops = (index, config, device), crops
        self._decoder: Decoder | None = None

    def why_not(self, plan: Plan) -> str | None:
        """Why the one image of `plan` cannot be decoded; None when it can."""
        self._decoder = self._decoder or Decoder(*self._arguments, batch_size=1, threads=1, crops=self._crops)
        try:
            self._decoder.start(plan)
            self._decoder.result()
        except DECODE_ERRORS as error:
            self._decoder.close()
            self._decoder = None
            return _cause(str(error))
        return None


def _cause(message: str) -> str:
    """The telling line of DALI's message, which comes after a traceback of the pipeline's definition."""
    lines = [line.strip() for line in message.partition("encountered:")[2].splitlines() if line.strip()]
    cause = lines[0] if lines else message.strip()
    for start, meaning in _MEANINGS.items():
        if cause.startswith(start):
            return meaning
    return cause
