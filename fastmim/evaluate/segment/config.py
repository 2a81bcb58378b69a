"""What `segment` can be told by `key=value` words. Imports no torch: a check is quick."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fastmim.config import Config
from fastmim.errors import ConfigError
from fastmim.evaluate.config import EvaluationConfig
from fastmim.schema import Fraction, Positive

# MAE (He et al., CVPR 2022, appendix A.4) tells: UPerNet, end to end, 100 epochs, batches of 16. The rest is its
# segmentation code's, which is BEiT's on mmsegmentation: AdamW, the learning rate and its layer decay, weight decay,
# drop path, 512x512 crops of images resized by 0.5 to 2, and the auxiliary head.
_OF_HEAD: dict[str, dict[str, Any]] = {
    "upernet": {"trainable": True, "lr": 1e-4, "weight_decay": 0.05},
    # DINOv2's linear evaluation (Oquab et al., 2023, appendix B): frozen features, AdamW.
    "linear": {"trainable": False, "lr": 1e-3, "weight_decay": 1e-4},
}
_OF_UPERNET = ("width", "auxiliary", "dropout")
_OF_TRAINED = ("layer_decay", "drop_path")


class SegmentConfig(EvaluationConfig):
    """Semantic segmentation on an encoder's maps; the defaults are those of ADE20K."""

    masks: str
    """Folder of the masks of --data: PNG of one byte a pixel, named as the images are."""
    test_masks: str | None = None
    """Likewise of --test."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of --data that is the test set where there is no --test."""
    names: str | None = None
    """Text file with a class's name a line; numbers up to the highest in the training masks unless given."""
    ignore: int = Field(255, ge=0, le=255)
    """Value of mask pixels that have no class."""
    reduce_zero_label: bool = False
    """0 in a mask has no class either, and class c is written c + 1, as in ADE20K."""
    head: Literal["upernet", "linear"] = "upernet"
    """upernet fuses four scales made of four maps; linear is BatchNorm and one layer on the last map."""
    width: Positive | None = None
    """Channels of UPerNet; the encoder's width unless given."""
    auxiliary: float = Field(0.4, ge=0)
    """Weight of the loss of a convolutional head on the third of the four maps; 0 for none."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of channels before UPerNet's classifiers."""
    trainable: bool = Field(default=None)  # type: ignore[assignment]
    """Whether the encoder is fine-tuned; true for upernet and false for linear unless given."""
    crop: Positive = 512
    """Side of what the network sees, pixels; a multiple of the patch size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of an image's shorter side over the crop's in training; below 1, what is missing is filled up."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    stride: float = Field(2 / 3, gt=0, le=1)
    """Largest step of the window that slides over a test image, over the window."""
    epochs: float = Field(100, gt=0)
    warmup_steps: int = Field(1500, ge=0)
    """Steps of a linear rise of the learning rate, which falls linearly to 0 by the last step."""
    batch_size: int = Field(16, gt=1)
    lr: float = Field(default=None, gt=0)  # type: ignore[assignment]
    """Highest learning rate of the head; 1e-4 for upernet and 1e-3 for linear unless given."""
    weight_decay: float = Field(default=None, ge=0)  # type: ignore[assignment]
    """Of matrices; 0.05 for upernet and 1e-4 for linear unless given."""
    layer_decay: float = Field(0.65, gt=0, le=1)
    """Factor of the learning rate from a block to the one below it."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth rate of the last block, rising linearly from 0."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto is bf16 where the hardware computes it, else fp32; weights and their updates are float32 in any case."""
    save_minutes: float = Field(10, gt=0)
    """How often training is saved, to go on from there."""
    pictures: int = Field(6, ge=0)
    """Test images that are drawn with their masks."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_head(cls, values: Any) -> Any:
        head = values.get("head", "upernet") if isinstance(values, dict) else None
        # An unknown head is reported once, by its own field.
        return {**_OF_HEAD.get(str(head), _OF_HEAD["upernet"]), **values} if head is not None else values

    @model_validator(mode="after")
    def _consistent(self):
        self._belongs("head", self.head, "upernet", _OF_UPERNET)
        self._belongs("trainable", self.trainable, True, _OF_TRAINED)
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale={list(self.scale)}; expected 0 < lowest <= highest")
        return self

    def _belongs(self, key: str, value: Any, wanted: Any, fields: tuple[str, ...]) -> None:
        given = [field for field in fields if field in self.model_fields_set]
        if value != wanted and given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} with {key}={value!r}; expected {key}={wanted!r}"
            )

    @property
    def unused(self) -> set[str]:
        """Where masks and names lie, what is of the other head or a trained encoder, and what only tells."""
        unused = super().unused | {"masks", "test_masks", "names", "save_minutes", "pictures"}
        unused |= set() if self.head == "upernet" else set(_OF_UPERNET)
        return unused if self.trainable else unused | set(_OF_TRAINED)

    def resolved(self, trained: Config) -> Self:
        """With UPerNet's width and the number format of this machine; the crop must fit the encoder's patches."""
        from fastmim.precision import choose_precision  # loads torch
        from fastmim.ranks import Ranks

        patch = trained.model.patch_size
        if self.crop % patch or self.crop < 2 * patch:
            raise ConfigError(
                f"crop={self.crop}; expected a multiple of {patch}, the encoder's patch size, from {2 * patch} on"
            )
        width, precision = self.width or trained.model.width, choose_precision(self.precision, Ranks().device)
        return self.model_copy(update={"width": width, "precision": precision})
