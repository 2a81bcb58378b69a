"""Reconstructions of any images by a trained run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastmim import manifest as manifests
from fastmim import recipes
from fastmim.checkpoint import EMA_WEIGHTS, WEIGHTS
from fastmim.config import Config
from fastmim.data.index import build_index
from fastmim.data.loader import load_images
from fastmim.errors import CheckpointError
from fastmim.models.attention import choose_attention
from fastmim.objectives import build_objective
from fastmim.pictures import draw_reconstructions


def load_objective(checkpoint: str, ema: bool = False) -> tuple[Any, Config, int]:
    """The trained objective of a run or checkpoint directory, its configuration and its step.

    Raises:
        CheckpointError: no whole checkpoint there, or no averaged weights where `ema` asks for them.
    """
    folder, manifest = manifests.resolve(Path(checkpoint))
    config = recipes.build(manifest["config"])
    weights = folder / (EMA_WEIGHTS if ema else WEIGHTS)
    if not weights.exists():
        raise CheckpointError(f"{folder} holds no {weights.name}; it was trained without train.ema_decay")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = build_objective(config, choose_attention(config.train.attention, device.type))
    objective.load_state_dict(load_file(weights))
    return objective.to(device).eval(), config, manifest["step"]


def reconstruct_images(
    checkpoint: str, images: str, out: str, count: int = 8, seed: int = 0, ema: bool = False
) -> list[str]:
    """Draw original, masked and reconstructed images.

    Args:
        checkpoint: a run or checkpoint directory.
        images: a source of images, like `data.source`.
        out: PNG to write.
        count: how many, from the first of the source.
        seed: another seed removes other patches.
        ema: use the averaged weights.

    Returns:
        Lines that say what was drawn.
    """
    objective, config, step = load_objective(checkpoint, ema)
    index = build_index(images, config.data, progress=False)
    originals = load_images(index, config.data, min(count, len(index)))
    device = objective.encoder.cls_token.device
    places = torch.arange(len(originals), device=device)
    mask = objective.sample_mask(torch.full_like(places, seed), places)
    rebuilt = objective.reconstruct(originals.to(device), mask)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = objective.note_on_pictures()
    title = f"{Path(checkpoint).name}, step {step}, {config.mask.ratio:.0%} of the patches removed"
    draw_reconstructions(
        path, originals, mask.mask.cpu(), rebuilt.cpu(), config.model.patch_size, f"{title}\n{note}".strip()
    )
    lines = [f"{path}: {len(originals)} of {len(index)} images; {title}"]
    return lines + ([note] if note else [])
