"""The table of what pre-training is worth to segmentation and detection: every part runs and lands in the page."""

import json

import pytest

from benchmarks import dense
from benchmarks.kept import OURS, RANDOM
from fastmim.cli import main


def test_a_quick_call_makes_every_row_and_keeps_it(tmp_path, monkeypatch, capsys):
    def run(command):
        assert command[1:3] == ["-m", "fastmim.cli"] and main(command[3:]) == 0

    monkeypatch.setattr(dense, "run_process", run)
    monkeypatch.setattr(dense, "SEEDS", 1)
    tasks = [title for title, (_, words, _) in dense.TASKS.items() if "segment_small" not in words]
    words = [
        "--quick",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "out.json"),
        "--tasks",
        *tasks,
    ]
    dense.main(words)
    told, text = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert told["rows"].keys() == {
        "pre-training",
        *(dense.key_of(title, start, 0) for title in tasks for start in (OURS, RANDOM)),
    }
    out = tmp_path / "runs" / "tasks"
    for title in tasks:
        weights = {
            json.loads(path.read_text())["weights"]["sha256"] for path in out.glob(f"{title[:6]}*/eval.json")
        }
        assert len(weights) == 2  # both starts, and not one of them twice
        value = told["rows"][dense.key_of(title, OURS, 0)]["figure"]
        assert f"| {title} | {'AP' if 'detect' in title else 'mIoU'} | {100 * value:.1f} | " in text
    assert "| segmentation, UPerNet | mIoU | – | – |" in text

    def refuse(*arguments):
        raise AssertionError(f"made again: {arguments}")

    monkeypatch.setattr(dense, "evaluate", refuse)
    dense.main(words)
    again = capsys.readouterr().out
    assert again.startswith("| task | ") and text.endswith(again)


def test_no_images_are_shared(tmp_path):
    places = dense.draw_sets(tmp_path, dict.fromkeys(dense.SETS, 3))
    images = [path.read_bytes() for place in places.values() for path in (place / "images").iterdir()]
    assert len(set(images)) == len(images) == 9


def test_figures_of_a_quick_call_do_not_reach_the_page(capsys):
    with pytest.raises(SystemExit):
        dense.main(["--quick", "--docs", "docs"])
    assert "--docs with --quick" in capsys.readouterr().err
