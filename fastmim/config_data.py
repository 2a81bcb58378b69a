"""The part of the configuration that says where images come from and how they become tensors."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fastmim.schema import Fraction, HeightWidth, PerChannel, Positive, Section, fill


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
    """What a pixel holds: files become 1 (grey) or 3 (RGB), RGBA ones 4; arrays have any number."""
    mean: PerChannel = Field(default=None)  # type: ignore[assignment]
    """Per channel, in units where white is 1; ImageNet's for 3 channels, else 0.5, unless given."""
    std: PerChannel = Field(default=None)  # type: ignore[assignment]
    """Likewise; ImageNet's for 3 channels, else 0.25, unless given."""
    crop: Literal["random_resized_crop", "center_crop"] = "random_resized_crop"
    """A window of random area, place and aspect; or the largest one in the middle, the same every time."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop over the image's area, lowest and highest."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a random crop, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: ColorJitter | None = None
    """A random colour change, such as {brightness: 0.4}; null makes none."""
    samples_per_epoch: Positive | None = None
    """Images that make an epoch; the size of the set unless given."""
    max_bad_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of distinct images that may fail to decode before the run aborts; unless 0, one image of a small set."""
    max_pixels: int = Field(178_956_970, gt=0)
    """Images of more pixels than this are left out by the index."""
    max_file_bytes: int = Field(256 * 2**20, gt=0)
    """Files larger than this are left out by the index."""
    threads: Positive | None = None
    """Decoding threads per rank; the machine's cores over its ranks unless given."""
    prefetch: int = Field(2, gt=0)
    """Batches decoded ahead."""

    def allowed_bad(self, images: int) -> int:
        """How many of a set of images may fail to decode."""
        return max(int(self.max_bad_fraction * images), 1 if self.max_bad_fraction else 0)

    @model_validator(mode="before")
    @classmethod
    def _fill_statistics(cls, values: Any) -> Any:
        channels = values.get("channels", 3) if isinstance(values, dict) else None
        if not isinstance(channels, int) or channels < 1:
            return values
        of_imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        plain = {"mean": [0.5] * channels, "std": [0.25] * channels}
        return fill(values, of_imagenet if channels == 3 else plain)

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
