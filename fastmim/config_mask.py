"""The part of the configuration that says which patches are removed."""

from math import sqrt
from typing import Any, Literal

from pydantic import Field, model_validator

from fastmim.schema import Positive, Section

# The options that a strategy has, with their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"unit": 1},
    "block": {"min_block": 16, "min_aspect": 0.3},
    "grid": {"random_phase": False},
}


class MaskConfig(Section):
    """Which patches are removed."""

    strategy: Literal["random", "block", "grid"] = "random"
    """random: uniformly (MAE, section 3). block: rectangles (BEiT, Algorithm 1). grid: all but one of each 2 x 2
    (MAE, Table 1f)."""
    ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches removed; `len_keep = int(N * (1 - ratio))` (MAE, section 3), counted in units."""
    unit: Positive | None = None
    """random: patches per side of the squares that are kept or removed as a whole (SimMIM); 1 unless given."""
    min_block: Positive | None = None
    """block: area of the smallest rectangle in patches; 16 unless given."""
    min_aspect: float | None = Field(None, ge=0.01, le=1)
    """block: least height over width, and width over height, of a rectangle; 0.3 unless given."""
    random_phase: bool | None = None
    """grid: which patch of the four stays is drawn for each sample, in place of the first; false unless given."""
    repeats: Positive = 1
    """Masks of one decoded image in a step, for runs that wait for data: a step decodes batch_size / repeats images,
    and each counts as often as it is masked."""
    repeat_crops: bool = False
    """Each repeat has a crop, flip and colours of its own, from an image that is decoded once."""

    @model_validator(mode="before")
    @classmethod
    def _fill_options(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # An unknown strategy is reported once, by its own field.
        options = OPTIONS.get(str(values.get("strategy", "random")), {})
        return values | {key: default for key, default in options.items() if values.get(key) is None}

    @model_validator(mode="after")
    def _options_fit(self):
        for owner, options in OPTIONS.items():
            for key in options:
                value = getattr(self, key)
                if owner != self.strategy and value is not None:
                    raise ValueError(
                        f"mask.{key}={value} with mask.strategy={self.strategy!r}; expected mask.strategy={owner!r}"
                    )
        if self.repeat_crops and self.repeats == 1:
            raise ValueError("mask.repeat_crops=true with mask.repeats=1; expected two or more")
        if self.strategy == "grid" and self.ratio != 0.75:
            raise ValueError(
                f"mask.ratio={self.ratio:g} with mask.strategy='grid'; expected 0.75: one of four patches is kept"
            )
        return self

    def len_keep(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid (rows, columns) stay: MAE's `int(N * (1 - mask_ratio))`, whole units of them."""
        area = (self.unit or 1) ** 2
        return int(grid[0] * grid[1] // area * (1 - self.ratio)) * area

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse a grid of patches (rows, columns) that cannot be masked so; ValueError names the keys."""
        rows, columns = grid
        shape, patches, keep = f"{rows} x {columns} patches", rows * columns, self.len_keep(grid)
        unit = self.unit or 1
        if rows % unit or columns % unit:
            raise ValueError(f"mask.unit={unit} with {shape}; expected a divisor of both sides")
        if self.strategy == "grid" and (rows % 2 or columns % 2):
            raise ValueError(f"mask.strategy='grid' with {shape}; expected even sides")
        if not 0 < keep < patches:
            raise ValueError(
                f"mask.ratio={self.ratio:g} keeps {keep} of {patches} patches; expected at least 1 kept "
                "and 1 removed"
            )
        if self.min_block is not None and self.min_aspect is not None:
            self._check_blocks(grid, patches - keep, self.min_block, self.min_aspect)

    def _check_blocks(self, grid: tuple[int, int], removed: int, area: int, aspect: float) -> None:
        rows, columns = grid
        if area > removed:
            raise ValueError(
                f"mask.min_block={area} with mask.ratio={self.ratio:g}, which removes {removed} patches; expected "
                f"at most {removed}"
            )
        # Sides are rounded: sqrt(area * aspect) < rows + 0.5, sqrt(area / aspect) < columns + 0.5.
        short, long = sqrt(area * aspect), sqrt(area / aspect)
        if not (short < min(grid) + 0.5 and area < (rows + 0.5) * (columns + 0.5)):
            raise ValueError(
                f"mask.min_block={area} with {rows} x {columns} patches; expected a block of aspect "
                f"{aspect:g}..{1 / aspect:g} to fit, the narrowest is {round(short)} x {round(long)}"
            )
