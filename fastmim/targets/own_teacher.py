"""A teacher that this engine trained."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.evaluate.encoder import load_encoder
from fastmim.masking import mask_from_order


class OwnTeacher(nn.Module):
    """Gives the features of whole images by the encoder of another run: its class token and its patches.

    Args:
        config: of the run that learns; `target.teacher` is a run, checkpoint directory or weights file.

    Raises:
        CheckpointError: no encoder there.
        ConfigError: it reads other images.
    """

    has_cls = True

    def __init__(self, config: Config):
        super().__init__()
        name = config.target.teacher
        if config.objective.project_teacher:
            raise ConfigError(
                f"objective.project_teacher=True with target.teacher={name!r}, which ends in no linear; expected False"
            )
        self.encoder, teacher = load_encoder(name)
        for key, given, wanted in (
            ("data.image_size", list(config.data.image_size), list(teacher.data.image_size)),
            ("data.channels", config.data.channels, teacher.data.channels),
        ):
            if given != wanted:
                raise ConfigError(
                    f"{key}={given} with target.teacher={name!r}; expected {wanted}, as it was trained"
                )
        self.patches = teacher.grid[0] * teacher.grid[1]

    def forward(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Features of uint8 images [B, H, W, C]: [B, 1 + N, width], computed in `dtype`."""
        self.encoder.to(dtype)
        everything = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        return self.encoder(images, mask_from_order(everything, self.patches))
