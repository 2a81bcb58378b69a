"""The configuration of a run: schema, ranges and cross-field rules. Imports no torch: a check is quick.

Every section is frozen and refuses unknown keys. `fastmim.recipes.load` turns a recipe and `key=value`
overrides into a `Config`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastmim.deepspeed_fragment import check_fragment
from fastmim.errors import ConfigError
from fastmim.schema import Fraction, HeightWidth, PerChannel, Positive, Section, require_heads

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
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate of the last block, rising linearly from 0."""

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
        width, depth, heads = MODEL_SIZES.get(str(size), MODEL_SIZES["base"])
        return {"width": width, "depth": depth, "heads": heads, **values}

    @model_validator(mode="after")
    def _heads_divide_width(self):
        require_heads("model", self.width, self.heads)
        return self


class MaskConfig(Section):
    """Which patches are removed."""

    ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches removed; `len_keep = int(N * (1 - ratio))` (MAE, section 3)."""


class MAEConfig(Section):
    """The masked autoencoder (He et al., CVPR 2022)."""

    name: Literal["mae"] = "mae"
    norm_pix_loss: bool = True
    """Predict each patch normalised by its own mean and (unbiased) variance."""
    decoder_width: int = Field(512, gt=0)
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self):
        require_heads("objective.decoder", self.decoder_width, self.decoder_heads, joiner="_")
        return self


class ColorJitter(Section):
    """Strengths of a random colour change, as in torchvision's ColorJitter; each 0 changes nothing."""

    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.0, ge=0, le=0.5)


class DataConfig(Section):
    """Where the images are and how they become uint8 tensors."""

    source: str | None = None
    """An image folder, a tar shard or a glob of shards, or an .npy uint8 array [n, H, W] or [n, H, W, C]."""
    image_size: HeightWidth = (224, 224)
    """Height and width in pixels of what the model sees."""
    channels: int = Field(3, gt=0)
    mean: PerChannel = Field(default=None)  # type: ignore[assignment]
    """Per channel, in units where white is 1; ImageNet's for 3 channels, else 0.5, unless given."""
    std: PerChannel = Field(default=None)  # type: ignore[assignment]
    """Likewise; ImageNet's for 3 channels, else 0.25, unless given."""
    crop: Literal["random_resized_crop", "center_crop"] = "random_resized_crop"
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop over the image's area, lowest and highest."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: ColorJitter | None = None
    samples_per_epoch: Positive | None = None
    """Images that make an epoch; the size of the set unless given."""
    max_bad_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of distinct images that may fail to decode before the run aborts."""
    max_pixels: int = Field(178_956_970, gt=0)
    """Images of more pixels than this are left out by the index."""
    max_file_bytes: int = Field(256 * 2**20, gt=0)
    """Files larger than this are left out by the index."""
    threads: Positive | None = None
    """Decoding threads per rank; the machine's cores over its ranks unless given."""
    prefetch: int = Field(2, gt=0)
    """Batches decoded ahead."""

    @model_validator(mode="before")
    @classmethod
    def _fill_statistics(cls, values: Any) -> Any:
        channels = values.get("channels", 3) if isinstance(values, dict) else None
        if not isinstance(channels, int) or channels < 1:
            return values
        of_imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        return {
            **(of_imagenet if channels == 3 else {"mean": [0.5] * channels, "std": [0.25] * channels}),
            **values,
        }

    @model_validator(mode="after")
    def _consistent(self):
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) != self.channels:
                raise ValueError(
                    f"data.{key} has {len(values)} values; expected data.channels={self.channels}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"data.std={self.std}; expected values above 0")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.scale={list(self.scale)}; expected 0 < lowest <= highest <= 1")
        low, high = self.aspect
        if not 0 < low <= high:
            raise ValueError(f"data.aspect={list(self.aspect)}; expected 0 < lowest <= highest")
        if self.color_jitter is not None and self.channels not in (1, 3):
            raise ValueError(
                f"data.color_jitter with data.channels={self.channels}; expected 1 or 3 channels"
            )
        return self


class OptimConfig(Section):
    """AdamW with a per-iteration cosine schedule."""

    batch_size: int = Field(4096, gt=0)
    """Images per optimiser step over all ranks and accumulation steps."""
    accumulation: int = Field(1, gt=0)
    """Backward passes per optimiser step."""
    blr: float = Field(1.5e-4, gt=0)
    """Base learning rate per 256 images; lr = blr x batch_size / 256."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    epochs: float = Field(800, gt=0)
    warmup_epochs: float = Field(40, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to 1-d parameters and tokens."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest gradient norm; null does not clip."""

    @property
    def lr(self) -> float:
        """Peak learning rate (MAE, appendix A.1: linear scaling rule)."""
        return self.blr * self.batch_size / 256

    @model_validator(mode="after")
    def _schedule_fits(self):
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.warmup_epochs:g}; expected less than optim.epochs={self.epochs:g}"
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr:g}; expected at most the peak learning rate {self.lr:g}"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"optim.batch_size={self.batch_size}; expected a multiple of "
                f"optim.accumulation={self.accumulation}"
            )
        return self


class TrainConfig(Section):
    """How the steps are computed."""

    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto is bf16 where the hardware computes it, else fp32."""
    attention: Literal["auto", "xformers", "sdpa", "matmul"] = "auto"
    """auto is xformers' memory-efficient attention on CUDA, PyTorch's elsewhere, plain products for bf16 on a CPU."""
    compile: bool = False
    """`torch.compile` each transformer block; ZeRO stages 0-2."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing it."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights; null keeps none."""
    max_skipped_in_a_row: int = Field(20, gt=0)
    """Steps with a non-finite gradient that may follow each other before the run aborts."""
    max_steps: Positive | None = None
    """Stop after this many steps of the schedule, which stays as `optim.epochs` says."""
    profile: bool = False
    """Write a torch profiler trace of a few steps."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense peak of one device at this precision, for MFU; known GPUs need none."""


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    every_steps: Positive | None = None
    every_minutes: float | None = Field(30, gt=0)
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept."""


class LogConfig(Section):
    """What a run tells while it goes on."""

    every_steps: int = Field(20, gt=0)
    tensorboard: bool = True
    wandb: bool = False
    reconstruct_every_steps: Positive | None = None
    """Draw reconstructions this often, and at the end; null draws none."""
    images: str | None = None
    """Held-out images to reconstruct, a source like data.source; null uses the first ones of data.source."""
    n_images: int = Field(8, gt=0)


class Config(Section):
    """A whole run."""

    output: str = "runs/fastmim"
    """Folder of checkpoints, logs and pictures."""
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    objective: MAEConfig = MAEConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed config fragment: ZeRO stage, offload, communication."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image."""
        height, width = self.data.image_size
        return height // self.model.patch_size, width // self.model.patch_size

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
        return self.optim.batch_size // parts

    @model_validator(mode="after")
    def _patches_fit(self):
        patch = self.model.patch_size
        height, width = self.data.image_size
        if height % patch or width % patch:
            raise ValueError(
                f"data.image_size=[{height}, {width}]; expected multiples of model.patch_size={patch}"
            )
        patches = (height // patch) * (width // patch)
        keep = int(patches * (1 - self.mask.ratio))
        if not 0 < keep < patches:
            raise ValueError(
                f"mask.ratio={self.mask.ratio:g} keeps {keep} of {patches} patches; expected at least 1 kept "
                "and 1 removed"
            )
        for key, width in (
            ("model.width", self.model.width),
            ("objective.decoder_width", self.objective.decoder_width),
        ):
            if width % 4:
                raise ValueError(f"{key}={width}; expected a multiple of 4 (2-d sin-cos positions)")
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
