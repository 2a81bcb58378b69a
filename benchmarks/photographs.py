"""Colour photographs for the loaders to decode: JPEGs of ImageNet's usual size, composed of the demo set's grey ones.

Each plane is a mosaic of photographs at their own resolution, so that sensor noise and texture, which decide what a
JPEG costs, are real; the colour planes are those of other photographs, at the lower contrast that colour has.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastmim.data.demo import prepare_elpv

SIZE = (375, 500)
"""Height and width in pixels."""

_TILE = 300
_CHROMA = 0.35
_DEMO = Path("data/elpv")


def write_photographs(folder: Path, n: int, quality: int) -> Path:
    """Write `n` JPEGs of one class as `folder`/photographs/*.jpg, and the same as `folder`.tar; kept if they are there.

    Args:
        folder: the root of an ImageFolder.
        n: how many.
        quality: of the JPEG encoder, 4:2:0.

    Returns:
        `folder`.
    """
    if len(list(folder.glob("photographs/*.jpg"))) == n and folder.with_suffix(".tar").exists():
        return folder
    sources = sorted((prepare_elpv(_DEMO) / "train").glob("*.png"))
    inside = folder / "photographs"
    inside.mkdir(parents=True, exist_ok=True)
    for old in inside.glob("*.jpg"):
        old.unlink()
    with tarfile.open(folder.with_suffix(".tar"), "w") as shard:
        for number in range(n):
            file = io.BytesIO()
            compose(sources, number).save(file, "JPEG", quality=quality)
            (inside / f"{number:05d}.jpg").write_bytes(file.getvalue())
            member = tarfile.TarInfo(f"{inside.name}/{number:05d}.jpg")
            member.size = len(file.getvalue())
            shard.addfile(member, io.BytesIO(file.getvalue()))
    return folder


def compose(sources: list[Path], number: int) -> Image.Image:
    """Photograph `number`, RGB 375 x 500, always the same one."""
    random = np.random.default_rng(number)
    planes = []
    for contrast in (1.0, _CHROMA, _CHROMA):
        tiles = [
            np.asarray(Image.open(sources[i]).convert("L"), np.float32)
            for i in random.integers(len(sources), size=4)
        ]
        mosaic = np.block([tiles[:2], tiles[2:]])
        top, left = random.integers(2 * _TILE - SIZE[0]), random.integers(2 * _TILE - SIZE[1])
        window = mosaic[top : top + SIZE[0], left : left + SIZE[1]]
        planes.append(Image.fromarray((128 + contrast * (window - 128)).astype(np.uint8)))
    return Image.merge("YCbCr", planes).convert("RGB")
