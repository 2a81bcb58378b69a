"""How do steps scale over ranks: measured on 1 and 2 ranks here, and by a model from 8 to 1,024 GPUs?

    python benchmarks/scaling.py [--stages 0 1 2 3] [--rounds 5] [--steps 2] [key=value ...]

Weak scaling: each rank has the same images, and one thread. Between 1 rank and 2 joined ranks stand 2 ranks that are
not joined: processes on one machine share its memory and clock, and each sums and updates by the code of several
ranks, but sends nothing, and updates all. The model (`communication.py`) is given their step, of whose update each of 2
ranks makes half under ZeRO, and what each collective takes alone between two ranks (`collectives.py`), all of the same
run; it predicts the joined step, and its error is told. What it says of GPUs is a prediction from published bandwidths,
not a measurement.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

# Run as a script, Python looks here first, where `kernels.py` would pass for a package of that name.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import harness, report
from benchmarks.collectives import measure_link
from benchmarks.communication import ROUNDS, Link, Step, communication_seconds, step_seconds
from benchmarks.gloo import SMALL, FixedBatch, Group, make_config
from benchmarks.markdown import table
from benchmarks.predicted_gpus import GPUS, predict
from fastmim import engine
from fastmim.deepspeed_fragment import stage_in_effect
from fastmim.flops import measure_peak_flops
from fastmim.memory import ITEM, parameter_sizes
from fastmim.ranks import Ranks
from fastmim.window import peak_memory_bytes

PREDICTED = {"scaling_model"}
"""Tables that nothing was measured for."""

_STEPS: dict[int, FixedBatch] = {}  # of this process, by ZeRO stage


def build(words: list[str], stage: int, images: int, as_several: bool) -> dict:
    """Make this rank's step; returns what the model needs to know.

    Args:
        words: of the configuration.
        stage: of ZeRO.
        images: of this rank.
        as_several: to sum and update as one of several ranks does, whatever the number of ranks.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    config = make_config(
        [*words, f"optim.batch_size={images * ranks}", f"deepspeed.zero_optimization.stage={stage}"]
    )
    in_effect = (lambda *_: stage) if as_several else stage_in_effect
    with mock.patch.object(engine, "stage_in_effect", in_effect):
        step = FixedBatch(config)
    if as_several:
        step.engine.enable_backward_allreduce = True
    _STEPS[stage] = step
    return {
        **{"loss": float(step.step()), "precision": step.precision},
        **{"flops": images * step.objective.step_flops()},
        "stage": in_effect(config.deepspeed, step.precision, ranks),
    }


def count_gathers(stage: int) -> int:
    """Messages in which this rank's step gathers parameters; 1 without ZeRO, which gathers none.

    Raises:
        RuntimeError: none was seen under ZeRO.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _STEPS[stage].step()
    gathers = sum(event.name == "c10d::_allgather_base_" for event in profiler.events())
    if stage and not gathers:
        raise RuntimeError(f"ZeRO {stage}: 0 calls of c10d::_allgather_base_ in a step; expected some")
    return gathers or 1


def peak_flops(precision: str) -> float:
    """FLOP/s of a large product on this rank's thread."""
    return measure_peak_flops(Ranks().device, harness.DTYPES[precision])


def peak_memory() -> int:
    """Bytes that this rank's process held at most, imports included."""
    return peak_memory_bytes(Ranks().device)


def time_steps(stage: int, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of its update, over some steps of this rank."""
    fixed, update = _STEPS[stage], 0.0
    fixed.synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        loss = fixed.engine(fixed.batch)["loss"]
        fixed.engine.backward(loss)
        fixed.synchronise()
        before = time.perf_counter()
        fixed.engine.step()
        fixed.synchronise()
        update += time.perf_counter() - before
    return (time.perf_counter() - started) / steps, update / steps


def measure_stage(stage: int, args: argparse.Namespace) -> list[dict]:
    """Rows of one ZeRO stage: 1 rank, 2 ranks that are not joined, 2 ranks that are."""
    words = args.overrides or SMALL
    # On GPUs each rank that computes at a time has one of its own.
    with Group(1, 1) as alone, Group(1, 1) as first, Group(1, 1, gpu=1) as second, Group(2, 1) as pair:
        groups = {"1 rank": [alone], "2 ranks, not joined": [first, second], "2 ranks": [pair]}
        starting = {
            name: [group.start(build, words, stage, args.images, name != "1 rank") for group in members]
            for name, members in groups.items()
        }
        # The first rank of a pair has the images of one that is alone.
        built = {name: started[0][0].result() for name, started in starting.items()}
        report.require_same({name: rank["loss"] for name, rank in built.items()}, 1e-3)
        samples: dict[str, list[float]] = {name: [] for name in groups}
        updates: dict[str, list[float]] = {name: [] for name in groups}
        for number in range(args.rounds + 1):
            for name, members in groups.items():
                seconds, update = max(_of_all(members, time_steps, stage, args.steps))
                if number:
                    samples[name].append(seconds)
                    updates[name].append(update)
        precision, flops = built["1 rank"]["precision"], built["1 rank"]["flops"]
        numbers = sum(parameter_sizes(make_config(words)))
        gathers = max(pair.call(count_gathers, stage))
        link = measure_link(pair, numbers, precision, gathers)
        peak = alone.call(peak_flops, precision)[0]
        memory = {name: max(_of_all(members, peak_memory)) for name, members in groups.items()}
    whole, update = median(samples["2 ranks, not joined"]), median(updates["2 ranks, not joined"])
    step = Step(whole - update, update, numbers * ITEM[precision])
    predicted = step_seconds(step, 2, stage, link)
    rows = []
    for name, seconds in samples.items():
        ranks = 1 if name == "1 rank" else 2
        computed_by = built[name]["stage"]
        row = report.timed_row(
            name if computed_by == stage else f"{name} (ZeRO {computed_by})",
            f"{numbers / 1e6:.1f} M parameters, ZeRO {stage}",
            precision,
            seconds,
            baseline=samples["1 rank"],
            images=ranks * args.images,
            flops=ranks * flops,
            baseline_flops=flops,
            peak_memory=memory[name],
        )
        # The ratio of a weak scaling is of images in the same time, of which each takes the same FLOPs.
        row |= {"weak_efficiency": row["ratio"], "efficiency": None, "flop_ratio": 1.0, "stage": stage}
        row |= {"ratio": ranks * row["ratio"], "ratio_range": [ranks * end for end in row["ratio_range"]]}
        row |= {"mfu": flops / row["median_s"] / peak, "predicted_s": None, "update_samples": updates[name]}
        rows.append(row)
    rows[-1] |= {
        "predicted_s": predicted,
        "compute_s": step.compute,
        "update_s": update,
        "bandwidth": link.bandwidth,
        "latency": link.latency,
        "gathers": gathers,
        "communication_s": communication_seconds(step, 2, stage, link),
    }
    return rows


def _of_all(groups: list[Group], function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns on every rank of groups that run it at the same time."""
    started = [group.start(function, *args) for group in groups]
    return [result.result() for results in started for result in results]


def round_errors(apart: dict, joined: dict) -> list[float]:
    """Of each round, how much longer than two joined ranks' step is the one that the model makes of two apart.

    Args:
        apart: the row of ranks that are not joined.
        joined: the row of those that are, in the same rounds.
    """
    errors = []
    for whole, update, measured in zip(
        apart["samples"], apart["update_samples"], joined["samples"], strict=True
    ):
        step = Step(whole - update, update, 0)
        # What is sent was measured once.
        free = step_seconds(step, 2, joined["stage"], Link(dict.fromkeys(ROUNDS, 1.0), 0.0))
        errors.append((free + joined["communication_s"]) / measured - 1)
    return errors


def tables(stored: dict) -> dict[str, str]:
    """The page's tables of stored rows: `scaling`, measured, and `scaling_model`, predicted."""
    header = ["size", "dtype", "ranks", "ms a step", "p20–p80", "images/s", "× one rank", "efficiency"]
    header += ["predicted ms", "of which sent", "error", "of a round"]
    lines = []
    for apart, row in zip([None, *stored["rows"]], stored["rows"], strict=False):
        model = ["–"] * 4
        if row["predicted_s"] is not None:
            errors = round_errors(apart, row)
            model = [
                f"{1e3 * row['predicted_s']:.0f}",
                f"{1e3 * row['communication_s']:.0f}",
                f"{median(errors):+.0%}",
                f"{min(errors):+.0%} to {max(errors):+.0%}",
            ]
        lines.append(
            [
                *(row["size"], row["dtype"], row["variant"], f"{1e3 * row['median_s']:.0f}"),
                f"{1e3 * row['p20_s']:.0f}–{1e3 * row['p80_s']:.0f}",
                *(
                    f"{row['images_per_s']:.1f}",
                    f"{row['ratio']:.2f}",
                    f"{row['weak_efficiency']:.0%}",
                    *model,
                ),
            ]
        )
    predicted = [
        [
            *(row["model"], row["stage"], row["gpus"], f"{1e3 * row['compute_s']:.0f}"),
            f"{1e3 * row['communication_s']:.1f}",
            *(f"{row[key]:.1%}" for key in ("efficiency", "efficiency_overlapped")),
        ]
        for row in stored["predicted"]
    ]
    names = ["model", "ZeRO", "GPUs", "compute ms", "communication ms", "efficiency, nothing hidden"]
    return {
        "scaling": table(header, lines),
        "scaling_model": table([*names, "efficiency, hidden what can be"], predicted),
    }


def draw(path: Path, predicted: list[dict]) -> None:
    """Predicted efficiency over GPUs, a line for each stage."""
    stages = sorted({row["stage"] for row in predicted})
    lines = {
        f"ZeRO {stage}, predicted": [row["efficiency"] for row in predicted if row["stage"] == stage]
        for stage in stages
    }
    report.draw_bars(path, [f"{gpus} GPUs" for gpus in GPUS], lines, "efficiency, nothing hidden")


def count_gpus() -> int:
    """Of this machine; 0 where ranks compute on the CPU."""
    return torch.cuda.device_count()


def main(arguments: list[str] | None = None) -> None:
    """Measure, predict, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in a sample (default 2)")
    parser.add_argument("--images", type=int, default=8, help="of each rank and step (default 8)")
    parser.add_argument("--gpu-model", default="large", help="model.size of the prediction for GPUs")
    report.add_options(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"of mae_vit_base; default {' '.join(SMALL)}"
    )
    args = parser.parse_intermixed_args(arguments)
    rows = []
    if count_gpus() == 1:
        print("one GPU: two ranks are not measured; what follows is the model alone", file=sys.stderr)
    else:
        rows = [row for stage in args.stages for row in measure_stage(stage, args)]
    stored = report.store("scaling", rows, args, predicted=predict(args.gpu_model, args.stages))
    made = tables(stored)
    print(f"{made['scaling']}\n\nPredicted, not measured:\n\n{made['scaling_model']}")
    if args.plot:
        draw(args.plot, stored["predicted"])


if __name__ == "__main__":
    main()
