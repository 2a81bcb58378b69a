"""launch.py and its bare step begin with the same loss and take turns, so that their times compare."""

import re
import time
from pathlib import Path

import pytest

from benchmarks import end_to_end, harness
from benchmarks.launched import Launched, first_loss, run_launch
from benchmarks.workers import Worker
from tests.launching import TINY_YAML, write_images


@pytest.fixture
def words(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY_YAML)
    return [str(recipe), f"data.source={write_images(tmp_path / 'images', 24)}"]


def state_of(pid):
    """R, S, T (stopped) ... of a process; None without one."""
    status = Path(f"/proc/{pid}/status")
    return re.search(r"State:\s+(\w)", status.read_text())[1] if status.exists() else None


def test_the_bare_step_is_that_of_launch(words):
    launched = run_launch(words, steps=2, warmup=1)
    assert launched["checkpoint_s"] > 0 and 0 <= launched["data_wait"] < 1
    wanted = first_loss(words)
    with Worker(end_to_end.build_bare, words) as bare:
        assert bare.step(compiled=True) == pytest.approx(wanted, rel=1e-5)
        assert min(bare.measure_step(end_to_end.memory_of), launched["memory"]) > 2**27


def test_a_run_stands_still_between_its_turns(words):
    with Launched(words, steps=2, warmup=3, turns=3) as launched:
        pid = launched._process.pid
        assert launched.turn() > 0 and state_of(pid) == "T"
        time.sleep(1.5)
        started = time.perf_counter()
        seconds = launched.turn()
        # With the pause it would be more by all of it.
        assert 0 < seconds < time.perf_counter() - started + 1
        assert state_of(pid) == "T"
    assert state_of(pid) is None


def test_a_run_that_fails_between_turns_is_told(words):
    with pytest.raises(SystemExit, match=r"(?s)launch.py ended with [^0].*mask\.ratio"):
        Launched([*words, "mask.ratio=2"], steps=1, warmup=1, turns=1)


def test_the_interval_of_a_median():
    assert harness.median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) is None
    assert harness.median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 6.0)
    # Of 30 the 10th and the 21st: a table of order statistics has 95.7 % for these.
    assert harness.median_interval([float(i) for i in range(30, 0, -1)]) == (10.0, 21.0)


def test_tables():
    row = {
        "variant": "bare step",
        "size": "tiny",
        "dtype": "fp32",
        "median_s": 0.1,
        "p20_s": 0.1,
        "p80_s": 0.1,
        "samples": [0.1] * 6,
    }
    row |= {"images_per_s": 80.0}
    launched = row | {
        "variant": "launch.py",
        "overhead": 0.021,
        "samples": [0.102, 0.1, 0.103, 0.101, 0.099, 0.102],
        "data_wait": 0.01,
        "checkpoint_share": 0.0005,
    }
    told = {"step_seconds": 0.1, "seconds": {"data": 0.01, "encoder": 0.09}}
    made = end_to_end.tables({"rows": [row, launched], "profile": told})
    assert "| +2.10% | -1.0% to +3.0% | 6 | +1.00% | +0.05% |" in made["end_to_end"]
    assert "| data | 10.00 | 10.0% |" in made["end_to_end_phases"]
