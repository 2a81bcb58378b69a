"""What timing scripts share: the keys of a row, the refusal to compare what differs, and whose memory is measured."""

import argparse
import importlib.metadata
import json

import pytest
import torch

from benchmarks import harness, report

KEYS = {
    *("variant", "size", "dtype", "median_s", "p20_s", "p80_s", "images_per_s", "flops", "mfu"),
    *("peak_memory_bytes", "ratio", "ratio_range", "flop_ratio", "efficiency", "samples"),
}
MIB = 2**20


def row_of(samples, baseline):
    return report.timed_row(
        *("ours", "base", "bf16", samples),
        baseline=baseline,
        images=8,
        flops=2e9,
        baseline_flops=6e9,
        peak_memory=5 * MIB,
        note="further",
    )


def hold(mebibytes):
    """Peak memory of a process that held so much for a moment."""
    memory = report.PeakMemory(torch.device("cpu"))
    torch.ones(mebibytes * MIB, dtype=torch.uint8)
    return memory.bytes()


@pytest.fixture
def rate(monkeypatch):
    """Of a machine that slows down: each product is half as fast as the one before, from 8 GFLOP/s."""
    made = report.PeakRate(torch.device("cpu"))
    monkeypatch.setattr(report, "measure_peak_flops", lambda *_: 8e9 / 2 ** len(made.samples.get("bf16", ())))
    return made


def test_a_row_has_every_key_and_its_ratios_are_of_the_same_rounds(rate):
    row = row_of([1.0, 2.0, 4.0], [2.0, 8.0, 8.0])
    assert row.keys() == KEYS | {"note"}
    assert (row["median_s"], row["ratio"], row["flop_ratio"]) == (2.0, 2.0, 3.0)
    assert row["images_per_s"] == 4.0 and row["ratio_range"] == [2.0, 4.0]
    assert row["efficiency"] == pytest.approx(2 / 3)
    for _ in range(2):
        rate.measure("bf16")
    assert rate.fill([row])[0]["mfu"] == 0.125 and rate.samples == {"bf16": [8e9, 4e9]}
    table = report.timed_table([row], ("note",))
    assert (
        "| ours | base | bf16 | 2000 | 1000–4000 | 4.0 | 2 | 12% | 5 | 2.00 | 2.00–4.00 | 3.00 | 0.67 | further |"
        in table
    )


def test_a_row_without_flops_has_no_mfu(rate):
    row = report.timed_row("ours", "base", "bf16", [1.0], baseline=[1.0], images=8)
    assert rate.fill([row]) == [row] and row["mfu"] is None


def test_contenders_that_differ_are_not_compared():
    report.require_same({"a": 1.0, "b": 1.0009, "c": 0.9991}, 1e-3)
    with pytest.raises(SystemExit, match=r"c has the loss 1\.002, a 1;"):
        report.require_same({"a": 1.0, "b": 1.0, "c": 1.002}, 1e-3)
    with pytest.raises(SystemExit, match="b has the loss nan"):
        report.require_same({"a": 1.0, "b": float("nan")}, 1e-3)


def test_memory_is_that_of_the_child():
    held = torch.ones(300 * MIB, dtype=torch.uint8)
    assert 96 * MIB < report.in_child(hold, 96) < 160 * MIB
    assert held.numel()


def test_rows_are_stored_with_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    parser = argparse.ArgumentParser()
    report.add_options(parser)
    written = report.store("some", [{"variant": "ours"}], parser.parse_args([]))
    assert json.loads((tmp_path / "results" / "some.json").read_text()) == written
    assert (
        written["rows"] == [{"variant": "ours"}] and {"cores", "torch", "commit"} <= written["machine"].keys()
    )
    assert written["machine"]["libraries"]["timm"] == importlib.metadata.version("timm")
    other = tmp_path / "rows" / "other.json"
    report.store("other", [], parser.parse_args(["--json", str(other)]))
    assert other.exists() and not (tmp_path / "results" / "other.json").exists()


@pytest.mark.parametrize(
    ("precision", "dtypes", "told"), [("bf16", ["bf16", "fp32"], "with"), ("fp32", ["fp32"], "without")]
)
def test_dtypes_that_are_emulated_are_left_out_and_told(precision, dtypes, told, monkeypatch):
    monkeypatch.setattr(harness, "choose_precision", lambda wanted, device: precision)
    assert list(harness.computed_dtypes("cpu")) == dtypes
    assert harness.describe_machine("cpu")["device"].endswith(f", {told} bf16)")
