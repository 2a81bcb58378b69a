"""The comparison of what the encoder sees: the variants differ by that alone, and rows are compared at one ratio."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report, visible_only
from benchmarks.visible_only import BASELINE, SHALLOW, VARIANTS, VISIBLE
from tests.benchmarks.test_report import KEYS

SMALL = [
    *("model.width=32", "model.depth=2", "model.heads=2", "model.patch_size=8", "data.image_size=32"),
    *("objective.decoder_width=16", "objective.decoder_depth=3", "objective.decoder_heads=2"),
]


@pytest.fixture
def configs():
    return visible_only.configs_of("base", 0.75, 2, SMALL)


def test_variants_compute_the_same_where_they_are_meant_to(configs):
    whole, shallow = visible_only.losses_alike(configs)
    assert {*whole, *shallow} > set(VARIANTS)
    for losses in (whole, shallow):
        report.require_same(losses, visible_only.TOLERANCE)
    assert whole[VISIBLE] != shallow[SHALLOW]


@pytest.mark.parametrize(
    "variant, change", [(BASELINE, "objective.decoder_depth=2"), (SHALLOW, "data.std=[1,1,1]")]
)
def test_a_variant_that_differs_otherwise_is_refused(configs, variant, change):
    configs[variant] = visible_only.configure("base", 0.75, 2, [*SMALL, *VARIANTS[variant], change])
    with pytest.raises(SystemExit, match="no speed-up is told"):
        for losses in visible_only.losses_alike(configs):
            report.require_same(losses, visible_only.TOLERANCE)


def test_a_ratio_of_zero_removes_one_patch():
    config = visible_only.configure("base", 0, 2, SMALL)
    assert config.mask.len_keep(config.grid) == 15
    assert visible_only.configure("huge", 0.75, 2, []).grid == (16, 16)


def test_rows_tables_and_curve(monkeypatch, tmp_path):
    seconds = {BASELINE: 4.0, VISIBLE: 2.0, SHALLOW: 1.0}

    def take_turn(problem, steps):
        objective = problem.config.objective
        name = (
            BASELINE
            if objective.mask_token_in_encoder
            else SHALLOW
            if objective.decoder_depth == 1
            else VISIBLE
        )
        return [seconds[name]] * (steps - 1) + [9 * seconds[BASELINE]], 2**20

    monkeypatch.setattr(visible_only, "take_turn", take_turn)
    monkeypatch.setattr(report, "measure_peak_flops", lambda *args: 1e12)
    monkeypatch.setattr(report, "in_child", lambda function, *args: function(*args))
    monkeypatch.setattr(visible_only, "BATCHES", {"base": 2, "large": 2})
    out = tmp_path / "rows.json"
    visible_only.main(
        [
            *(
                "--sizes",
                "large",
                "--curve",
                "large",
                "--ratios",
                "0",
                "0.75",
                "--rounds",
                "2",
                "--steps",
                "3",
            ),
            *("--json", str(out), "--plot", str(tmp_path / "curve.png"), "--set", *SMALL),
        ]
    )
    stored = json.loads(out.read_text())
    assert len(stored["rows"]) == 6  # the paper's ratio is one of the curve's
    assert all(row.keys() == KEYS | {"mask_ratio", "paper", "turns"} for row in stored["rows"])
    row = stored["rows"][1]
    assert (row["variant"], row["ratio"], row["paper"], row["samples"]) == (VISIBLE, 2.0, 2.8, [2.0, 2.0])
    assert row["turns"] == [[2.0, 2.0, 36.0]] * 2
    assert 1 < row["flop_ratio"] < 4 and row["efficiency"] == pytest.approx(2 / row["flop_ratio"])
    tables = visible_only.tables(stored)
    assert tables["visible_only"].endswith(" 3.7 |") and "| 0% | 75% |" in tables["visible_only_curve"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments", [["--ratios", "1"], ["--ratios", "--plot", "x.png"], ["--sizes", "giant"]]
)
def test_arguments_that_cannot_be_are_refused(arguments):
    with pytest.raises(SystemExit):
        visible_only.read_arguments(arguments)


def test_a_gpu_is_given_more_images(monkeypatch):
    args = SimpleNamespace(batch=None)
    assert visible_only.batch_of("large", args) == 16
    monkeypatch.setattr(visible_only, "Ranks", lambda: SimpleNamespace(device=torch.device("cuda")))
    assert visible_only.batch_of("large", args) == 256
    args.batch = 3
    assert visible_only.batch_of("large", args) == 3
