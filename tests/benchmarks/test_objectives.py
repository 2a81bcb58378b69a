"""The comparison of objectives: its variants are configurations, its probe works, its page shows what it wrote."""

from pathlib import Path

import pytest
import torch

from benchmarks import markdown, objectives
from benchmarks.probe import probe_accuracy
from fastmim import recipes
from fastmim.config_objective import OBJECTIVES

PAGE = Path(objectives.__file__).parents[1] / "docs" / "objectives.md"
ROWS = [
    {
        "variant": name,
        "images_per_s": 12.3,
        "peak_memory_bytes": 3 << 20,
        "losses": [[10, 2.0], [20, 1.0]],
        "probe": 0.7,
    }
    for name in objectives.VARIANTS
]


def test_every_objective_has_a_variant_that_is_a_configuration():
    found = set()
    for name, overrides in objectives.VARIANTS.items():
        recipe = "dvae_small" if name == "dvae" else "quickstart"
        words = overrides.format(dvae="runs/dvae", mae="runs/mae").split()
        found.add(recipes.load(recipe, ["log.reconstruct_every_steps=null", *words]).objective.name)
    assert found == set(OBJECTIVES)
    assert objectives.NEEDS.keys() <= objectives.VARIANTS.keys() >= set(objectives.NEEDS.values())


def test_the_probe_tells_features_apart():
    torch.manual_seed(0)
    labels = torch.rand(400) < 0.3
    noise = torch.randn(400, 8)
    assert probe_accuracy(noise + 4 * labels[:, None], labels) > 0.98
    assert probe_accuracy(noise, labels) == pytest.approx(0.5, abs=0.1)


def test_the_page_shows_every_variant_and_can_be_filled_again(tmp_path):
    page = PAGE.read_text()
    assert all(f"| {name} |" in page for name in [*objectives.VARIANTS, "random encoder"])
    text = objectives.summarise([{**ROWS[0], "probe": None}, *ROWS[1:]], 0.5)
    filled = markdown.fill(page, {"objectives": text})
    assert (
        "| 2.000 | 1.000 | 12 | 3 | – |" in filled and "| random encoder | – | – | – | – | 50.0% |" in filled
    )
    assert filled.partition("<!-- table")[0] == page.partition("<!-- table")[0]
    objectives.draw(tmp_path / "curves.png", ROWS)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
