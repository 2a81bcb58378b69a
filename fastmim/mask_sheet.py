"""A sheet of the masks that a configuration draws."""

import torch

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.masking import MaskSampler
from fastmim.pictures import check_png, draw_masks


def draw_mask_sheet(config: Config, out: str, count: int) -> str:
    """Draw the masks of the first `count` samples of epoch 0.

    Args:
        config: `mask`, `train.seed` and the patch grid are read.
        out: PNG to write.
        count: how many.

    Returns:
        What was drawn, for a person.

    Raises:
        ConfigError: an `out` that is no PNG, or no masks to draw.
    """
    path = check_png(out)
    if count < 1:
        raise ConfigError(f"--count {count}: expected at least 1")
    places = torch.arange(count)
    mask = MaskSampler(config)(torch.zeros_like(places), places).mask
    rows, columns = config.grid
    removed = int(mask[0].sum())
    title = f"{config.mask.strategy}: {removed} of {rows} x {columns} patches removed"
    draw_masks(path, mask.view(count, rows, columns), title)
    return f"{path}: {count} masks; {title}"
