"""`fastmim evaluate segment`, typed as a user types it, on areas whose colour tells their class."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.cli import main
from fastmim.evaluate.classifier import layer_decay_groups
from fastmim.evaluate.dense import DenseEncoder
from fastmim.evaluate.encoder import load_encoder
from fastmim.evaluate.segment import training
from fastmim.evaluate.segment.config import SegmentConfig
from fastmim.evaluate.segment.model import Segmenter, build_head
from fastmim.evaluate.segment.training import learning_rate_factor, steps_of

COLOURS = np.array([(40, 60, 200), (50, 190, 60), (200, 50, 40)])
LINEAR = [
    "head=linear",
    "crop=32",
    "scale=[1,1.5]",
    "epochs=8",
    "batch_size=6",
    "warmup_steps=2",
    "lr=0.02",
    "precision=fp32",
]
UPERNET = [
    *LINEAR[1:],
    "head=upernet",
    "width=8",
    "lr=0.01",
    "epochs=14",
    "layer_decay=0.9",
    "precision=fp32",
]


def draw(folder, count, seed):
    """Images of two or three areas, some without a class."""
    random = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        height, width = random.integers(34, 60, 2)
        areas = Image.fromarray(random.integers(0, 3, (2, 2), dtype=np.uint8))
        classes = np.array(areas.resize((int(width), int(height)), Image.Resampling.NEAREST))
        pixels = np.clip(random.normal(COLOURS[classes], 20), 0, 255).astype(np.uint8)
        classes[:3] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(classes).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return draw(root / "train", 18, 1), draw(root / "test", 6, 2)


@pytest.fixture
def command(weights, sets, tmp_path):
    """Runs the protocol; returns the exit code. None leaves the test images out."""

    def run(*words, out="out", test=sets[1], masks=sets[0] / "masks"):
        options = ["--weights", weights, "--data", sets[0] / "images", "--out", tmp_path / out]
        given = [] if masks is None else [f"masks={masks}"]
        if test is not None:
            options += ["--test", test / "images"]
            given += [f"test_masks={test / 'masks'}"]
        return main(["evaluate", "segment", *map(str, options), *given, *words])

    return run


def result(tmp_path, out="out"):
    return json.loads((tmp_path / out / "eval.json").read_text())


@pytest.mark.parametrize("words", [LINEAR, UPERNET], ids=["linear", "upernet"])
def test_areas_are_told_apart_by_their_colours(command, tmp_path, capsys, words):
    assert command(*words) == 0
    told = result(tmp_path)
    # One class everywhere has a mIoU of at most 0.2. UPerNet's few steps end far apart for different seeds.
    assert told["miou"] > (0.5 if words is LINEAR else 0.3)
    assert f"mIoU {told['miou']:.2%} of 3 classes" in capsys.readouterr().out
    assert told["steps"] == (24 if words is LINEAR else 42) and told["train_loss"] < math.log(3)
    assert set(told["per_class"]) == {"0", "1", "2"}
    assert told["miou"] == pytest.approx(np.mean([row["iou"] for row in told["per_class"].values()]))
    for name in ("confusion.png", "predictions.png"):
        with Image.open(tmp_path / "out" / name) as drawn:
            assert drawn.size[0] > 200
    assert ("layer_decay" in told["settings"]) == ("head=upernet" in words)
    assert [path.name for path in (tmp_path / "out").glob("*unfinished*")] == []
    assert command(*words) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("words", [LINEAR, UPERNET], ids=["linear", "upernet"])
def test_a_stopped_evaluation_goes_on_to_the_same_numbers(command, tmp_path, monkeypatch, words):
    words = [*words, "epochs=3", "save_minutes=1e-9", "pictures=0"]
    assert command(*words) == 0
    step = training.segmentation_loss
    calls = 0

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training, "segmentation_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        command(*words, out="stopped")
    assert not (tmp_path / "stopped" / "eval.json").exists()
    assert command(*words, out="stopped", test=None) == 2  # it is of another evaluation
    assert command(*words, out="stopped") == 0
    assert calls == 6 + 9 - 5
    once, resumed = result(tmp_path), result(tmp_path, "stopped")
    assert once | {"seconds": 0} == resumed | {"seconds": 0}


def test_a_training_that_diverged_tells_no_score(command, tmp_path, capsys):
    assert command(*LINEAR, "epochs=3", "lr=1e30", "warmup_steps=0", "pictures=0") == 3
    assert "steps had a finite loss; lower lr=1e+30" in capsys.readouterr().err
    assert not (tmp_path / "out" / "eval.json").exists()


def test_without_test_images_a_share_is_held_out(command, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("sea\nmeadow\nbrick\nsnow\n")
    words = [*LINEAR, "epochs=3", "test_share=0.25", f"names={names}", "scale=[0.5,1]", "pictures=0"]
    assert command(*words, test=None) == 0
    told = result(tmp_path)
    assert (told["train"]["images"], told["test"]["images"]) == (14, 4)
    assert list(told["per_class"]) == ["sea", "meadow", "brick", "snow"]
    assert told["per_class"]["snow"]["pixels"] == 0 and not (tmp_path / "out" / "predictions.png").exists()


def test_a_frozen_encoder_is_not_changed_and_a_trained_one_is(command, weights, monkeypatch):
    kept = []
    train = training.GuardedAdamW.step

    def step(optimizer, *arguments):
        kept.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        return train(optimizer, *arguments)

    monkeypatch.setattr(training.GuardedAdamW, "step", step)
    encoder, _ = load_encoder(str(weights))
    whole = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("norm."))
    few = ["epochs=0.7", "warmup_steps=0", "pictures=0"]
    assert command(*LINEAR, *few) == 0 and command(*UPERNET, *few, "trainable=false", out="b") == 2
    frozen = [word for word in UPERNET if not word.startswith("layer_decay")]
    assert command(*frozen, *few, "trainable=false", out="c") == 0
    assert command(*frozen, *few, out="d") == 0
    linear, head, everything = kept[0], kept[2], kept[4]
    assert linear == 2 * 32 + 32 * 3 + 3 and everything - head == whole


def test_rates_fall_from_layer_to_layer(weights):
    encoder, config = load_encoder(str(weights))
    settings = SegmentConfig(masks="", layer_decay=0.5, weight_decay=0.1).resolved(config.model_copy())
    model = Segmenter(DenseEncoder(encoder, config), build_head(settings, 32, 3))
    groups = layer_decay_groups(model, settings.weight_decay, settings.layer_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    told = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert len(told) == sum(p.requires_grad for p in model.parameters())
    assert told["head.fuse.0.weight"] == (1, 0.1) and told["head.fuse.1.weight"] == (1, 0)
    assert told["encoder.encoder.blocks.layers.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert told["encoder.encoder.blocks.layers.0.attn.qkv.bias"] == (0.25, 0)
    assert told["encoder.encoder.patch_embed.weight"] == (0.125, 0.1)
    assert told["encoder.encoder.cls_token"] == (0.125, 0)


def test_the_rate_rises_and_falls_linearly():
    config = SegmentConfig(masks="", warmup_steps=3)
    told = [learning_rate_factor(config, step, 8) for step in range(8)]
    wanted = [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, *(1 - step / 8 for step in range(3, 8))]
    assert told == pytest.approx(wanted)
    assert steps_of(SegmentConfig(masks="x", epochs=100), 20_210) == 126_312


def test_heads_start_from_the_seed_alone(weights):
    config = SegmentConfig(masks="", width=8)
    torch.manual_seed(1)
    first = build_head(config, 32, 3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = build_head(config, 32, 3).state_dict()
    other = build_head(config.model_copy(update={"seed": 1}), 32, 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fuse.0.weight"], other["fuse.0.weight"])


def test_bad_input_is_one_line(command, sets, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("a\nb\n")
    refused = {
        "masks is not set": [{"masks": None}],
        "masks '/nowhere' of --data is no folder": [{"masks": "/nowhere"}],
        "crop=500; expected a multiple of 8": ["crop=500"],
        "crop=8; expected a multiple of 8, the encoder's patch size, from 16 on": ["crop=8"],
        "make 112 steps of batch_size=16; expected more than warmup_steps=1500": [],
        "width=8 with head='linear'; expected head='upernet'": ["head=linear", "width=8"],
        "layer_decay=0.5 with trainable=False; expected trainable=True": ["head=linear", "layer_decay=0.5"],
        "scale=[2.0, 1.0]; expected 0 < lowest": ["scale=[2,1]"],
        "head='fpn'; expected 'upernet' or 'linear'": ["head=fpn"],
        "test_share=0.5 with --test": ["test_share=0.5"],
        "test_masks='x' without --test": ["test_masks=x", {"test": None}],
        "is --data; expected other images": [{"test": sets[0]}],
        "holds value 2; expected at most 1, the last of 2 classes": [f"names={tmp_path}/names.txt"],
        "holds value 255; expected at most 1, the last of 2 classes, or ignore=0": [
            f"names={tmp_path}/names.txt",
            "ignore=0",
        ],
        "nowhere.txt: No such file": ["names=nowhere.txt"],
    }
    for shown, words in refused.items():
        changed = next((word for word in words if isinstance(word, dict)), {})
        assert command(*(word for word in words if isinstance(word, str)), **changed) == 2, shown
        told = capsys.readouterr().err
        assert shown in told and told.count("\n") == 1, told


def test_the_small_recipe_is_of_this_protocol():
    from fastmim import recipes

    config = recipes.load_evaluation(SegmentConfig, "segment", "segment_small", ["masks=x"])
    assert config.head == "upernet" and config.crop == 96 and config.lr > SegmentConfig(masks="x").lr
