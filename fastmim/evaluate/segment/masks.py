"""Images with a mask each: what belongs together, what the masks hold, and which images are held out."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fastmim.config_data import DataConfig
from fastmim.data.index import Index, build_index
from fastmim.errors import ConfigError, DataError
from fastmim.evaluate.split import split_places
from fastmim.ranks import cores_per_rank

SUFFIX = ".png"
UNLABELLED = -1
"""What a read mask holds where no class is told."""
_MODES = ("L", "P")
_MOST_CLASSES = 256


@dataclass(frozen=True, eq=False)
class MaskReader:
    """Turns the values of mask files into classes.

    Args:
        ignore: value of pixels that have no class.
        reduce_zero_label: 0 has no class either, and value v is class v - 1.
    """

    ignore: int
    reduce_zero_label: bool

    def __call__(self, path: Path) -> np.ndarray:
        """Classes, int16 [H, W], `UNLABELLED` where there is none.

        Raises:
            DataError: no image, or none of one byte a pixel.
        """
        try:
            with Image.open(path) as image:
                if image.mode not in _MODES:
                    raise DataError(
                        f"mask {path} has pixels of mode {image.mode}; expected {' or '.join(_MODES)}"
                    )
                # Of a palette the numbers, not the colours: DALI would give these.
                return self._classes[np.asarray(image)]
        except (UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"mask {path} cannot be read ({error}); expected a PNG image") from error
        except OSError as error:
            # Pillow's own errors, of a truncated file for one, have no strerror.
            raise DataError(f"mask {path} cannot be read ({error.strerror or error})") from error

    @property
    def _classes(self) -> np.ndarray:
        values = np.arange(256, dtype=np.int16) - self.reduce_zero_label
        values[self.ignore] = UNLABELLED
        return values

    def value_of(self, kind: int) -> int:
        """The value in a file of a class."""
        return kind + self.reduce_zero_label


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """Some images of an index, and the mask of each.

    Attributes:
        index: where the images are.
        rows: int64 [n], which of its images.
        paths: masks of all images of the index.
        digests: SHA-256 of their classes.
        read: reads one.
        class_names: of the classes from 0.
    """

    index: Index
    rows: np.ndarray
    paths: list[Path]
    digests: list[str]
    read: MaskReader
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray | slice) -> "MaskedImages":
        """The images at some places."""
        return replace(self, rows=self.rows[places])

    def described(self) -> dict[str, Any]:
        """What eval.json tells of them."""
        return {"images": len(self), "classes": len(self.class_names), "sha256": self.fingerprint()}

    def fingerprint(self) -> str:
        """SHA-256 of the index's fingerprint, the rows, the masks' classes and the names of the classes."""
        digest = hashlib.sha256(
            "\0".join((self.index.fingerprint, *self.class_names)).encode("utf-8", "replace")
        )
        digest.update(np.ascontiguousarray(self.rows, "<i8").data)
        digest.update("".join(self.digests[row] for row in self.rows.tolist()).encode())
        return digest.hexdigest()

    def hold_out(self, share: float, seed: int) -> tuple["MaskedImages", "MaskedImages"]:
        """What stays, and a random share that is held out, rounded, at least one image.

        Raises:
            DataError: none would stay.
        """
        kept, held = split_places(len(self), share, seed)
        return self.take(kept), self.take(held)


def read_masked(
    source: str, masks: str, config: DataConfig, read: MaskReader, option: str, names: tuple[str, ...] | None
) -> MaskedImages:
    """All images of a folder, each with the mask of the same relative name; every mask is read once.

    Args:
        source: folder of images.
        masks: folder of PNG masks, one byte a pixel.
        config: how the images are read.
        read: what their values mean.
        option: what `source` was given as, for messages.
        names: of the classes; None numbers them up to the highest that is there.

    Raises:
        DataError: an image that cannot be used or has no mask, a mask of another size or kind, or a value that is no
            class.
    """
    index = build_index(source, config, progress=False, option=option)
    if index.kind != "folder":
        raise DataError(f"{option} {source} is a {index.kind} source; expected a folder of images, for masks")
    index.require_all(f"{option} {source}")
    folder = Path(masks)
    if not folder.is_dir():
        raise DataError(f"masks {masks!r} of {option} is no folder; expected one of PNG masks")
    relative = (Path(os.fsdecode(name)).with_suffix(SUFFIX) for name in index.names)
    paths = [folder / name for name in relative]
    seen: dict[Path, int] = {}
    for row, path in enumerate(paths):
        if seen.setdefault(path, row) != row:
            raise DataError(f"{index.name(seen[path])} and {index.name(row)} both have the mask {path}")
        if not path.is_file():
            raise DataError(f"{index.name(row)} has no mask; expected {path}")
    surveyed = _in_threads(lambda row: _survey(index, row, paths[row], read), len(paths), f"read {masks}")
    highest = max(most for _, most in surveyed)
    if highest < 0:
        raise DataError(f"{masks} holds no labelled pixel; every value is ignored")
    if names is None:
        names = tuple(str(read.value_of(kind)) for kind in range(highest + 1))
    if highest >= len(names):
        row = next(row for row, (_, most) in enumerate(surveyed) if most >= len(names))
        value, last = read.value_of(surveyed[row][1]), read.value_of(len(names) - 1)
        raise DataError(
            f"mask {paths[row]} holds value {value}; expected at most {last}, the last of {len(names)} classes, or "
            f"ignore={read.ignore}"
        )
    return MaskedImages(index, np.arange(len(index)), paths, [digest for digest, _ in surveyed], read, names)


def read_names(path: str) -> tuple[str, ...]:
    """Names of classes, one a line, of a text file.

    Raises:
        ConfigError: fewer than two, or an empty or repeated one.
    """
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"names={path!r} cannot be read as text ({error.reason})") from error
    for number, name in enumerate(names, 1):
        if not name.strip() or name in names[: number - 1]:
            raise ConfigError(f"names={path!r}, line {number}: {name!r}; expected a name of its own a line")
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise ConfigError(f"names={path!r} holds {len(names)} lines; expected 2 to {_MOST_CLASSES} classes")
    return tuple(names)


def _survey(index: Index, row: int, path: Path, read: MaskReader) -> tuple[str, int]:
    """SHA-256 of a mask's classes, and the highest, -1 without any."""
    classes = read(path)
    wanted = int(index.heights[row]), int(index.widths[row])
    if classes.shape != wanted:
        raise DataError(
            f"mask {path} is {classes.shape[0]}x{classes.shape[1]} pixels; expected {wanted[0]}x{wanted[1]}, as "
            f"{index.name(row)} is"
        )
    labelled = classes[classes != UNLABELLED]
    digest = hashlib.sha256(np.ascontiguousarray(classes).data).hexdigest()
    return digest, int(labelled.max()) if labelled.size else -1


def _in_threads(work: Callable[[int], tuple[str, int]], count: int, title: str) -> list[tuple[str, int]]:
    # Pillow decodes and hashlib hashes without the interpreter's lock.
    with ThreadPoolExecutor(cores_per_rank()) as pool:
        return list(tqdm(pool.map(work, range(count)), title, count, leave=False, disable=None))
