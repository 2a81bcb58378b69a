"""Records: written as they come, read back whole, and dropped when their steps are done again."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmim.config_training import LogConfig
from fastmim.metrics import Metrics, describe_end, drop_records_after, read_records
from fastmim.pictures import draw_loss, draw_reconstructions
from fastmim.window import Window
from tests.launching import environment


def record(step, loss=0.5):
    return {
        **{
            "step": step,
            "epoch": step / 10,
            "loss": loss,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "images_per_s": 100.0,
        },
        **{"data_wait": 0.01, "peak_memory_bytes": 2**30, "skipped_steps": 0, "bad_images": 0, "mfu": None},
    }


@pytest.fixture
def config(tmp_path, tiny_config):
    config = tiny_config(f"output={tmp_path}")
    return config.model_copy(update={"log": LogConfig(every_steps=1)})


def test_records_go_to_json_lines_and_tensorboard(config, tmp_path):
    metrics = Metrics(config, 0, 3)
    for step in (1, 2, 3):
        metrics.write(record(step, loss=None if step == 2 else 1 / step))
    metrics.close()
    assert [r["loss"] for r in read_records(tmp_path / "metrics.jsonl")] == [1.0, None, 1 / 3]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]
    assert [event.value for event in events.Scalars("train/images_per_s")] == [100.0] * 3


def test_a_resumed_run_forgets_what_it_does_again(config, tmp_path):
    metrics = Metrics(config, 0, 9)
    for step in range(1, 8):
        metrics.write(record(step))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    metrics = Metrics(config, 5, 9)
    metrics.write(record(6, loss=0.25))
    metrics.close()
    kept = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in kept] == [1, 2, 3, 4, 5, 6]
    assert kept[-1]["loss"] == 0.25
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")][-1] == (6, 0.25)


def test_dropping_keeps_whole_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (10, 20, 30)))
    drop_records_after(path, 20)
    assert [r["step"] for r in read_records(path)] == [10, 20]


def test_plain_lines_name_what_is_not_finite(config, caplog):
    caplog.set_level(logging.INFO, logger="fastmim")
    logging.getLogger("fastmim").propagate = True
    metrics = Metrics(config, 0, 3)
    metrics.write({**record(1), "loss": None, "grad_norm": None})
    metrics.close()
    assert "loss not finite" in caplog.text and "grad norm not finite" in caplog.text


def test_the_end_names_what_is_there_and_nothing_else(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(7)) + "\n")
    text = describe_end(tmp_path, 7, "photos")
    assert "finished 7 steps" in text and "100 (median of 1 records)" in text
    assert "metrics.jsonl" in text and "reconstructions.png" not in text
    assert f"fastmim reconstruct --checkpoint {tmp_path} --images photos" in text


def test_window_leaves_non_finite_losses_out_and_counts_rows_of_skips():
    window = Window(torch.device("cpu"))
    for loss, skipped in [(1.0, 0), (float("nan"), 1), (float("inf"), 1), (3.0, 0), (2.0, 1)]:
        window.add_losses({"loss": torch.tensor(loss)})
        window.add_step(skipped)
    assert window.sums().tolist() == [6.0, 3.0, 3.0]
    assert window.most_in_a_row() == 2
    window.reset()
    assert window.sums().tolist() == [0.0, 0.0, 0.0]
    window.add_step(torch.tensor(1.0))
    assert window.most_in_a_row() == 2  # the row that began before goes on


def test_pictures_are_drawn_for_grey_colour_and_more_channels(tmp_path):
    from PIL import Image

    for channels in (1, 3, 4):
        images = torch.randint(0, 256, (3, 16, 32, channels), dtype=torch.uint8)
        removed = torch.rand(3, 8) < 0.5
        path = tmp_path / f"{channels}.png"
        draw_reconstructions(path, images, removed, images, 8, "title")
        with Image.open(path) as picture:
            assert picture.size[0] > 300
    draw_loss(tmp_path / "loss.png", [record(1), record(2, loss=None), record(3)])
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (770, 440)
    assert not list(tmp_path.glob(".*"))


def test_pictures_leave_the_plots_of_whoever_imports_us_alone():
    """No global state of pyplot, whose backend a notebook chose; and a rank that draws nothing loads no matplotlib."""
    code = (
        "import sys, fastmim.trainer; assert 'matplotlib' not in sys.modules; "
        "import fastmim.evaluate.cka, fastmim.evaluate.finetune, fastmim.evaluate.segment.run, "
        "fastmim.evaluate.detect.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
