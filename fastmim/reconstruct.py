"""Reconstructions: of held-out images while a run goes on, and of any images by a trained run."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.config import Config
from fastmim.data.index import build_index
from fastmim.data.loader import load_images
from fastmim.errors import CheckpointError, ConfigError
from fastmim.models.attention import choose_attention
from fastmim.objectives import build_objective
from fastmim.objectives.mae import MAE
from fastmim.pictures import draw_reconstructions


class Sheet:
    """The same images and masks, reconstructed as often as asked.

    Args:
        images: uint8 [n, H, W, C], on the objective's device.
        config: of the run.
        seed: another seed removes other patches.
    """

    def __init__(self, images: Tensor, config: Config, seed: int = 0):
        self.images, self.config, self.seed = images, config, seed

    def rebuild(self, objective: MAE) -> tuple[Tensor, Tensor]:
        """Removed patches, bool [n, N], and reconstructions, uint8 [n, H, W, C]; under ZeRO-3 all ranks call it."""
        places = torch.arange(len(self.images), device=self.images.device)
        mask = objective.sample_mask(torch.full_like(places, self.seed), places)
        training = objective.training
        rebuilt = objective.eval().reconstruct(self.images, mask)
        objective.train(training)
        return mask.mask, rebuilt

    def draw(self, path: Path, objective: MAE, rebuilt: tuple[Tensor, Tensor], title: str) -> str:
        """Draw what `rebuild` gave, and return the title with what a viewer must know."""
        title = f"{title}, {self.config.mask.ratio:.0%} of the patches removed"
        title = "\n".join(filter(None, (title, objective.note_on_pictures())))
        removed, images = rebuilt
        patch_size = self.config.model.patch_size
        draw_reconstructions(path, self.images.cpu(), removed.cpu(), images.cpu(), patch_size, title)
        return title


def load_objective(checkpoint: str, ema: bool = False) -> tuple[MAE, Config, int]:
    """The trained objective of a run or checkpoint directory, its configuration and its step.

    Raises:
        CheckpointError: no whole checkpoint there, or no averaged weights where `ema` asks for them.
    """
    folder, manifest = manifests.resolve(Path(checkpoint))
    config = recipes.build(manifest["config"])
    weights = folder / (manifests.EMA_WEIGHTS if ema else manifests.WEIGHTS)
    if not weights.exists():
        raise CheckpointError(f"{folder} holds no {weights.name}; it was trained without train.ema_decay")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = build_objective(config, choose_attention("auto", device.type))
    objective.load_state_dict(load_file(weights))
    return objective.to(device).eval(), config, manifest["step"]


def reconstruct_images(
    checkpoint: str, images: str, out: str, count: int = 8, seed: int = 0, ema: bool = False
) -> str:
    """Draw original, masked and reconstructed images.

    Args:
        checkpoint: a run or checkpoint directory.
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
    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ConfigError(f"--out {out}: expected a file whose name ends in .png")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed}: expected 0 to 2**32 - 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    if count < 1:
        raise ConfigError(f"--count {count}: expected at least 1")
    objective, config, step = load_objective(checkpoint, ema)
    index = build_index(images, config.data, progress=False, option="--images")
    originals = load_images(index, config.data, min(count, len(index)))
    sheet = Sheet(originals.to(objective.encoder.cls_token.device), config, seed)
    title = sheet.draw(
        path, objective, sheet.rebuild(objective), f"{Path(checkpoint).resolve().name}, step {step}"
    )
    return f"{path}: {len(originals)} of {len(index)} images; {title}"
