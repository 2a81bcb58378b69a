"""Where a step's time goes by kind: every operation has one kind, and what an optimiser calls is the optimiser's."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

from benchmarks import breakdown, contenders, peers, report
from tests.benchmarks.test_peers import SMALL
from tests.benchmarks.test_report import KEYS


def kinds_of(run) -> dict[str, set[str]]:
    """Names of the operations of each kind."""
    found: dict[str, set[str]] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    for event in profiler.events():
        found.setdefault(breakdown.kind_of(event), set()).add(event.name)
    return found


def test_each_operation_is_of_one_kind():
    linear, tokens = torch.nn.Linear(8, 8), torch.randn(2, 5, 8)
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)

    def run():
        x = F.gelu(F.layer_norm(linear(tokens), (8,)))
        x = torch.cat([x, x.clone()], 1)
        scores = (x @ x.transpose(1, 2)).softmax(-1)
        (scores @ x).sum().backward()
        optimizer.step()

    found = kinds_of(run)
    assert {"aten::addmm", "aten::mm"} <= found[breakdown.LINEARS]
    assert {"aten::bmm", "aten::_softmax", "aten::_softmax_backward_data"} <= found[breakdown.ATTENTION]
    assert {"aten::native_layer_norm", "aten::native_layer_norm_backward"} <= found["LayerNorm"]
    assert {"aten::gelu", "aten::gelu_backward"} <= found["GELU"]
    assert {"aten::cat", "aten::copy_"} <= found["copies"] and "aten::sum" in found["sums"]
    assert "aten::_fused_adamw_" in found[breakdown.OPTIMISER]


def test_a_step_spends_seconds_on_what_it_calls_alone():
    left = torch.randn(80, 80)
    spent = breakdown.seconds_by_kind(lambda: (left @ left).mul(2))
    assert set(spent) == set(breakdown.KINDS)
    assert min(spent[breakdown.LINEARS], spent["sums"]) > 0
    assert spent["GELU"] == spent["LayerNorm"] == spent[breakdown.OPTIMISER] == 0


def test_a_gpu_s_kernels_count_once():
    def event(name, device_us, kind=DeviceType.CPU, annotation=False):
        told = {"name": name, "self_device_time_total": device_us, "cpu_parent": None}
        return SimpleNamespace(**told, device_type=kind, is_user_annotation=annotation)

    events = [
        event("aten::mm", 3e6),
        event("sm90_gemm", 3e6, DeviceType.CUDA),
        event("Optimizer.step#AdamW.step", 5e6, annotation=True),
        event("Optimizer.step#AdamW.step", 5e6, DeviceType.CUDA, annotation=True),
        event("aten::gelu", 1e6),
    ]
    spent = breakdown.sum_by_kind(events, on_cuda=True)
    assert {kind: seconds for kind, seconds in spent.items() if seconds} == {"linears": 3.0, "GELU": 1.0}


def test_the_bound_is_of_the_same_rounds():
    own = {
        "kinds_samples": [
            {"linears": 1.0, "attention": 1.0, "other": 9.0},
            {"linears": 3.0, "attention": 1.0},
        ]
    }
    assert breakdown.bounds(own, {"samples": [3.0, 4.0]}) == [1.5, 1.0]


def test_rows_and_table_of_real_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure_peak_flops", lambda *args: 1e12)
    monkeypatch.setattr(peers, "contenders", lambda path: ["fastmim", "transformers"])
    out = tmp_path / "rows.json"
    breakdown.main(
        [
            *("--sizes", "tiny", "--dtypes", "fp32", "--batch", "4", "--rounds", "1"),
            *("--json", str(out), "--plot", str(tmp_path / "kinds.png"), "--set", *SMALL),
        ]
    )
    stored = json.loads(out.read_text())
    assert [row["variant"] for row in stored["rows"]] == ["fastmim", "transformers"]
    for row in stored["rows"]:
        assert row.keys() == KEYS | {"kinds", "kinds_samples", "products_at_peak_s"}
        assert row["peak_memory_bytes"] > 0 and len(row["kinds_samples"]) == 1
        assert sum(row["kinds"].values()) == pytest.approx(row["median_s"])
        assert min(row["kinds"][kind] for kind in ("linears", "attention", "LayerNorm", "optimiser")) > 0
    assert stored["rows"][1]["ratio"] == 1.0
    assert "| transformers | tiny | fp32 |" in breakdown.tables(stored)["breakdown"]
    assert breakdown.judge(stored["rows"])[0].startswith("tiny fp32: linears and attention are ")
    assert (tmp_path / "kinds.png").read_bytes().startswith(b"\x89PNG")


def test_different_losses_are_not_broken_down(monkeypatch):
    class Step:
        def __init__(self, name, problem):
            self.loss = len(name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def step(self):
            return self.loss

    monkeypatch.setattr(peers, "worker_of", Step)
    problem = contenders.Problem(peers.configure("tiny", 4, SMALL), "fp32", 4)
    with pytest.raises(SystemExit, match="no speed-up is told"):
        breakdown.measure(problem, "tiny", ["fastmim", "transformers"], 1, None)
