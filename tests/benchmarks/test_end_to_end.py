"""launch.py and its bare step begin with the same loss, so that their times compare."""

import pytest

from benchmarks import end_to_end
from benchmarks.gloo import Group
from tests.launching import TINY_YAML, write_images


def test_the_bare_step_is_that_of_launch(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY_YAML)
    words = [str(recipe), f"data.source={write_images(tmp_path / 'images', 24)}"]
    launched = end_to_end.run_launch(words, steps=2, warmup=1)
    assert launched["step_s"] > 0 and launched["checkpoint_s"] > 0 and 0 <= launched["data_wait"] < 1
    with Group(1, threads=1) as group:
        (bare,) = group.call(end_to_end.run_bare, words, 1)
    assert bare["loss"] == pytest.approx(launched["loss"], rel=1e-5)
    assert bare["step_s"] > 0 and bare["flops"] > 0 and bare["precision"] == "fp32"
    assert min(bare["memory"], launched["memory"]) > 2**27


def test_tables():
    row = {
        "variant": "bare step",
        "size": "tiny",
        "dtype": "fp32",
        "median_s": 0.1,
        "p20_s": 0.1,
        "p80_s": 0.1,
    }
    row |= {"images_per_s": 80.0}
    launched = row | {
        "variant": "launch.py",
        "overhead": 0.021,
        "overhead_range": [-0.01, 0.03],
        "data_wait": 0.01,
        "checkpoint_share": 0.0005,
    }
    told = {"step_seconds": 0.1, "seconds": {"data": 0.01, "encoder": 0.09}}
    made = end_to_end.tables({"rows": [row, launched], "profile": told})
    assert "| +2.10% | -1.0% to +3.0% | +1.00% | +0.05% |" in made["end_to_end"]
    assert "| data | 10.00 | 10.0% |" in made["end_to_end_phases"]
