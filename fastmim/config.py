"""The configuration of a run: schema, ranges and cross-field rules. Imports no torch: a check is quick.

Every section is frozen and refuses unknown keys. `fastmim.recipes.load` turns a recipe and `key=value`
overrides into a `Config`.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from fastmim.config_data import DataConfig
from fastmim.config_mask import MaskConfig
from fastmim.config_objective import (
    DVAE_STRIDE,
    REBUILDING,
    TARGETS,
    MAEConfig,
    ObjectiveConfig,
    TargetConfig,
    TargetKind,
)
from fastmim.config_training import CheckpointConfig, LogConfig, OptimConfig, TrainConfig
from fastmim.deepspeed_fragment import check_fragment
from fastmim.errors import ConfigError
from fastmim.schema import Positive, Section, fill, require_heads

MODEL_SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class ModelConfig(Section):
    """The encoder: a ViT of timm blocks that sees visible patches only."""

    size: Literal["tiny", "small", "base", "large", "huge"] | None = "base"
    """Preset for width, depth and heads; null when all three are given."""
    width: Positive = Field(default=None)  # type: ignore[assignment]
    """Token dimension; from `size` unless given."""
    depth: Positive = Field(default=None)  # type: ignore[assignment]
    """Number of blocks; from `size` unless given."""
    heads: Positive = Field(default=None)  # type: ignore[assignment]
    """Attention heads per block; from `size` unless given."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of a block's MLP over `width`."""
    patch_size: int = Field(16, gt=0)
    """Side of a square patch in pixels."""
    positions: Literal["sincos", "learned"] = "sincos"
    """The encoder's position table: fixed (MAE, appendix A.1), or parameters, as most ViTs elsewhere have. Decoders'
    tables are fixed."""
    positions_grid: tuple[Positive, Positive] | None = None
    """Patches per column and row that the fixed tables are computed for, then resized to those of an image; null is
    those of an image. Weights that were trained on images of another size want the grid that they saw."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate of the last block, rising linearly from 0."""
    init: str | None = None
    """Weights to start from: a run, a file of `fastmim import` or `export`, or another library's (docs/exchange.md)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        size = values.get("size", "base")
        if size is None:
            missing = [key for key in ("width", "depth", "heads") if values.get(key) is None]
            if missing:
                raise ValueError(f"model.size=None needs model.{', model.'.join(missing)}")
            return values
        # An unknown size is reported once, by its own field.
        preset = MODEL_SIZES.get(str(size), MODEL_SIZES["base"])
        return fill(values, dict(zip(("width", "depth", "heads"), preset, strict=True)))

    @model_validator(mode="after")
    def _heads_divide_width(self):
        require_heads("model", self.width, self.heads)
        return self


class Config(Section):
    """A whole run."""

    output: str = "runs/fastmim"
    """Folder of checkpoints, logs and pictures."""
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    objective: ObjectiveConfig = MAEConfig()
    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed config fragment: ZeRO stage, offload, communication. One rank goes without ZeRO 1 and 2, unless they
    offload or the precision is fp16: it has nothing to shard."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image."""
        height, width = self.data.image_size
        return height // self.model.patch_size, width // self.model.patch_size

    @property
    def positions_grid(self) -> tuple[int, int]:
        """The grid that fixed position tables are computed for."""
        return self.model.positions_grid or self.grid

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 unless the fragment sets one."""
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    def micro_batch(self, world_size: int) -> int:
        """Images per rank and backward pass.

        Raises:
            ConfigError: when `optim.batch_size` does not divide evenly.
        """
        parts = world_size * self.optim.accumulation
        if self.optim.batch_size % parts:
            raise ConfigError(
                f"optim.batch_size={self.optim.batch_size}; expected a multiple of {parts} "
                f"({world_size} ranks x optim.accumulation={self.optim.accumulation})"
            )
        micro_batch = self.optim.batch_size // parts
        if micro_batch % self.mask.repeats:
            raise ConfigError(
                f"mask.repeats={self.mask.repeats}; expected a divisor of the {micro_batch} images of a rank's "
                "backward pass"
            )
        return micro_batch

    @model_validator(mode="after")
    def _patches_fit(self):
        if self.objective.name == "dvae":  # has no patches
            return self
        patch = self.model.patch_size
        height, width = self.data.image_size
        if height % patch or width % patch:
            raise ValueError(
                f"data.image_size=[{height}, {width}]; expected multiples of model.patch_size={patch}"
            )
        self.mask.check_grid(self.grid)
        if self.model.width % 4:
            raise ValueError(
                f"model.width={self.model.width}; expected a multiple of 4 (2-d sin-cos positions)"
            )
        return self

    @model_validator(mode="after")
    def _crops_differ(self):
        if self.mask.repeat_crops and self.data.crop == "center_crop":
            raise ValueError(
                "mask.repeat_crops=true with data.crop='center_crop', which is one crop; expected "
                "'random_resized_crop'"
            )
        return self

    @property
    def target_kind(self) -> TargetKind | None:
        """What is predicted; None where the objective has no choice."""
        own = TARGETS[self.objective.name]
        return self.target.kind or (own[0] if own else None)

    @property
    def draws_pictures(self) -> bool:
        """Whether the objective rebuilds images."""
        return self.objective.name in REBUILDING and self.target_kind in ("pixels", "pca", None)

    @model_validator(mode="after")
    def _tokens_fit(self):
        if self.objective.name != "dvae":
            return self
        height, width = self.data.image_size
        if height % DVAE_STRIDE or width % DVAE_STRIDE:
            raise ValueError(
                f"data.image_size=[{height}, {width}]; expected multiples of {DVAE_STRIDE}, the pixels of a token of "
                "objective.name='dvae'"
            )
        if self.model.init is not None:
            raise ValueError(
                f"model.init={self.model.init!r} with objective.name='dvae', which has no ViT; expected null"
            )
        return self

    @model_validator(mode="after")
    def _components_fit(self):
        values = self.model.patch_size**2 * self.data.channels
        if self.target_kind == "pca" and self.target.components > values:
            raise ValueError(
                f"target.components={self.target.components}; expected at most the {values} values of a patch"
            )
        return self

    @model_validator(mode="after")
    def _target_fits(self):
        name, target, accepted = self.objective.name, self.target, TARGETS[self.objective.name]
        if target.kind is not None and target.kind not in accepted:
            names = ", ".join(accepted) or "null"
            wanted = f"one of {names}" if len(accepted) > 1 else names
            raise ValueError(f"target.kind={target.kind!r} with objective.name={name!r}; expected {wanted}")
        owners = {"tokenizer": "tokens", "teacher": "features", "teacher_weights": "features"}
        for key, kind in owners.items():
            given = getattr(target, key) is not None
            if given and self.target_kind != kind:
                raise ValueError(
                    f"target.{key} with target.kind={self.target_kind!r}; expected target.kind={kind!r}"
                )
            if not given and self.target_kind == kind and key != "teacher_weights":
                raise ValueError(
                    f"target.{key} is not set; objective.name={name!r} predicts {kind} and needs it"
                )
        if self.log.reconstruct_every_steps and not self.draws_pictures:
            raise ValueError(
                f"log.reconstruct_every_steps={self.log.reconstruct_every_steps} with objective.name={name!r} and "
                f"target.kind={self.target_kind!r}, which predicts no pixels; expected null"
            )
        return self

    @model_validator(mode="after")
    def _predicted_part_fits(self):
        share = getattr(self.objective, "kept_mask_ratio", None)
        if share is not None and share > self.mask.ratio:
            raise ValueError(
                f"objective.kept_mask_ratio={share:g}; expected at most mask.ratio={self.mask.ratio:g}: only removed "
                "patches are predicted"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_fits(self):
        check_fragment(self.deepspeed)
        if self.train.compile and self.zero_stage == 3:
            raise ValueError(
                "train.compile=true with deepspeed.zero_optimization.stage=3; expected stage 0, 1 or 2"
            )
        return self

    def require_source(self) -> str:
        """`data.source`, which a run cannot do without."""
        if self.data.source is None:
            raise ConfigError(
                "data.source is not set; expected a folder of images, tar shards or an .npy file "
                "(add data.source=PATH)"
            )
        return self.data.source
