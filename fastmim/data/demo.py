"""The demo set: real photographs that a package carries, so that a first run needs no download.

elpv-dataset: 2,624 grey 300x300 photographs of solar cells (Buerhop-Lutz et al., "A benchmark for visual
identification of defective solar cells in electroluminescence imagery", EU PVSEC 2018); CC BY-NC-SA 4.0.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from fastmim.errors import DataError

HELD_OUT_EVERY = 16
_PACKAGE = "elpv_dataset"


def prepare_elpv(out: Path) -> Path:
    """Make the demo set ready: `out/train` and `out/heldout`.

    Of the images sorted by name, the first and every 16th after it are held out. They are hard links, or copies
    where the package lies on another disk. A folder that is there already is left as it is.

    Args:
        out: the folder to make.

    Returns:
        `out`.

    Raises:
        DataError: when the package is not installed, or `out` is there and is not a demo set.
    """
    out = Path(out)
    if out.exists():
        return _checked(out)
    images = sorted(_image_folder().glob("*.png"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary) / out.name
        for part in ("train", "heldout"):
            (made / part).mkdir(parents=True)
        for place, image in enumerate(images):
            _link(image, made / ("train" if place % HELD_OUT_EVERY else "heldout") / image.name)
        try:
            made.rename(out)
        except OSError:
            if not out.exists():  # else another process was faster; its folder is as whole as this one
                raise
    return _checked(out)


def _image_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "the demo set needs the package elpv-dataset, which is not installed: pip install 'fastmim[demo]'"
        )
    folder = Path(spec.origin).parent / "data" / "images"
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; expected the images of elpv-dataset 1.0")
    return folder


def _link(image: Path, target: Path) -> None:
    try:
        os.link(image, target)
    except OSError:
        shutil.copyfile(image, target)


def _checked(out: Path) -> Path:
    missing = [part for part in ("train", "heldout") if not any((out / part).glob("*.png"))]
    if missing:
        raise DataError(
            f"{out} holds no {missing[0]}/*.png; expected a demo set, or a folder that does not exist yet"
        )
    return out
