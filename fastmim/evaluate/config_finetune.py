"""What `fastmim evaluate finetune` can be told. Imports no torch."""

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from fastmim import recipes
from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.evaluate.config import ProtocolConfig
from fastmim.schema import Fraction, HeightWidth, Positive, as_list

_RAND_AUGMENT = r"^rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?)*$"


class _SizeDefaults(NamedTuple):
    epochs: int
    blr: float
    layer_decay: float
    drop_path: float


# MAE, table 9, by the least number of blocks: ViT-H, ViT-L, ViT-B.
_BY_DEPTH = {
    32: _SizeDefaults(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3),
    24: _SizeDefaults(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    0: _SizeDefaults(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1),
}


class FinetuneConfig(ProtocolConfig):
    """Fine-tuning by MAE's recipe (He et al., CVPR 2022, appendix A.1 and table 9), whole or of the last blocks.

    What is null unless given is the paper's for the encoder's depth: ViT-H's from 32 blocks on, ViT-L's from 24 on,
    else ViT-B's.
    """

    pool: Literal["cls", "mean"] = "mean"
    """What is classified: the mean over the patches, under a norm of its own, or the cls token after the last norm."""
    image_size: HeightWidth | None = None
    """Height and width in pixels, multiples of the patch size; those of the encoder's training unless given."""
    trainable_blocks: Annotated[list[float], Field(min_length=1), BeforeValidator(as_list)] | None = None
    """What is trained: 0 the head, 0.5 also the MLP of the last block, n also the last n blocks; all of them, or null,
    everything. Several values are trained one after the other."""

    batch_size: Positive = 1024
    """Images per step over all ranks and backward passes; the peak learning rate is blr x batch_size / 256."""
    accumulation: Positive = 1
    """Backward passes per step."""
    epochs: Positive | None = None
    """100 for ViT-B, 50 for ViT-L and H, unless given."""
    warmup_epochs: float = Field(5, ge=0)
    blr: float | None = Field(None, gt=0)
    """Base learning rate per 256 images; 5e-4 for ViT-B, 1e-3 for ViT-L and H, unless given."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate of the head at the end of the cosine."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Learning rate of a layer over that of the next; 0.65 for ViT-B, 0.75 for ViT-L and H, unless given."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to 1-d parameters and the cls token."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest gradient norm; null does not clip."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an average of the weights, which is then what is tested and saved; null keeps none."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth rate of the last block, rising linearly from 0; 0.1 for ViT-B, 0.2 for L, 0.3 for H."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop over the image's area, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = Field("rand-m9-mstd0.5-inc1", pattern=_RAND_AUGMENT)
    """timm's RandAugment, on images of 1 or 3 channels; null has none."""
    mixup: float = Field(0.8, ge=0)
    """Parameter of the beta distribution of shares; 0 mixes no images."""
    cutmix: float = Field(1.0, ge=0)
    """Likewise of areas; where both are above 0, a step takes either at random."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of a label that all classes share."""
    erasing: Fraction = 0.25
    """Probability that a rectangle of an image becomes noise."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto is bf16 where the hardware computes it, else fp32; weights and their updates are float32 in any case."""
    workers: int | None = Field(None, ge=0)
    """Processes per rank that run RandAugment, 0 for none; the rank's cores less one unless given."""
    test_every: Positive = 1
    """Epochs between measurements of the test images for metrics.jsonl; they choose nothing."""
    save: bool = False
    """Write the fine-tuned model in the layout of timm."""

    @property
    def unused(self) -> set[str]:
        """Also how fast it is computed, and what is only told."""
        return super().unused | {"workers", "test_every"}

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def resolved(self, trained: Config) -> Self:
        """With the paper's values for the encoder's depth, its image size, and the number format of this machine."""
        depth, patch = trained.model.depth, trained.model.patch_size
        height, width = size = self.image_size or trained.data.image_size
        if height % patch or width % patch:
            raise ConfigError(f"image_size=[{height}, {width}]; expected multiples of the patch size {patch}")
        if self.rand_augment is not None and trained.data.channels not in (1, 3):
            raise ConfigError(
                f"rand_augment={self.rand_augment!r} with images of {trained.data.channels} channels; expected "
                "rand_augment=null"
            )
        for blocks in self.trainable_blocks or []:
            if blocks > depth:
                raise ConfigError(
                    f"trainable_blocks={blocks:g}; expected at most the encoder's {depth} blocks"
                )
        own = next(values for least, values in _BY_DEPTH.items() if depth >= least)
        values = self.model_dump(include=self.model_fields_set) | {"image_size": size}
        values |= {key: value for key, value in own._asdict().items() if getattr(self, key) is None}
        values["precision"] = super().resolved(trained).precision
        return recipes.build_as(type(self), values)

    @model_validator(mode="after")
    def _schedule_fits(self):
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g}; expected less than epochs={self.epochs}")
        peak = None if self.blr is None else self.blr * self.batch_size / 256
        if peak is not None and self.min_lr > peak:
            raise ValueError(f"min_lr={self.min_lr:g}; expected at most the peak learning rate {peak:g}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size}; expected a multiple of accumulation={self.accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self):
        blocks = self.trainable_blocks or []
        bad = [value for value in blocks if value < 0 or (value != 0.5 and value % 1)]
        if bad:
            raise ValueError(f"trainable_blocks={bad[0]:g}; expected 0, 0.5 or a whole number of blocks")
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"trainable_blocks={blocks}; expected different values")
        return self

    @model_validator(mode="after")
    def _crops_fit(self):
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale={list(self.scale)}; expected 0 < lowest <= highest <= 1")
        return self
