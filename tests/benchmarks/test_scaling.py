"""The communication model by hand, and two real ranks that are timed."""

import argparse
import json
import os
from unittest import mock

import pytest
from deepspeed import comm as distributed

from benchmarks import collectives, scaling
from benchmarks.communication import ROUNDS, Link, Step, communication_seconds, efficiency, step_seconds
from benchmarks.gloo import Group
from benchmarks.predicted_gpus import GPUS, predict
from tests.benchmarks.test_report import KEYS

STEP = Step(compute=1.0, update=0.4, gradient_bytes=10**9)
FAST = Link(dict.fromkeys(ROUNDS, 1e9), latency=0.0)


def test_bytes_of_a_step_by_stage():
    # Two ranks exchange half of the bytes in each round: two of a sum, one of a gathering or a scattered sum.
    assert [communication_seconds(STEP, 2, stage, FAST) for stage in range(4)] == [1.0, 1.5, 1.5, 1.0]
    assert communication_seconds(STEP, 1, 3, FAST) == 0
    near = Link(dict.fromkeys(ROUNDS, float("inf")), 0.01)
    assert [communication_seconds(STEP, 8, stage, near) for stage in (0, 3)] == pytest.approx([0.06, 0.06])


def test_each_collective_has_a_bandwidth():
    link = Link({"all_reduce": 1e9, "all_gather": 5e8, "reduce_scatter": 2.5e8}, 0.0)
    assert [communication_seconds(STEP, 2, stage, link) for stage in range(4)] == [1.0, 2.0, 2.0, 3.0]


def test_seconds_of_a_step():
    assert step_seconds(STEP, 2, 0, FAST) == pytest.approx(1.0 + 0.4 + 1.0)
    assert step_seconds(STEP, 2, 1, FAST) == pytest.approx(1.0 + 0.2 + 1.5)
    assert step_seconds(STEP, 4, 3, FAST) == pytest.approx(1.0 + 0.1 + 2 * 0.75)
    # Without ZeRO nothing hides, at stage 1 the sum does, at stage 3 all.
    hidden = [step_seconds(STEP, 2, stage, FAST, overlap=1.0) for stage in (0, 1, 3)]
    assert hidden == pytest.approx([1.0 + 0.4 + 1.0, 1.0 + 0.2 + 0.5, 1.0 + 0.2])
    slow = Link(dict.fromkeys(ROUNDS, 1e8), latency=0.0)
    # Ten seconds on the wire cannot hide behind one of computation.
    assert step_seconds(STEP, 2, 3, slow, overlap=1.0) == pytest.approx(1.0 + 0.2 + 10 - 1.0)
    assert efficiency(STEP, 1, 1, FAST) == 1.0


def test_prediction_of_gpus():
    rows = predict("base", [0, 3])
    assert [row["gpus"] for row in rows] == 2 * list(GPUS)
    for row in rows:
        assert row["efficiency"] <= row["efficiency_overlapped"]
    within, across = rows[0], rows[1]
    assert within["communication_s"] < across["communication_s"] < rows[-1]["communication_s"]


def test_two_ranks_are_timed(pair, tiny):
    words = [word for word in tiny if not word.startswith("optim")]
    built = pair.call(scaling.build, words, 1, 2, True)
    assert pair.call(scaling.count_gathers, 1) == [2, 2]  # a buffer with weight decay, and one without
    assert built[0]["flops"] == built[1]["flops"] > 0
    for seconds, update in pair.call(scaling.time_steps, 1, 1):
        assert 0 < update < seconds
    link = collectives.measure_link(pair, 10**5 + 1, "fp32", gathers=3)
    assert link.bandwidth.keys() == ROUNDS.keys()
    assert all(bandwidth > 0 for bandwidth in link.bandwidth.values()) and link.latency > 0


def _called_in_a_step(stage):
    """Which class updates, and whether gradients are handed to a sum over ranks."""
    step = scaling._STEPS[stage]
    with mock.patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as summed:
        step.step()
    sizes = [call.args[0].numel() for call in summed.call_args_list]
    return type(step.engine.optimizer).__name__, sum(sizes) >= sum(
        parameter.numel() for parameter in step.objective.parameters()
    )


@pytest.mark.parametrize(("stage", "name"), [(0, "GuardedAdamW"), (1, "DeepSpeedZeroOptimizer")])
def test_one_rank_does_what_one_of_several_does(tiny, stage, name):
    words = [word for word in tiny if not word.startswith("optim")]
    with Group(1, 1) as alone, Group(1, 1) as several:
        losses = [
            group.call(scaling.build, words, stage, 2, as_several)[0]["loss"]
            for group, as_several in ((alone, False), (several, True))
        ]
        assert losses[0] == losses[1]
        assert alone.call(_called_in_a_step, stage) == [("GuardedAdamW", False)]
        assert several.call(_called_in_a_step, stage) == [(name, True)]


def test_rows_tell_which_stage_computed_them(tiny):
    words = [word for word in tiny if not word.startswith("optim")]
    args = argparse.Namespace(overrides=words, images=2, rounds=1, steps=1)
    rows = scaling.measure_stage(1, args)
    names = ["1 rank (ZeRO 0)", "2 ranks, not joined", "2 ranks"]
    assert [row["variant"] for row in rows] == names
    for row, ranks in zip(rows, (1, 2, 2), strict=True):
        assert row.keys() > KEYS
        assert row["ratio"] == pytest.approx(ranks * row["weak_efficiency"])
        assert row["flops"] == ranks * rows[0]["flops"] and row["peak_memory_bytes"] > 0 and row["mfu"] > 0
    step = Step(*(rows[-1][key] for key in ("compute_s", "update_s")), 0)
    free = Link(dict.fromkeys(ROUNDS, 1.0), 0.0)
    sent = rows[-1]["communication_s"]
    assert rows[-1]["predicted_s"] == pytest.approx(step_seconds(step, 2, 1, free) + sent)


def test_tables():
    measured = {
        **{"size": "s", "dtype": "fp32", "median_s": 0.1, "p20_s": 0.1, "p80_s": 0.2, "images_per_s": 20.0},
        **{"ratio": 1.5, "weak_efficiency": 0.75, "predicted_s": None},
    }
    # Of 80 ms half an update of 20 is left out, and 20 are sent: 90 in each round.
    apart = {"variant": "2 ranks, not joined", "samples": [0.08, 0.08], "update_samples": [0.02, 0.02]}
    joined = {"variant": "2 ranks", "samples": [0.1, 0.075], "stage": 1, "communication_s": 0.02}
    rows = [measured | apart, measured | joined | {"predicted_s": 0.09}]
    predicted = predict("base", [1])
    made = scaling.tables({"rows": rows, "predicted": predicted})
    assert (
        "| s | fp32 | 2 ranks | 100 | 100–200 | 20.0 | 1.50 | 75% | 90 | 20 | +5% | -10% to +20% |"
        in made["scaling"]
    )
    assert len(made["scaling_model"].splitlines()) == 2 + len(GPUS)


def test_on_one_gpu_only_the_model_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "count_gpus", lambda: 1)
    scaling.main(["--json", str(tmp_path / "rows.json")])
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["rows"] == [] and {row["stage"] for row in stored["predicted"]} == {0, 1, 2, 3}
    assert "one GPU: two ranks are not measured" in capsys.readouterr().err


@pytest.mark.parametrize(("visible", "left"), [("", "1"), ("4,6", "6")])
def test_a_group_beside_another_has_the_next_gpu(visible, left):
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible}):
        with Group(1, 1, gpu=1) as group:
            assert group.call(os.getenv, "CUDA_VISIBLE_DEVICES") == [left]
        with Group(1, 1) as group:
            assert group.call(os.getenv, "CUDA_VISIBLE_DEVICES") == [visible]
