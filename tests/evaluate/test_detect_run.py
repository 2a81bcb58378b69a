"""`fastmim evaluate detect`, typed as a user types it, on shapes drawn on photographs."""

import json
import shutil

import pytest
import torch
from PIL import Image

from benchmarks.shapes import KINDS, draw_shapes
from fastmim import recipes
from fastmim.cli import main
from fastmim.evaluate.detect import coco, run
from fastmim.evaluate.detect.coco import FIGURES
from fastmim.evaluate.detect.config import DetectConfig
from fastmim.evaluate.encoder import load_encoder
from fastmim.evaluate.resume import State

WORDS = [
    "head=faster_rcnn",
    "image_size=64",
    "window=3",
    "scale=[0.8,1.2]",
    "width=16",
    "hidden=32",
    "rpn_samples=16",
    "box_samples=16",
    "proposals=30",
    "batch_size=4",
    "epochs=2",
    "warmup_steps=1",
    "lr=0.002",
    "weight_decay=0.05",
    "precision=fp32",
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    draw_shapes(root / "train", 14, 64, 1)
    draw_shapes(root / "test", 5, 64, 2)
    return root / "train", root / "test"


@pytest.fixture
def command(weights, sets, tmp_path):
    """Runs the protocol; returns the exit code. Without `test` no test images are given."""

    def run(*words, out="out", test=True, data=sets[0] / "images"):
        options = ["--weights", weights, "--data", data, "--out", tmp_path / out]
        given = [f"annotations={sets[0] / 'instances.json'}"]
        if test:
            options += ["--test", sets[1] / "images"]
            given += [f"test_annotations={sets[1] / 'instances.json'}"]
        return main(["evaluate", "detect", *map(str, options), *given, *WORDS, *words])

    return run


def result(tmp_path, out="out"):
    return json.loads((tmp_path / out / "eval.json").read_text())


def records(tmp_path, out="out"):
    return [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("head", ["faster_rcnn", "mask_rcnn"])
def test_what_is_written(command, tmp_path, capsys, sets, head):
    assert command(f"head={head}", "epochs=1") == 0
    told = result(tmp_path)
    keys = ["box", "mask"] if head == "mask_rcnn" else ["box"]
    assert all(tuple(told[key]) == FIGURES for key in keys) and ("mask" in told) == (head == "mask_rcnn")
    truth = json.loads((sets[1] / "instances.json").read_text())["annotations"]
    assert tuple(told["per_class"]) == KINDS
    counts = {name: row["objects"] for name, row in told["per_class"].items()}
    assert counts == {
        name: sum(each["category_id"] == kind for each in truth) for kind, name in enumerate(KINDS, 1)
    }
    assert told["test"]["objects"] == len(truth) and told["settings"]["drop_path"] == 0.1
    assert set(told["train_losses"]) == set(records(tmp_path)[0]) & set(told["train_losses"])
    with Image.open(tmp_path / "out" / "confusion.png") as drawn:
        assert drawn.size[0] > 200
    with Image.open(tmp_path / "out" / "predictions.png") as drawn:
        assert drawn.size[0] > 200 and drawn.size[1] > drawn.size[0]
    assert f"box AP {told['box']['AP']:.2%}" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*unfinished*"))
    assert command(f"head={head}", "epochs=1") == 0
    assert "is there already" in capsys.readouterr().out


def test_training_lowers_the_loss(command, tmp_path):
    assert command("epochs=6", "pictures=0", "window=null") == 0
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert [record["step"] for record in records(tmp_path)] == [3, 6, 9, 12, 15, 18]
    assert not (tmp_path / "out" / "predictions.png").exists()


def test_a_stopped_evaluation_goes_on_to_the_same_numbers(command, tmp_path, monkeypatch):
    words = ["epochs=3", "pictures=0"]
    assert command(*words) == 0
    save, saved = State.save, []

    def stopping(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        command(*words, out="stopped")
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7}\n')  # of an epoch that was not finished
    assert command(*words, "seed=1", out="stopped") == 2  # it is of another evaluation
    assert command(*words, out="stopped") == 0 and len(saved) == 3
    once, resumed = result(tmp_path), result(tmp_path, "stopped")
    assert once | {"seconds": 0} == resumed | {"seconds": 0}
    speed = {"images_per_s": 0}
    told = [[record | speed for record in records(tmp_path, out)] for out in ("out", "stopped")]
    assert told[0] == told[1] and len(told[0]) == 3


def test_training_starts_from_the_weights(command, weights, monkeypatch, tmp_path):
    models = []

    def stop(model, job):
        models.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_detector", stop)
    with pytest.raises(KeyboardInterrupt):
        command()
    encoder, _ = load_encoder(str(weights))
    found = models[0].network.backbone.encoder.encoder.state_dict()
    wanted = encoder.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_frozen_encoder_is_not_changed_and_a_trained_one_is(command, weights, monkeypatch):
    models = []
    detect = run.detect
    monkeypatch.setattr(run, "detect", lambda model, *rest: models.append(model) or detect(model, *rest))
    assert command("epochs=1", "trainable=false", "pictures=0", out="a") == 0
    assert command("epochs=1", "pictures=0", out="b") == 0
    wanted = load_encoder(str(weights))[0].patch_embed.weight
    frozen, trained = (model.network.backbone.encoder.encoder.patch_embed.weight for model in models)
    assert torch.equal(frozen, wanted) and not torch.equal(trained, wanted)


def test_without_test_images_a_share_is_held_out_and_batches_can_be_accumulated(command, tmp_path):
    assert command("epochs=1", "accumulation=2", "test_share=0.3", test=False) == 0
    told = result(tmp_path)
    assert (told["train"]["images"], told["test"]["images"]) == (10, 4)


def test_one_folder_may_hold_both(command, sets, tmp_path, capsys):
    folder = tmp_path / "both"
    folder.mkdir()
    told = {}
    for part in sets:
        told[part] = json.loads((part / "instances.json").read_text())
        for image in told[part]["images"]:
            name = f"{part.name}-{image['file_name']}"
            shutil.copy(part / "images" / image["file_name"], folder / name)
            image["file_name"] = name
        (tmp_path / f"{part.name}.json").write_text(json.dumps(told[part]))
    paths = [f"annotations={tmp_path}/train.json", f"test_annotations={tmp_path}/test.json"]
    few = ["epochs=1", "pictures=0"]
    options = ["--data", folder, "--test", folder, *paths, *WORDS, *few, "--out", tmp_path / "out"]
    weights = tmp_path / "weights.safetensors"
    start = ["evaluate", "detect", "--weights", weights]
    assert main([str(word) for word in [*start, *options]]) == 0
    assert result(tmp_path)["test"]["images"] == 5
    told[sets[1]]["images"].append(told[sets[0]]["images"][3] | {"id": 1000})
    (tmp_path / "test.json").write_text(json.dumps(told[sets[1]]))
    assert main([str(word) for word in [*start, *options]]) == 2
    shown = capsys.readouterr().err
    assert "train-0003.png and 0 more are in annotations and in test_annotations" in shown


def test_bad_input_is_one_line(command, sets, capsys, monkeypatch):
    refused = {
        "image_size=60; expected a multiple of 32, 4 of the encoder's patches": ["image_size=60"],
        "head='yolo'; expected": ["head=yolo"],
        "layer_decay=0.5 with trainable=False; expected trainable=True": [
            "trainable=false",
            "layer_decay=0.5",
        ],
        "scale=[2.0, 1.0]; expected 0 < lowest": ["scale=[2,1]"],
        "decay_at=[0.9, 0.5]; expected ascending": ["decay_at=[0.9,0.5]"],
        "batch_size=4; expected a multiple of accumulation=3": ["accumulation=3"],
        "batch_size=64; expected at most the 14 training images": ["batch_size=64"],
        "make 6 steps of batch_size=4; expected more than warmup_steps=250": ["warmup_steps=250"],
        "test_share=0.5 with --test": ["test_share=0.5"],
        "test_annotations='x' without --test": ["test_annotations=x", {"test": False}],
        "nowhere.json: No such file": ["annotations=nowhere.json"],
        "names 0005.png, which is not in": [{"data": sets[1] / "images"}],
    }
    for shown, words in refused.items():
        changed = next((word for word in words if isinstance(word, dict)), {})
        assert command(*(word for word in words if isinstance(word, str)), **changed) == 2, shown
        told = capsys.readouterr().err
        assert shown in told and told.count("\n") == 1, told
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    assert command() == 2
    assert "pip install 'fastmim[detect]'" in capsys.readouterr().err


def test_the_small_recipe_is_of_this_protocol():
    config = recipes.load_evaluation(DetectConfig, "detect", "detect_small", ["annotations=x"])
    assert config.head == "faster_rcnn" and config.window is None and not config.masks
