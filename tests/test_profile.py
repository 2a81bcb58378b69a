"""`fastmim profile`: phases that sum to a step, and memory as it is held."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastmim.cli import main
from fastmim.objectives import build_objective
from fastmim.profiling import timeline as timeline_module
from fastmim.profiling.instruments import instrumented
from fastmim.profiling.memory import traced_peak
from fastmim.profiling.timeline import Timeline
from tests.launching import TINY_YAML, run_command, write_images
from tests.objectives.naive_mae import images_of


class Clock:
    """Tells the time that a test set."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timeline_module.time, "perf_counter", lambda: self.now)


def test_a_moment_belongs_to_the_innermost_phase(monkeypatch):
    clock, timeline = Clock(monkeypatch), Timeline(torch.device("cpu"))
    with timeline.phase("before the first step"):
        clock.now = 5.0
    for seconds in (1.0, 2.0):
        timeline.start_step()
        clock.now += 0.125
        with timeline.phase("backward"):
            clock.now += seconds
            with timeline.phase("communication"):
                clock.now += 0.5
            clock.now += seconds
    timeline.start_step()
    assert timeline.seconds(0, 2) == [
        {"other": 0.125, "backward": 2.0, "communication": 0.5},
        {"other": 0.125, "backward": 4.0, "communication": 0.5},
    ]


def test_a_phase_that_raises_is_closed(monkeypatch):
    timeline = Timeline(torch.device("cpu"))
    timeline.start_step()
    with pytest.raises(RuntimeError), timeline.phase("encoder"):
        raise RuntimeError
    timeline.start_step()


class Engine:
    """What a trainer calls of DeepSpeed's."""

    def __init__(self, objective):
        self.module = objective

    def __call__(self, batch):
        return self.module(batch)

    def backward(self, loss):
        loss.backward()

    def step(self):
        return None


def hooks_of(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


PHASES = {
    "mae": {"gather", "encoder", "decoder", "loss"},
    "cae": {"gather", "encoder", "regressor", "decoder", "loss"},
    "r_mae": {"gather", "encoder", "decoder", "second_decoder", "loss"},
    "c_mae": {"gather", "encoder", "decoder", "second_decoder", "projection", "second_projection", "loss"},
    "dvae": {"encoder", "decoder", "loss"},
    "cae_v2": {"gather", "encoder", "regressor", "teacher", "loss"},
}
SMALL = ["objective.decoder_width=16", "objective.decoder_depth=1", "objective.decoder_heads=2"]
OVERRIDES = {
    "cae": ["target.kind=pixels"],
    "cae_v2": [
        *["target.teacher=vit_tiny_patch16_224", "target.teacher_weights=random"],
        *["data.image_size=224", "model.patch_size=16"],
    ],
    "r_mae": SMALL,
    "c_mae": SMALL,
    "dvae": ["objective.hidden=4", "objective.tokens=8"],
}


@pytest.mark.parametrize("name", PHASES)
def test_phases_of_an_objective_come_and_go(tiny_config, name):
    changes = [] if name == "mae" else [f"objective.name={name}"]
    objective = build_objective(tiny_config(*changes, *OVERRIDES.get(name, [])))
    places = torch.arange(2)
    batch = SimpleNamespace(images=images_of(objective.config, 2), epochs=places * 0, positions=places)
    engine, timeline, loader = Engine(objective), Timeline(torch.device("cpu")), [batch] * 4
    trainer = SimpleNamespace(
        engine=engine,
        objective=objective,
        loader=loader,
        ranks=SimpleNamespace(world_size=2),
        config=SimpleNamespace(optim=SimpleNamespace(accumulation=2)),
    )
    hooks, wait, barrier = hooks_of(objective), vars(dist.Work)["wait"], vars(dist.ProcessGroup)["barrier"]
    with instrumented(trainer, timeline, timeline.start_step):
        batches = iter(trainer.loader)
        for _ in range(2):
            for _ in range(2):
                engine.backward(engine(next(batches))["loss"])
                engine.step()
        timeline.start_step()
    first, second = timeline.seconds(0, 2)
    assert first.keys() == second.keys() == PHASES[name] | {"data", "backward", "optimiser", "other"}
    modules = set(objective.module_flops()) - {"patch_embed", "head", "second_head", "contrast"}
    assert modules <= PHASES[name]  # so that their FLOPs have a time
    # A run that is not profiled has no hook, no range and torch's own collectives.
    assert hooks_of(objective) == hooks and trainer.loader is loader
    assert vars(engine).keys() == {"module"} and "sample_mask" not in vars(objective)
    assert vars(dist.Work)["wait"] is wait and vars(dist.ProcessGroup)["barrier"] is barrier


def test_the_peak_of_a_trace_is_above_its_start():
    def event(ts, size, device=0):
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": size, "Device Type": device}}

    events = [event(4, -300), event(1, 100), event(2, 250), event(3, 10**6, device=1), {"name": "aten::mm"}]
    assert traced_peak([*events, event(5, 200)]) == 350


def arguments(folder, *overrides):
    out = ["--out", str(folder / "out"), "--json", str(folder / "deep" / "figures.json")]
    steps = ["--steps", "2", "--warmup", "1"]
    return ["profile", str(folder / "tiny.yaml"), *out, *steps, f"data.source={folder}/images", *overrides]


def profiled(tmp_path, *overrides, ranks=1):
    """What the command says, its figures and its trace, of real JPEGs."""
    write_images(tmp_path / "images", 8, suffix=".jpg")
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    done = run_command(arguments(tmp_path, *overrides), ranks, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "deep" / "figures.json").read_text())
    return done.stdout, figures, json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]


def test_the_command_tells_time_flops_memory_and_writes_a_trace(tmp_path):
    told, figures, trace = profiled(tmp_path, "output=run", "optim.accumulation=2", "optim.epochs=1.5")
    assert "2 steps of 8 images in 2 parts" in told and "peak resident in the process" in told
    rows = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+)%", told, flags=re.MULTILINE))
    assert sum(map(float, rows.values())) == pytest.approx(200, abs=1)  # the phases, and the step itself
    phases = {"data", "gather", "encoder", "decoder", "loss", "backward", "optimiser"}
    assert figures["seconds"].keys() == phases | {"other"}
    assert sum(figures["seconds"].values()) == pytest.approx(figures["step_seconds"])
    assert figures["fastest"] <= figures["step_seconds"] <= figures["slowest"]
    flops = sum(sum(part.values()) for part in figures["flops"].values())
    assert figures["mfu"] == pytest.approx(8 * flops / figures["step_seconds"] / figures["peak_flops"])
    # Float32 without ZeRO: gradients, and two moments with a step count each.
    size = 4 * figures["parameters"]
    memory = figures["memory"]
    assert memory["parameters"] == size and memory["buckets"] == 0
    assert memory["gradients"] == pytest.approx(size, rel=0.001)
    assert 2 * size < memory["optimiser"] < 2.1 * size
    assert memory["activations"] > 0
    ranges = [event for event in trace if event.get("cat") == "user_annotation"]
    assert phases <= {event["name"] for event in ranges}
    steps = [event for event in ranges if event["name"] == "step"]
    assert len(steps) == 3
    encoders = [event for event in ranges if event["name"] == "encoder"]
    assert len(encoders) == 2 * 2 * 3  # blocks and last norm, of each half of each step
    inside = [
        any(
            step["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= step["ts"] + step["dur"]
            for step in steps
        )
        for event in ranges
        if event["name"] in phases
    ]
    assert all(inside)
    assert not (tmp_path / "run").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"images", "tiny.yaml", "out", "deep"}


def test_two_ranks_tell_their_communication_and_shares_of_the_optimiser(tmp_path):
    told, figures, trace = profiled(tmp_path, "deepspeed.zero_optimization.stage=1", ranks=2)
    assert told.count("of step") == 1 and "rank 0 of 2: 2 steps of 4 images" in told
    assert figures["seconds"]["communication"] > 0
    assert "communication" in {event["name"] for event in trace if event.get("cat") == "user_annotation"}
    size = 4 * figures["parameters"]
    assert figures["memory"]["parameters"] == pytest.approx(size, rel=0.01)
    # Half of the float32 masters and of the two moments.
    assert figures["memory"]["optimiser"] == pytest.approx(1.5 * size, rel=0.05)


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    run = tmp_path / "out"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert main(arguments(tmp_path)) == 2
    assert f"fastmim profile: --out {run} is the folder of a run" in capsys.readouterr().err
    assert main(["profile", "quickstart", "data.source=null", "--out", str(tmp_path / "new")]) == 2
    assert "data.source is not set" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        main(["profile", "quickstart", "--steps", "0"])
    assert "argument --steps: 0; expected an integer > 0" in capsys.readouterr().err
