"""What `detect` can be told by `key=value` words. Imports no torch: a check is quick."""

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.evaluate.config import EvaluationConfig
from fastmim.schema import Fraction, Positive

_OF_TRAINED = ("layer_decay", "drop_path")
# The fifth scale is this many patches wide.
_COARSEST = 4


class _SizeDefaults(NamedTuple):
    epochs: int
    layer_decay: float
    drop_path: float


# From the configuration files of ViTDet's code, by the least number of blocks: ViT-H, ViT-L, ViT-B.
_BY_DEPTH = {
    32: _SizeDefaults(epochs=75, layer_decay=0.9, drop_path=0.5),
    24: _SizeDefaults(epochs=100, layer_decay=0.8, drop_path=0.4),
    0: _SizeDefaults(epochs=100, layer_decay=0.7, drop_path=0.1),
}


class DetectConfig(EvaluationConfig):
    """Detection by ViTDet's recipe (Li et al., ECCV 2022) with torchvision's networks; the defaults are COCO's.

    What is null unless given is the paper's for the encoder's depth: ViT-H's from 32 blocks on, ViT-L's from 24 on,
    else ViT-B's.
    """

    annotations: str
    """COCO's JSON of the boxes of --data; images that it does not name have no part."""
    test_annotations: str | None = None
    """Likewise of --test."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of the annotated images of --data that is the test set where there is no --test."""
    drop_empty_boxes: bool = False
    """Leave boxes without an area out, of which COCO has some; else they are refused."""
    head: Literal["mask_rcnn", "faster_rcnn"] = "mask_rcnn"
    """mask_rcnn also learns and tells the masks of objects, which the annotations must have."""
    trainable: bool = True
    """Whether the encoder is fine-tuned."""
    window: Positive | None = 14
    """Side in patches of the windows that blocks attend within, but for four; null attends globally everywhere."""
    width: Positive = 256
    """Channels of the pyramid and of the heads' convolutions."""
    hidden: Positive = 1024
    """Width of the linear layer before boxes are classified."""
    rpn_samples: Positive = 256
    """Anchors of an image in the loss of the proposals."""
    proposals: Positive = 1000
    """Proposals of an image that are classified, at most."""
    box_samples: Positive = 512
    """Proposals of an image in the loss of the boxes."""
    image_size: Positive = 1024
    """Side of the square that images are put into, pixels; a multiple of four patches."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Range of an image's longer side over the square's in training; what is missing is filled up."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    batch_size: Positive = 64
    """Images per step over all ranks and backward passes."""
    accumulation: Positive = 1
    """Backward passes per step."""
    epochs: Positive | None = None
    """100 for ViT-B and L, 75 for ViT-H, unless given."""
    lr: float = Field(1e-4, gt=0)
    """Highest learning rate of the heads."""
    warmup_steps: int = Field(250, ge=0)
    """Steps of a linear rise of the learning rate from a thousandth."""
    decay_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (8 / 9, 26 / 27)
    """Shares of the training after each of which the learning rate is a tenth."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.1, ge=0)
    """Not applied to 1-d parameters and the cls token."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Learning rate of a block over that of the next; 0.7 for ViT-B, 0.8 for L, 0.9 for H, unless given."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth rate of the last block, rising linearly from 0; 0.1 for ViT-B, 0.4 for L, 0.5 for H."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the encoder and the pyramid; auto is bf16 where the hardware computes it. The heads, weights and updates are
    float32 in any case."""
    pictures: int = Field(6, ge=0)
    """Test images that are drawn with their boxes."""

    @model_validator(mode="after")
    def _consistent(self):
        given = [field for field in _OF_TRAINED if getattr(self, field) is not None]
        if not self.trainable and given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} with trainable=False; expected trainable=True"
            )
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale={list(self.scale)}; expected 0 < lowest <= highest")
        if list(self.decay_at) != sorted(self.decay_at):
            raise ValueError(f"decay_at={list(self.decay_at)}; expected ascending shares")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size}; expected a multiple of accumulation={self.accumulation}"
            )
        return self

    @property
    def masks(self) -> bool:
        """Whether masks are learned and measured."""
        return self.head == "mask_rcnn"

    @property
    def unused(self) -> set[str]:
        """Where annotations lie, what is of a trained encoder, and what only tells."""
        unused = super().unused | {"annotations", "test_annotations", "drop_empty_boxes", "pictures"}
        return unused if self.trainable else unused | set(_OF_TRAINED)

    def resolved(self, trained: Config) -> Self:
        """With the paper's values for the encoder's depth, and the number format of this machine.

        Raises:
            ConfigError: an image size that the pyramid's scales do not divide.
        """
        from fastmim.precision import choose_precision  # loads torch
        from fastmim.ranks import Ranks

        unit = _COARSEST * trained.model.patch_size
        if self.image_size % unit:
            raise ConfigError(
                f"image_size={self.image_size}; expected a multiple of {unit}, {_COARSEST} of the encoder's patches"
            )
        own = next(values for least, values in _BY_DEPTH.items() if trained.model.depth >= least)
        fields = [name for name in own._fields if self.trainable or name not in _OF_TRAINED]
        values = {name: getattr(own, name) for name in fields if getattr(self, name) is None}
        values["precision"] = choose_precision(self.precision, Ranks().device)
        return self.model_copy(update=values)
