"""Reconstructions: of held-out images while a run goes on, and of any images by a trained run."""

from pathlib import Path

import torch
from torch import Tensor

from fastmim.config import Config
from fastmim.data.index import Index, build_index
from fastmim.data.loader import load_images
from fastmim.data.shared import open_index
from fastmim.errors import CheckpointError, ConfigError
from fastmim.exchange.weights import read_weights
from fastmim.models.attention import choose_attention
from fastmim.objectives import Trainable, build_objective
from fastmim.pictures import check_png, draw_reconstructions
from fastmim.ranks import Ranks


class Sheet:
    """The same images and masks, reconstructed as often as asked.

    Args:
        images: uint8 [n, H, W, C], on the objective's device.
        config: of the run.
        seed: another seed removes other patches.
    """

    def __init__(self, images: Tensor, config: Config, seed: int = 0):
        self.images, self.config, self.seed = images, config, seed

    def rebuild(self, objective: Trainable) -> tuple[Tensor, Tensor]:
        """Removed patches, bool [n, N], and reconstructions, uint8 [n, H, W, C]; under ZeRO-3 all ranks call it."""
        places = torch.arange(len(self.images), device=self.images.device)
        mask = objective.sample_mask(torch.full_like(places, self.seed), places)
        training = objective.training
        rebuilt = objective.eval().reconstruct(self.images, mask)
        objective.train(training)
        return mask.mask, rebuilt

    def draw(self, path: Path, objective: Trainable, rebuilt: tuple[Tensor, Tensor], title: str) -> str:
        """Draw what `rebuild` gave, and return the title with what a viewer must know."""
        removed, images = rebuilt
        if removed.any():
            title = f"{title}, {removed.float().mean():.0%} of the patches removed"
        title = "\n".join(filter(None, (title, objective.note_on_pictures())))
        patch_size = self.config.model.patch_size
        draw_reconstructions(path, self.images.cpu(), removed.cpu(), images.cpu(), patch_size, title)
        return title


def open_sheet(config: Config, ranks: Ranks, index: Index) -> Sheet:
    """The sheet of a run: `log.images`, or the first training images, read at once.

    A bad one is then not found out hours into the run.
    """
    if config.log.images:
        index = open_index(config.log.images, config.data, ranks, "log.images")
    images = load_images(index, config.data, min(config.log.n_images, len(index)))
    return Sheet(images.to(ranks.device), config)


def load_objective(checkpoint: str, ema: bool = False) -> tuple[Trainable, Config, str | None]:
    """The trained objective of a run, checkpoint directory or weights file, its configuration and its step if known.

    Raises:
        CheckpointError: no whole weights there, or no averaged ones where `ema` asks for them.
    """
    weights = read_weights(checkpoint, ema)
    config = weights.config
    if not config.draws_pictures:
        raise CheckpointError(
            f"{checkpoint} was trained with objective.name={config.objective.name!r} and target.kind="
            f"{config.target_kind!r}, which predicts no pixels"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = build_objective(config, choose_attention("auto", device.type))
    missing = objective.state_dict().keys() - weights.tensors.keys()
    if missing:
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} tensors such as {min(missing)}; expected a decoder beside the encoder"
        )
    objective.load_state_dict(weights.tensors)
    return objective.to(device).eval(), config, weights.history.get("step")


def reconstruct_images(
    checkpoint: str, images: str, out: str, count: int = 8, seed: int = 0, ema: bool = False
) -> str:
    """Draw original, masked and reconstructed images.

    Args:
        checkpoint: a run, a checkpoint directory or a weights file.
        images: a source of images, like `data.source`.
        out: PNG to write.
        count: how many, from the first of the source.
        seed: another seed removes other patches.
        ema: use the averaged weights.

    Returns:
        What was drawn, for a person.

    Raises:
        FastmimError: a checkpoint or source that cannot be used, or an `out` that is no PNG.
    """
    path = check_png(out)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed}: expected 0 to 2**32 - 1")
    if count < 1:
        raise ConfigError(f"--count {count}: expected at least 1")
    objective, config, step = load_objective(checkpoint, ema)
    index = build_index(images, config.data, progress=False, option="--images")
    originals = load_images(index, config.data, min(count, len(index)))
    sheet = Sheet(originals.to(next(objective.parameters()).device), config, seed)
    name = Path(checkpoint).resolve().name
    title = name if step is None else f"{name}, step {step}"
    title = sheet.draw(path, objective, sheet.rebuild(objective), title)
    return f"{path}: {len(originals)} of {len(index)} images; {title}"
