"""Sets in the IDX format of MNIST (Fashion-MNIST, KMNIST and the like), as .npy arrays that `data.source` takes.

Source: Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits", section on file formats.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from fastmim.data.whole_folder import whole_folder
from fastmim.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's dataset-fashion-mnist puts its files."""
_PARTS = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 8


def prepare_idx(folder: Path, out: Path) -> Path:
    """Make a set of IDX files ready: `out/train.npy` and `out/test.npy`, and the labels of both.

    Images are uint8 [n, H, W, 1], labels (`train_labels.npy`, `test_labels.npy`) int64 [n]. An `out` that holds all
    four already is left as it is.

    Args:
        folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
            `t10k-labels-idx1-ubyte`, or these with `.gz`.
        out: the folder to make.

    Returns:
        `out`.

    Raises:
        DataError: a file is missing, damaged, or does not fit its partner; or `out` is there and lacks an array.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        return _checked(out)
    with whole_folder(out) as made:
        for name, prefix in _PARTS.items():
            images, labels = (
                _find(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
            )
            pixels, classes = read_idx(images, 3), read_idx(labels, 1)
            if len(pixels) != len(classes):
                raise DataError(
                    f"{labels} holds {len(classes)} labels; expected {len(pixels)}, one an image of {images}"
                )
            np.save(made / f"{name}.npy", pixels[..., None])
            np.save(made / f"{name}_labels.npy", classes.astype(np.int64))
    return _checked(out)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, packed by gzip or not; uint8, of so many dimensions.

    Raises:
        DataError: it is damaged, truncated, or holds something else; names the file, got and wanted.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked ({error}); expected a whole .gz file") from None
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, _UNSIGNED_BYTES, dimensions])
    if data[:4] != magic or len(data) < start:
        raise DataError(
            f"{path} begins with {data[:4].hex(' ') or 'nothing'} and has {len(data)} bytes; expected "
            f"{magic.hex(' ')}, an IDX file of unsigned bytes in {dimensions} dimensions"
        )
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    wanted = int(np.prod(shape, dtype=object))
    if len(data) - start != wanted or not wanted:
        raise DataError(
            f"{path} holds {len(data) - start} bytes after its header; expected {wanted}, for {shape}, not empty"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    hint = " (apt install dataset-fashion-mnist)" if folder == FASHION_MNIST else ""
    raise DataError(f"{folder} holds no {name} or {name}.gz; expected a folder of IDX files{hint}")


def _checked(out: Path) -> Path:
    wanted = [f"{part}{kind}.npy" for part in _PARTS for kind in ("", "_labels")]
    missing = [name for name in wanted if not (out / name).is_file()]
    if missing:
        raise DataError(
            f"{out} holds no {missing[0]}; expected {', '.join(wanted)}, or a folder that does not exist yet"
        )
    return out
