"""Mask configuration: every combination that cannot be drawn is refused in one line, before a rank starts."""

import pytest
import yaml

from fastmim import recipes
from fastmim.errors import ConfigError

BAD = [
    ("mask.strategy=blok", "mask.strategy='blok'; expected 'random', 'block' or 'grid'"),
    ("mask.unit=3", "mask.unit=3 with 14 x 14 patches; expected a divisor of both sides"),
    ("mask.unit=14", "mask.ratio=0.75 keeps 0 of 196 patches"),
    ("mask.unit=0", "mask.unit=0; expected an integer > 0"),
    ("mask.min_block=16", "mask.min_block=16 with mask.strategy='random'; expected mask.strategy='block'"),
    (
        "mask.random_phase=false",
        "mask.random_phase=False with mask.strategy='random'; expected mask.strategy='grid'",
    ),
    (
        "mask.strategy=block mask.unit=1",
        "mask.unit=1 with mask.strategy='block'; expected mask.strategy='random'",
    ),
    ("mask.strategy=block mask.min_aspect=2", "mask.min_aspect=2; expected a number >= 0.01 and <= 1"),
    (
        "mask.strategy=block mask.min_block=148",
        "mask.min_block=148 with mask.ratio=0.75, which removes 147 patches",
    ),
    (
        "mask.strategy=block data.image_size=[16,512]",
        "mask.min_block=16 with 1 x 32 patches; expected a block of aspect 0.3..3.33333 to fit, the narrowest is 2 x 7",
    ),
    (
        "mask.strategy=block data.image_size=[48,48] mask.min_aspect=0.2 mask.min_block=6 model.patch_size=24",
        "mask.min_block=6 with mask.ratio=0.75, which removes 3 patches; expected at most 3",
    ),
    ("mask.strategy=grid mask.ratio=0.5", "mask.ratio=0.5 with mask.strategy='grid'; expected 0.75"),
    (
        "mask.strategy=grid data.image_size=[224,240]",
        "mask.strategy='grid' with 14 x 15 patches; expected even sides",
    ),
    ("mask.repeat_crops=true", "mask.repeat_crops=true with mask.repeats=1; expected two or more"),
    (
        "mask.repeats=2 mask.repeat_crops=true data.crop=center_crop",
        "mask.repeat_crops=true with data.crop='center_crop', which is one crop",
    ),
    ("mask.strategy=grid mask.min_aspect=0.3", "mask.min_aspect=0.3 with mask.strategy='grid'; expected"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[overrides for overrides, _ in BAD])
def test_what_cannot_be_drawn_is_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        recipes.load("mae_vit_base", overrides.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


OPTIONS = [
    ("", {"unit": 1}),
    ("mask.unit=2", {"unit": 2}),
    ("mask.strategy=block", {"min_block": 16, "min_aspect": 0.3}),
    ("mask.strategy=block mask.min_block=9 mask.min_aspect=0.5", {"min_block": 9, "min_aspect": 0.5}),
    ("mask.strategy=grid", {"random_phase": False}),
    ("mask.strategy=grid mask.random_phase=true", {"random_phase": True}),
]


@pytest.mark.parametrize(("overrides", "options"), OPTIONS)
def test_a_strategy_has_its_own_options(overrides, options):
    config = recipes.load("mae_vit_base", overrides.split())
    keys = {"unit", "min_block", "min_aspect", "random_phase"}
    assert config.mask.model_dump(include=keys, exclude_none=True) == options
    assert recipes.build(yaml.safe_load(recipes.dump(config))) == config


def test_units_are_counted_as_simmim_counts_them():
    # SimMIM on 224 x 224 with patches of 16 and units of 32: ceil(0.6 * 49) = 30 units are removed.
    config = recipes.load("mae_vit_base", ["mask.unit=2", "mask.ratio=0.6"])
    assert config.mask.len_keep(config.grid) == 4 * (49 - 30)


@pytest.mark.parametrize(
    ("grid", "ratio", "keep"), [((14, 14), 0.75, 49), ((16, 16), 0.9, 25), ((7, 9), 0.4, 37)]
)
def test_len_keep_is_maes(grid, ratio, keep):
    config = recipes.load("mae_vit_base", [f"mask.ratio={ratio}"])
    assert config.mask.len_keep(grid) == keep
