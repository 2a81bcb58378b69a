"""The tables of what pre-training is worth: every part runs, is kept, and lands in the page."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plain_vitmae, pretraining, representation
from benchmarks.kept import tell
from benchmarks.labelled_sets import SETS, LabelledSet, StoredFeatures, pixels, share_of
from benchmarks.markdown import fill
from fastmim import recipes

PAGE = Path(representation.ROOT) / "docs" / "evaluation.md"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """In place of Fashion-MNIST, stripes whose direction tells the class."""
    random = np.random.default_rng(0)
    for name, n in {"train": 120, "test": 60}.items():
        labels = np.arange(n) % 3
        stripes = (
            np.add.outer(np.arange(28), np.array([0, 1, 2]) * np.arange(28)[:, None]).transpose(2, 0, 1) % 6
        )
        images = 40 * stripes[labels] + random.integers(0, 16, (n, 28, 28))
        np.save(tmp_path / f"{name}.npy", images.astype(np.uint8)[..., None])
        np.save(tmp_path / f"{name}_labels.npy", labels)
    places = {
        key: str(tmp_path / f"{name}.npy")
        for key, name in {
            "train": "train",
            "test": "test",
            "labels": "train_labels",
            "test_labels": "test_labels",
        }.items()
    }
    labelled = replace(
        SETS["fashion_mnist"], prepare=lambda: None, shares=(0.2, 1.0), draws=2, epochs={0.2: 1}, **places
    )
    monkeypatch.setitem(SETS, "fashion_mnist", labelled)
    return labelled


def test_a_quick_call_makes_every_row_and_keeps_it(small, tmp_path, monkeypatch, capsys):
    words = [
        "fashion_mnist",
        "--quick",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    representation.main(words)
    told = json.loads((tmp_path / "out.json").read_text())
    text = capsys.readouterr().out
    rows = told["rows"]
    assert rows["pre-training"]["images"] == 64
    for protocol in ("linear", "knn"):
        for name in (representation.OURS, representation.RANDOM, representation.PIXELS):
            assert len(rows[f"{protocol}, {name}, 0.2"]["accuracy"]) == 2
            assert len(rows[f"{protocol}, {name}, 1"]["accuracy"]) == 1
    assert rows["linear, raw pixels, 1"]["accuracy"][0] > 0.9
    for protocol in ("partial", "full"):
        assert f"| {protocol} | 20% | " in text and f"{protocol}, random weights, 0.2" in rows
        assert f"{protocol}, raw pixels, 0.2" not in rows
    representation.main(words)
    assert capsys.readouterr().out == text and json.loads((tmp_path / "out.json").read_text()) == told
    with pytest.raises(SystemExit, match=r"results.json is of .*'quick': True"):
        representation.main([*words, "--minutes", "3"])
    race_is_run(words, monkeypatch, capsys)


def race_is_run(words, monkeypatch, capsys):
    """The same folder again: a plain loop follows the run's settings from its initial weights, and is probed."""

    def run(command):
        config, initial, folder, seconds, _ = command[3:]
        assert float(seconds) > 1
        plain_vitmae.train(recipes.load(config), Path(initial), Path(folder), time.monotonic(), 1e-3, 0)
        return 1e-3

    monkeypatch.setattr(pretraining, "run_process", run)
    representation.main([*words, "--equal-time"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| trained by | minutes | images seen | linear, 20% of labels | linear, 100% of labels |"
    )
    ours, plain = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert ours[0] == "fastmim, launch.py" and ours[2] == "64"
    assert plain[0] == "transformers, plain loop" and plain[2] == "16"  # one step, however short the time


def test_shares_are_stratified_and_draws_differ(small):
    train, _ = small.read(recipes.load("fashion_mnist"))
    first, again, other = (share_of(train, 0.1, draw) for draw in (0, 0, 1))
    assert np.bincount(first.labels).tolist() == [4, 4, 4]
    assert np.array_equal(first.rows, again.rows) and not np.array_equal(first.rows, other.rows)
    assert share_of(train, 1.0, 0) is train


@pytest.mark.parametrize(("images", "batch"), [(3, 1), (25, 8), (246, 64), (60_000, 64)])
def test_fine_tuning_has_one_peak_rate_whatever_the_batch(images, batch):
    words = representation.batch_and_rate(images)
    config = recipes.load_evaluation(representation.PROTOCOLS["finetune"].config, "finetune", None, words)
    assert config.batch_size == batch
    assert config.blr * batch / 256 == pytest.approx(representation.PEAK_LR)


def test_stored_features_are_those_of_the_images_that_are_asked_for(small):
    config = recipes.load("fashion_mnist")
    train, test = small.read(config)
    some = share_of(train, 0.5, 0)
    stored = StoredFeatures((some, test), pixels(config))
    asked = share_of(some, 0.2, 1)
    wanted = np.load(small.train)[asked.rows].reshape(len(asked), -1) / 255
    np.testing.assert_allclose(stored.centre(asked).numpy(), wanted, rtol=1e-6)
    assert stored.centre(test).shape == (60, 784)


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_of_a_recipe_and_has_its_place_in_the_page(name):
    labelled = SETS[name]
    assert recipes.load(labelled.recipe).data.source == labelled.train
    assert labelled.epochs.keys() <= set(labelled.shares)
    assert f"<!-- table: {name} -->" in PAGE.read_text()


def test_tables_tell_means_spreads_and_what_is_missing():
    labelled = LabelledSet(
        "Things", "recipe", lambda: None, *[""] * 4, minutes=1, epochs={0.1: 1}, shares=(0.1, 1.0)
    )
    rows = {
        "pre-training": {"run_seconds": 60.0, "images": 1280, "seconds": 70},
        "linear, pre-trained, 0.1": {"accuracy": [0.5, 0.7], "seconds": 10},
        "full, random weights, 0.1": {"accuracy": [0.25], "seconds": 40},
    }
    text = representation.accuracy_table({"rows": rows, "machine": {"cores": 2}}, labelled)
    assert text.splitlines()[2:] == [
        "| linear | 10% | 60.0 ± 14.1 | – | – |",
        "| full | 10% | – | 25.0 | – |",
        "",
        "Things: 1 minutes of pre-training on 1,280 images, 2 minutes in all, on 2 cores.",
    ]
    page = "<!-- table: things -->\n<!-- end -->\n<!-- table: other -->\nkept\n<!-- end -->"
    filled = fill(page, {"things": text}, partly=True)
    assert "| full |" in filled and filled.endswith("<!-- table: other -->\nkept\n<!-- end -->")


def test_a_table_reaches_the_page_and_its_rows_the_folder_beside_it(tmp_path, capsys):
    page = tmp_path / "evaluation.md"
    page.write_text("<!-- table: race -->\nold\n<!-- end -->\n<!-- table: other -->\nkept\n<!-- end -->\n")
    told = {"rows": {"pre-training": {"images": 64}}}
    tell(argparse.Namespace(json=None, docs=tmp_path), told, "things", "race", "| new |")
    assert capsys.readouterr().out == "| new |\n"
    filled = "<!-- table: race -->\n| new |\n<!-- end -->\n<!-- table: other -->\nkept\n<!-- end -->\n"
    assert page.read_text() == filled
    assert json.loads((tmp_path / "results" / "things.json").read_text()) == told


def test_quick_accuracies_are_not_documented(capsys):
    with pytest.raises(SystemExit):
        representation.main(["photographs", "--quick", "--docs", "docs"])
    assert "--docs with --quick" in capsys.readouterr().err
