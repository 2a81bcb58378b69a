"""`fastmim evaluate`, typed as a user types it, on pictures whose classes any encoder can tell apart."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmim.cli import main
from fastmim.data.index import build_index
from fastmim.data.loader import load_images
from fastmim.evaluate import features, resume
from fastmim.evaluate.config import KnnConfig
from fastmim.evaluate.encoder import load_encoder
from fastmim.evaluate.features import FeatureExtractor, pooled
from fastmim.evaluate.labels import read_labelled
from fastmim.exchange.outward import export_weights
from fastmim.masking import mask_from_order
from tests.launching import run_command


@pytest.fixture
def command(weights, train_folder, test_folder, tmp_path):
    """Runs a protocol; returns the exit code, or with `run=False` the words. None leaves an option out."""

    def build(protocol, *words, data=train_folder, test=test_folder, out="out", weights=weights, run=True):
        options = {"--weights": weights, "--data": data, "--test": test, "--out": tmp_path / out}
        given = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
        words = ["evaluate", protocol, *given, *words]
        return main(words) if run else words

    return build


def result(tmp_path, out="out"):
    return json.loads((tmp_path / out / "eval.json").read_text())


HALVES = (slice(0, 2), slice(2, 4))
LARS = ["blr=[0.01,200]", "batch_size=6", "epochs=40", "warmup_epochs=1", "pool=mean", "scale=[0.5,1]"]


@pytest.mark.parametrize(
    "protocol, words",
    [
        ("knn", ["k=5"]),
        ("linear", LARS),
        ("linear", ["solver=exact", "l2=[0.001,100]", "pool=mean"]),
        ("few_shot", ["shots=3", "draws=4"]),
    ],
)
def test_separable_classes_are_told_apart_and_again_alike(command, tmp_path, capsys, protocol, words):
    assert command(protocol, *words) == 0
    assert "3 classes" in capsys.readouterr().out
    told = result(tmp_path)
    assert told["top1"] > 0.85 and told["mean_class_top1"] > 0.85 and "top5" not in told
    draws = 4 if protocol == "few_shot" else 1
    assert {name: row["images"] for name, row in told["per_class"].items()} == {
        "blue": 4 * draws,
        "green": 5 * draws,
        "red": 6 * draws,
    }
    assert told["weights"]["step"] == "7" and len(told["weights"]["sha256"]) == 64
    with Image.open(tmp_path / "out" / "confusion.png") as drawn:
        assert drawn.size[0] > 200
    assert command(protocol, *words, out="again") == 0
    again = result(tmp_path, "again")
    assert told | {"seconds": 0} == again | {"seconds": 0}


SGD = ["lr=[0.01,0.4]", "batch_size=6", "epochs=4", "warmup_epochs=1", "scale=[0.5,1]"]


@pytest.mark.parametrize("protocol, words", [("linear", [*LARS, "epochs=4"]), ("attentive", SGD)])
def test_a_stopped_training_goes_on_to_the_same_numbers(command, tmp_path, monkeypatch, protocol, words):
    assert command(protocol, *words) == 0
    views, epochs = FeatureExtractor.epoch, []

    def stopping(self, images, epoch, config):
        if epochs == [0, 1]:
            epochs.append("stopped")
            raise KeyboardInterrupt
        epochs.append(epoch)
        return views(self, images, epoch, config)

    monkeypatch.setattr(FeatureExtractor, "epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        command(protocol, *words, out="stopped")
    assert [path.name for path in (tmp_path / "stopped").glob("*.unfinished")] == [f"{protocol}.unfinished"]
    assert command(protocol, *words, "seed=1", out="stopped") == 2  # it is of another evaluation
    assert command(protocol, *words, out="stopped") == 0
    assert epochs == [0, 1, "stopped", 2, 3]
    assert not list((tmp_path / "stopped").glob("*.unfinished"))
    once, resumed = result(tmp_path), result(tmp_path, "stopped")
    assert once | {"seconds": 0} == resumed | {"seconds": 0}


@pytest.fixture
def decoded(monkeypatch):
    """Images in each batch that was decoded for features, all kept at once; `stop(n)` is a Ctrl-C after n of them."""

    class Batches(list):
        last = None

        def stop(self, batches):
            self.clear()
            self.last = batches

    batches, decode = Batches(), features.decode

    def counting(*args):
        for batch in decode(*args):
            if len(batches) == batches.last:
                batches.last = None
                raise KeyboardInterrupt
            batches.append(len(batch))
            yield batch

    monkeypatch.setattr(features, "decode", counting)
    monkeypatch.setattr(resume, "_SECONDS", 0.0)
    return batches


@pytest.mark.parametrize(
    "protocol, words",
    [
        ("knn", ["k=5"]),
        ("linear", ["solver=exact", "l2=[0.001,100]", "validation=0.2"]),
        ("few_shot", ["shots=8", "draws=3"]),
    ],
)
def test_features_are_kept_when_an_evaluation_is_stopped(command, tmp_path, decoded, protocol, words):
    words = [*words, "images_at_once=5"]
    assert command(protocol, *words) == 0
    whole = list(decoded)
    for stop in (2, len(whole) - 1):  # among training and test images
        decoded.stop(stop)
        with pytest.raises(KeyboardInterrupt):
            command(protocol, *words, out=f"stopped{stop}")
        assert len(list((tmp_path / f"stopped{stop}").glob("*.unfinished"))) == stop
        assert command(protocol, *words, "seed=1", out=f"stopped{stop}") == 2  # it is of another evaluation
        assert command(protocol, *words, out=f"stopped{stop}") == 0
        assert decoded == whole, "an image was seen twice, or not at all"
        assert not list((tmp_path / f"stopped{stop}").glob("*.unfinished"))
        once, resumed = result(tmp_path), result(tmp_path, f"stopped{stop}")
        assert once | {"seconds": 0} == resumed | {"seconds": 0}


def test_two_ranks_go_on_with_the_features_of_one(command, train_folder, tmp_path, decoded):
    train = shutil.copytree(train_folder, tmp_path / "train")
    words = ["k=5", "images_at_once=4"]
    assert command("knn", *words, data=train) == 0
    decoded.stop(10)  # a batch of test images after nine of all training images
    with pytest.raises(KeyboardInterrupt):
        command("knn", *words, data=train, out="stopped")
    for path in train.rglob("*.png"):  # left are both ends, which the index looks at
        content = path.read_bytes()
        path.write_bytes(content[:64] + bytes(len(content) - 76) + content[-12:])
    command("knn", *words, data=train, out="anew")
    assert not (tmp_path / "anew" / "eval.json").exists() or result(tmp_path, "anew")["top1"] < 0.5
    done = run_command(command("knn", *words, data=train, out="stopped", run=False), ranks=2)
    assert done.returncode == 0 and done.stdout.count("eval.json: top-1") == 1, done.stdout + done.stderr
    one, two = result(tmp_path), result(tmp_path, "stopped")
    assert two["versions"]["ranks"] == 2
    assert one["top1"] == two["top1"] and one["per_class"] == two["per_class"]
    assert not list((tmp_path / "stopped").glob("*.unfinished"))


def test_a_sweep_is_decided_by_validation_images(command, tmp_path):
    assert command("linear", "solver=exact", "l2=[1000,0.01]", "validation=0.2") == 0
    rows = result(tmp_path)["sweep"]
    assert [row["l2"] for row in rows] == [1000, 0.01] and result(tmp_path)["train"]["images"] == 36
    best = max(rows, key=lambda row: row["validation_top1"])
    assert best["chosen"] and result(tmp_path)["top1"] == best["test_top1"]
    assert command("linear", "solver=exact", "l2=0.1", out="one") == 0
    (row,) = result(tmp_path, "one")["sweep"]
    assert "validation_top1" not in row and row["chosen"]
    told = result(tmp_path, "one")["settings"]
    assert told.keys() == {"pool", "center", "seed", "precision", "solver", "l2", "max_iterations"}


def test_few_shot_tells_mean_and_spread_over_draws_of_the_seed(command, train_folder, tmp_path):
    # Labels that no picture tells: every draw errs elsewhere.
    names = sorted(path.relative_to(train_folder).as_posix() for path in train_folder.rglob("*.png"))
    rows = [f"{name},{'even' if i % 2 else 'odd'}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    words = ["shots=4", "draws=5", f"labels={tmp_path}/labels.csv"]
    assert command("few_shot", *words, "seed=3", test=None) == 0
    told = result(tmp_path)
    each = [row["top1"] for row in told["draws"]]
    assert len(set(each)) > 1
    assert told["top1"] == pytest.approx(np.mean(each)) and told["top1_std"] == pytest.approx(
        np.std(each, ddof=1)
    )
    assert command("few_shot", *words, "seed=4", test=None, out="other") == 0
    assert [row["top1"] for row in result(tmp_path, "other")["draws"]] != each


def test_features_are_those_of_whole_centre_crops_after_the_last_norm(weights, train_folder):
    encoder, config = load_encoder(str(weights))
    index = build_index(str(train_folder), config.data, progress=False)
    images = load_images(index, config.data, len(index))
    everything = mask_from_order(torch.arange(16).expand(len(images), -1), 16)
    last = encoder(images, everything, every_layer=True)[-1]
    tokens = F.layer_norm(last, (32,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    labelled = read_labelled(str(train_folder), config.data, None, "--data")
    patches = tokens[:, 1:].unflatten(1, (4, 4))
    quarters = [patches[:, rows, columns] for rows in HALVES for columns in HALVES]
    means = torch.cat([quarter.mean((1, 2)) for quarter in quarters], dim=1)
    expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "quadrants": means}
    for pool, wanted in expected.items():
        protocol = KnnConfig(pool=pool, center=1.0, images_at_once=7)
        extractor = FeatureExtractor(encoder, config, protocol)
        told = extractor.centre(labelled)
        assert told.shape == (len(images), extractor.width)
        torch.testing.assert_close(told, wanted, rtol=1e-4, atol=1e-5)


def test_bf16_rounds_features_and_leaves_the_encoder(weights, train_folder):
    encoder, config = load_encoder(str(weights))
    labelled = read_labelled(str(train_folder), config.data, None, "--data")
    exact, rounded = (
        FeatureExtractor(encoder, config, KnnConfig(precision=precision)).centre(labelled)
        for precision in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.float32 and encoder.cls_token.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_quarters_of_an_odd_grid_share_its_middle():
    tokens = torch.arange(3.0 * 5 + 1)[None, :, None]
    # Row 1 and column 2 are in two quarters each, the patch where they cross in all four.
    rows, columns = ((0, 1), (1, 2)), ((0, 1, 2), (2, 3, 4))
    wanted = [np.mean([1 + 5 * r + c for r in some for c in those]) for some in rows for those in columns]
    assert pooled(tokens, "quadrants", (3, 5)).tolist() == [wanted]


def test_without_test_images_a_share_of_each_class_is_held_out(command, tmp_path):
    assert command("knn", "k=5", "test_share=0.25", test=None) == 0
    told = result(tmp_path)
    assert (told["train"]["images"], told["test"]["images"]) == (27, 9)
    assert told["settings"]["test_share"] == 0.25


def test_five_classes_have_a_top_5_and_arrays_their_labels(command, tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(42) % 6
    levels = 20 + 40 * labels[:, None, None, None]
    pixels = np.clip(levels + random.normal(0, 3, (42, 32, 32, 1)), 0, 255).astype(np.uint8)
    np.save(tmp_path / "x.npy", np.repeat(pixels, 3, axis=3))
    np.save(tmp_path / "y.npy", labels)
    words = [f"labels={tmp_path}/y.npy", "k=4"]
    assert command("knn", *words, data=tmp_path / "x.npy", test=None) == 0
    told = result(tmp_path)
    assert told["top1"] > 0.8 and told["top5"] >= told["top1"] and len(told["per_class"]) == 6


def test_a_finished_evaluation_is_kept_and_another_one_is_refused(
    command, weights, make_classes, tmp_path, capsys
):
    assert command("knn", "k=5") == 0
    before = (tmp_path / "out" / "eval.json").stat().st_mtime_ns
    assert command("knn", "k=5", "images_at_once=3") == 0
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "eval.json").stat().st_mtime_ns == before
    assert command("knn", "k=6") == 2
    assert "has k=5, this evaluation 6; expected another --out, or --force" in capsys.readouterr().err
    assert command("knn", "k=5", test=make_classes(seed=9, blue=4, green=5, red=6)) == 2
    assert "eval.json has test.sha256=" in capsys.readouterr().err
    assert command("few_shot") == 2
    assert "has protocol='knn', this evaluation 'few_shot'" in capsys.readouterr().err
    assert command("knn", "k=6", "--force") == 0
    assert result(tmp_path)["settings"]["k"] == 6
    # The same tensors for larger images are another encoder.
    export_weights(str(weights), str(tmp_path / "larger.safetensors"), "fastmim", image_size=(48, 48))
    assert command("knn", "k=6", weights=tmp_path / "larger.safetensors") == 2
    assert "eval.json has weights.image_size=None, this evaluation [48, 48]" in capsys.readouterr().err


def test_bad_input_is_one_line(command, weights, train_folder, make_classes, tmp_path, capsys):
    two = make_classes(blue=2, red=2)
    tensors = load_file(weights)
    tensors["encoder.norm.weight"] = torch.ones(16)
    with safe_open(weights, "pt") as file:
        save_file(tensors, tmp_path / "narrow.safetensors", metadata=file.metadata())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "eval.json").write_text("[]")
    refused = {
        "k=0; expected an integer > 0": ["knn", "k=0"],
        "kk=3: unknown key; did you mean k?": ["knn", "kk=3"],
        "pool='max'; expected 'cls', 'mean' or 'quadrants'": ["knn", "pool=max"],
        "k=37; expected at most the 36 training images": ["knn", "k=37"],
        "batch_size=16384; expected at most the 36 training images": ["linear"],
        "blr=[0.3] with solver='exact'; expected solver='lars'": ["linear", "solver=exact", "blr=0.3"],
        "l2=[1.0] with solver='lars'; expected solver='exact'": ["linear", "l2=1"],
        "validation=0.2 with blr=[0.1]; expected several": ["linear", "validation=0.2"],
        "warmup_epochs=90; expected less than the 90 epochs of an encoder of": ["linear", "warmup_epochs=90"],
        "warmup_epochs=9; expected less than epochs=9": ["attentive", "warmup_epochs=9", "epochs=9"],
        "epochs=None; expected an integer": ["attentive", "epochs=null"],
        "scale=[0.5, 0.2]; expected 0 < lowest": ["linear", "scale=[0.5,0.2]"],
        "shots=11; expected at most the 10 training images of class 'red'": ["few_shot", "shots=11"],
        "test_share=0.5 with --test": ["knn", "test_share=0.5"],
        "the classes of --data and --test differ: --test lacks class 'green'": ["knn", {"test": two}],
        f"--test {train_folder} is --data; expected other images": ["knn", {"test": train_folder}],
        "no labels; expected class folders": ["knn", {"data": two / "red"}],
        "test_labels='a.csv' without --test": ["knn", "test_labels=a.csv", {"test": None}],
        "is no result of an evaluation": ["knn", "k=5", {"out": "taken"}],
        "encoder.norm.weight is [16]; expected [32]": ["knn", {"weights": tmp_path / "narrow.safetensors"}],
        "nowhere.csv: No such file": ["knn", f"labels={tmp_path}/nowhere.csv"],
    }
    for shown, (protocol, *rest) in refused.items():
        changed = next((word for word in rest if isinstance(word, dict)), {})
        assert command(protocol, *(word for word in rest if isinstance(word, str)), **changed) == 2, shown
        told = capsys.readouterr().err
        assert shown in told and told.count("\n") == 1, told


def test_the_configuration_needs_no_torch():
    code = "import sys, fastmim.evaluate.config, fastmim.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
