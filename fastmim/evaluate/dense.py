"""An encoder as the backbone of dense prediction: feature maps of images of any size."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.kernels import gather_patches
from fastmim.models import Encoder
from fastmim.models.blocks import Block, add_mlp, drop_path_rates
from fastmim.models.position import resize_positions, sincos_positions
from fastmim.models.recompute import recompute

SCALES = 4


def even_blocks(depth: int, maps: int = SCALES) -> list[int]:
    """Blocks that divide an encoder's depth evenly, counted from 1; the last block is the last of them."""
    return [-(-depth * place // maps) for place in range(1, maps + 1)]


class DenseEncoder(nn.Module):
    """A ViT that sees every patch and returns what some of its blocks make, as maps.

    Positions of another grid than the encoder was trained on are its own table, resized bicubically: places over the
    whole image, as pre-training saw them, rather than new ones beyond its edge.

    With `window`, blocks attend within windows of `window` x `window` patches but for the global ones, and there is
    no cls token, as in ViTDet (Li et al., ECCV 2022, section 3); windows over the right and lower edge are filled up
    with zeros, which are attended to.

    Args:
        encoder: trained; its parameters are shared, not copied.
        config: that the encoder was built with.
        blocks: whose outputs are returned, ascending, counted from 1; four that divide the depth evenly unless given.
        normalised: maps go through the encoder's last norm, which outputs of the last block are trained for.
        trainable: gradients flow into the encoder. Without, it stays in evaluation mode. What has no part in the
            maps gets none either way.
        drop_path: stochastic depth rate of the last block, rising linearly from 0; None leaves that of `config`.
        window: side of a window in patches; None attends globally everywhere.
        global_blocks: those that attend globally where there are windows, counted from 1; `even_blocks` unless given.

    Attributes:
        width: channels of a map.
        patch_size: pixels of an image per element of a map.
        blocks: as given, or chosen.

    Raises:
        ConfigError: blocks that the encoder does not have, or global ones without windows.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: Config,
        *,
        blocks: Sequence[int] | None = None,
        normalised: bool = False,
        trainable: bool = True,
        drop_path: float | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
    ):
        super().__init__()
        depth = config.model.depth
        if window is None and global_blocks is not None:
            raise ConfigError(
                f"global_blocks={list(global_blocks)} without a window; expected both or neither"
            )
        self.encoder, self._grid, self._channels = encoder, config.grid, config.data.channels
        table = None
        if config.model.positions == "sincos" and config.positions_grid != config.grid:
            # The encoder's own is resized already.
            self._grid = config.positions_grid
            table = sincos_positions(config.model.width, self._grid).to(encoder.pos_embed.device)
        self.register_buffer("_positions", table, persistent=False)
        self.width, self.patch_size = config.model.width, encoder.patch_size
        self.normalised, self.trainable, self.window = normalised, trainable, window
        self.blocks = _checked("blocks", blocks, depth)
        self._global = frozenset(_checked("global_blocks", global_blocks, depth))
        if drop_path is not None:
            rates = drop_path_rates(drop_path, depth)
            for block, rate in zip(encoder.blocks.layers, rates, strict=True):
                block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        self._set_gradients()
        self.train(self.training)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of whole images.

        Args:
            images: uint8 [B, H, W, C]; H and W are multiples of the patch size.

        Returns:
            [B, D, H / P, W / P] for each of `blocks`.

        Raises:
            ConfigError: another size or number of channels.
        """
        height, width, channels = images.shape[1:]
        if height % self.patch_size or width % self.patch_size or channels != self._channels:
            raise ConfigError(
                f"images of {height}x{width} pixels and {channels} channels; expected multiples of "
                f"{self.patch_size}, the patch size, and {self._channels} channels"
            )
        grid = height // self.patch_size, width // self.patch_size
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            x = self._embed(images, grid)
            maps: list[Tensor] = []
            for number, block in enumerate(self.encoder.blocks.layers[: self.blocks[-1]], 1):
                x = self._run(number, block, x, grid)
                maps += [self._map(x, grid)] * self.blocks.count(number)
        return maps

    def train(self, mode: bool = True) -> "DenseEncoder":
        """As a module's; an encoder that is not trained stays in evaluation mode."""
        super().train(mode)
        if not self.trainable:
            self.encoder.eval()
        return self

    def _set_gradients(self) -> None:
        encoder = self.encoder.requires_grad_(self.trainable)
        idle: list[nn.Module | Tensor] = [*encoder.blocks.layers[self.blocks[-1] :]]
        idle += [] if encoder.mask_token is None else [encoder.mask_token]
        idle += [] if self.normalised else [encoder.norm]
        idle += [] if self.window is None else [encoder.cls_token]
        for part in idle:
            part.requires_grad_(False)

    def _embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, D], after a cls token where nothing is windowed."""
        encoder, batch = self.encoder, len(images)
        everything = torch.arange(grid[0] * grid[1], device=images.device).expand(batch, -1)
        dtype, scale = encoder.patch_embed.weight.dtype, encoder.scale
        patches = gather_patches(images, everything, self.patch_size, scale.mean, scale.std, dtype)
        table = encoder.pos_embed if self._positions is None else self._positions
        positions = resize_positions(table, self._grid, grid).to(dtype)
        x = encoder.patch_embed(patches) + positions[:, 1:]
        if self.window is not None:
            return x
        return torch.cat([(encoder.cls_token + positions[:, :1]).expand(batch, -1, -1).to(x.dtype), x], dim=1)

    def _run(self, number: int, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        assert isinstance(block, Block)
        window = self.window if number not in self._global else None
        attend = functools.partial(_attend_and_add, block, grid, window)
        return recompute(attend, x) if self.encoder.blocks.checkpointing else attend(x)

    def _map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.encoder.norm(x) if self.normalised else x
        return x[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def _checked(key: str, blocks: Sequence[int] | None, depth: int) -> list[int]:
    chosen = even_blocks(depth) if blocks is None else list(blocks)
    if not chosen or min(chosen) < 1 or max(chosen) > depth or chosen != sorted(chosen):
        raise ConfigError(
            f"{key}={chosen}; expected ascending numbers from 1 to {depth}, the encoder's depth"
        )
    return chosen


def _attend_and_add(block: Block, grid: tuple[int, int], window: int | None, x: Tensor) -> Tensor:
    """The output of a block, [B, N, D], which attends within windows where there are any."""
    if window is None:
        return block.closed(x)
    normed, x = block.norm1(x)
    branch = _join_windows(block.attn(_split_windows(normed, grid, window)), grid, window)
    return add_mlp(x, block.drop_path1(branch), block.norm2, block.mlp, block.drop_path2)


def _split_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Tokens [B, N, D] -> [B * windows, window * window, D], with zeros past the edge."""
    rows, columns = (-(-side // window) for side in grid)
    x = x.unflatten(1, grid)
    x = F.pad(x, (0, 0, 0, columns * window - grid[1], 0, rows * window - grid[0]))
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window))  # [B, R, w, C, w, D]
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _join_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `_split_windows`."""
    rows, columns = (-(-side // window) for side in grid)
    x = x.unflatten(0, (-1, rows, columns)).unflatten(3, (window, window))  # [B, R, C, w, w, D]
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]].flatten(1, 2)
