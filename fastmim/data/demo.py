"""The demo set: real photographs that a package carries, so that a first run needs no download.

elpv-dataset: 2,624 grey 300x300 photographs of solar cells (Buerhop-Lutz et al., "A benchmark for visual
identification of defective solar cells in electroluminescence imagery", EU PVSEC 2018); CC BY-NC-SA 4.0.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from fastmim.data.whole_folder import whole_folder
from fastmim.errors import DataError
from fastmim.manifest import write_durably

HELD_OUT_EVERY = 16
LABELS = "labels.csv"
"""Which cells are defective, as `labels=` of `fastmim evaluate` takes it."""
_PACKAGE = "elpv_dataset"


def prepare_elpv(out: Path) -> Path:
    """Make the demo set ready: `out/train`, `out/heldout`, and `out/labels.csv`, which tells of both.

    Of the images sorted by name, the first and every 16th after it are held out. They are hard links, or copies
    where the package lies on another disk. A folder that is there already is left as it is, but for labels that it
    lacks.

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
    with whole_folder(out) as made:
        for part in ("train", "heldout"):
            (made / part).mkdir()
        for place, image in enumerate(images):
            _link(image, made / ("train" if place % HELD_OUT_EVERY else "heldout") / image.name)
        _write_labels(made)
    return _checked(out)


def cell_labels() -> dict[str, str]:
    """`whole` or `defective` by file name: an expert's probability of a defect above one half is a defect.

    Raises:
        DataError: the package is not installed.
    """
    path = _data_folder() / "labels.csv"
    rows = [line.split() for line in path.read_text().splitlines()]
    return {
        Path(name).name: "defective" if float(probability) > 0.5 else "whole" for name, probability, _ in rows
    }


def _write_labels(folder: Path) -> None:
    rows = [f"{name},{label}" for name, label in sorted(cell_labels().items())]
    write_durably(folder / LABELS, "\n".join(["file,label", *rows]) + "\n")


def _data_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "the demo set needs the package elpv-dataset, which is not installed: pip install 'fastmim[demo]'"
        )
    return Path(spec.origin).parent / "data"


def _image_folder() -> Path:
    folder = _data_folder() / "images"
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
    if not (out / LABELS).exists():
        _write_labels(out)
    return out
