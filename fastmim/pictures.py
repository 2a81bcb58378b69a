"""The pictures a run leaves: reconstructions and the loss curve."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastmim.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKED = 225  # lighter than most of a photograph, so that holes are seen as holes


def draw_reconstructions(
    path: Path, originals: Tensor, removed: Tensor, reconstructions: Tensor, patch_size: int, title: str = ""
) -> None:
    """Draw a row per image: original, masked where a patch of any was removed, reconstruction.

    Args:
        path: PNG to write.
        originals, reconstructions: uint8 [n, H, W, C] on the CPU; one channel is grey, the first three colours.
        removed: bool [n, N], true where a patch was removed.
        patch_size: side of a patch in pixels.
        title: line above the picture.
    """
    n, height, width, _ = originals.shape
    columns = {"original": originals}
    if removed.any():
        hidden = removed.view(n, height // patch_size, width // patch_size)
        hidden = hidden.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
        columns["masked"] = originals.masked_fill(hidden[..., None], MASKED)
    columns["reconstruction"] = reconstructions
    # Two pictures a row: a sheet of eight stays on a screen.
    pairs = 2 if n > 1 else 1
    rows = -(-n // pairs)
    cell = 1.7
    figure = _figure(len(columns) * pairs * cell * width / height, rows * cell + 0.5)
    axes = figure.subplots(rows, len(columns) * pairs, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(n):
        row, left = divmod(i, pairs)
        for offset, (name, images) in enumerate(columns.items()):
            axis = axes[row, len(columns) * left + offset]
            axis.imshow(
                _displayable(images[i].numpy()), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
            )
            if row == 0:
                axis.set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=9)
    _save(figure, path)


def draw_masks(path: Path, masks: Tensor, title: str) -> None:
    """Draw masks side by side, removed patches dark.

    Args:
        path: PNG to write.
        masks: bool [n, rows, columns] on the CPU, true where a patch is removed.
        title: line above the picture.
    """
    columns = min(8, len(masks))
    rows = -(-len(masks) // columns)
    figure = _figure(1.2 * columns, 1.2 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, mask in zip(axes.flat, masks, strict=False):
        axis.imshow(~mask.numpy(), cmap="gray", vmin=-0.3, vmax=1.1)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def draw_loss(path: Path, records: list[dict[str, Any]]) -> None:
    """Draw loss against epochs, with the learning rate, from the records of a metrics.jsonl."""
    records = [record for record in records if np.isfinite(record.get("loss") or np.nan)]
    figure = _figure(7, 4)
    axis = figure.subplots()
    epochs = [record["epoch"] for record in records]
    axis.plot(epochs, [record["loss"] for record in records], color="tab:blue")
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss", color="tab:blue")
    axis.grid(alpha=0.3)
    other = axis.twinx()
    other.plot(epochs, [record["lr"] for record in records], color="tab:orange", linewidth=1)
    other.set_ylabel("learning rate", color="tab:orange")
    _save(figure, path)


def check_png(out: str) -> Path:
    """The path of a PNG to write, its folder made; ConfigError for another kind of file."""
    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ConfigError(f"--out {out}: expected a file whose name ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _displayable(image: np.ndarray) -> np.ndarray:
    channels = image.shape[-1]
    return image[..., 0] if channels < 3 else image[..., :3]


def _figure(width: float, height: float) -> "Figure":
    """An empty one of so many inches, in no window's care."""
    from matplotlib.figure import Figure  # a second of every rank's start, and only the first draws

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
