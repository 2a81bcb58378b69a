"""Features of a frozen teacher, compared by cosine: CAE v2 (Zhang et al., TMLR 2023)."""

import torch
from torch import Tensor, nn

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.flops import linear_flops
from fastmim.kernels import cosine_align, gather_tokens
from fastmim.models.blocks import LayerNorm, init_weights
from fastmim.models.pixels import PixelScale
from fastmim.targets.frozen import Frozen
from fastmim.targets.head import Head, Prediction
from fastmim.targets.own_teacher import OwnTeacher
from fastmim.targets.teacher import load_teacher, measure


class FeatureHead(Head):
    """A LayerNorm and a linear to a teacher's features, compared by the mean of 1 - cos.

    It reads one row more than there are patches: cls, the first. That row is compared with the teacher's class
    token, and left out where the teacher has none.

    Args:
        config: of the run.
        width: of the features.
        scale: pixel statistics; the teacher has its own.

    Attributes:
        teacher: frozen, in float32, no part of this module's parameters.
        teacher_flops: of one image.

    Raises:
        CheckpointError: `target.teacher_weights` cannot be read, or is of another model.
        ConfigError: no such teacher, or one that does not give a feature for each patch of the run.
    """

    def __init__(self, config: Config, width: int, scale: PixelScale):
        super().__init__()
        # A name of timm comes with weights; a run of this engine holds its own.
        teacher = load_teacher(config) if config.target.teacher_weights else OwnTeacher(config)
        patches = config.grid[0] * config.grid[1]
        given, self.outputs, self.teacher_flops = measure(teacher, config)
        if given != teacher.has_cls + patches:
            raise ConfigError(
                f"target.teacher={config.target.teacher!r} has {given - teacher.has_cls} patches in an image of "
                f"{list(config.data.image_size)}; expected {patches}, the grid of {config.grid[0]} x "
                f"{config.grid[1]} of model.patch_size={config.model.patch_size}"
            )
        self.has_cls = teacher.has_cls
        self.teacher = Frozen(teacher)
        self.norm = LayerNorm(width)
        self.linear = nn.Linear(width, self.outputs)
        init_weights(self.linear)

    def forward(self, x: Tensor, images: Tensor, ids: Tensor) -> Prediction:
        """Compare with the teacher's features.

        Args:
            x: [B, 1 + M, width], cls first.
            images: uint8 [B, H, W, C].
            ids: int64 [B, M], the patches of the other rows.
        """
        if self.has_cls:
            rows = torch.cat([ids.new_zeros(len(ids), 1), ids + 1], dim=1)
        else:
            x, rows = x[:, 1:], ids
        target = gather_tokens(self.teacher(images, x.dtype), rows)
        pred = self.linear(self.norm(x))
        loss, per_row = cosine_align(pred, target)
        return Prediction(loss, per_row[:, self.has_cls :], pred[:, self.has_cls :])

    def frozen(self) -> dict[str, Frozen]:
        """The teacher, by the key that names it."""
        return {"target.teacher": self.teacher}

    def flops(self, patches: int) -> int:
        """Of the linear over this many patches, and cls where it is compared; the teacher has its own count."""
        return linear_flops(self.has_cls + patches, self.linear.in_features, self.outputs)
