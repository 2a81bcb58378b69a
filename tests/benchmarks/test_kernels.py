"""The kernel benchmark plans, counts and compiles on a machine without a GPU."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastmim.kernels import _dispatch

from benchmarks import counting, harness, kernels, rows
from benchmarks.cases import CASES
from benchmarks.compiled import TARGETS, compile_launch, cuda_occupancy, inspect_launch
from benchmarks.problems import SHAPES, Shape

KEYS = {
    *("kernel", "pass", "dtype", "shape", "arch", "registers", "spills", "shared_bytes", "load_bits"),
    *("store_bits", "bytes", "floor_bytes", "launches", "eager_bytes", "eager_launches"),
}
ONE_ID = torch.zeros(1, dtype=torch.int64)
SMALL = Shape("small", patch_size=16, width=256, decoder_width=256, batch=2, side=128, classes=512)
BUDGETS = {
    **dict.fromkeys(
        [
            *("gather_patches", "gather_tokens", "embed_tokens", "unshuffle", "masked_pixel_loss"),
            *("scatter_tokens", "add_layer_norm", "bias_gelu", "short_attention"),
        ],
        1.05,
    ),
    **dict.fromkeys(
        [
            *("sample_mask", "sample_block_mask", "sample_grid_mask"),
            *("mse_align", "cosine_align", "masked_cross_entropy", "info_nce"),
        ],
        1.3,
    ),
}
LOGITS = (
    "5 R V s for chunks of logits, V D (4 s + 8) per chunk for the weight's side; tiles would move more than 10 times "
    "the floor too: see test_logits.py"
)
ABOVE_BUDGET = {("masked_cross_entropy", "forward"): LOGITS, ("info_nce", "forward"): LOGITS}
INTEGER = ["sample_mask", "sample_block_mask", "sample_grid_mask"]
FORWARD_ONLY = [*INTEGER, "gather_patches"]
PASSES = [(name, "forward") for name in BUDGETS] + [
    (name, "backward") for name in BUDGETS if name not in FORWARD_ONLY
]


def build(name, shape=SMALL, dtype="bfloat16"):
    return rows.build(name, "int64" if name in INTEGER else dtype, shape, "cpu")


@pytest.fixture(scope="module")
def counted():
    """Traffic of every case, counted once."""
    return {name: rows.count_passes(*fused(build(name))) for name in CASES}


def fused(problem):
    return problem.fused, problem.fused_args


@pytest.mark.parametrize(("name", "which"), PASSES, ids=lambda part: part)
def test_bytes_are_within_the_budget(request, counted, name, which):
    if reason := ABOVE_BUDGET.get((name, which)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    assert counted[name][which].bytes <= BUDGETS[name] * build(name).floor[which]


@pytest.mark.parametrize(("batch", "side"), [(8, 128), (65, 64)])
@pytest.mark.parametrize("name", ["embed_tokens", "unshuffle"])
def test_positions_are_shared_within_the_budget_at_other_batches(name, batch, side):
    """A batch below a tile's 32 samples, and one that leaves a remainder of a program's 64."""
    problem = build(name, replace(SMALL, side=side, width=512, decoder_width=512, batch=batch))
    for which, traffic in rows.count_passes(*fused(problem)).items():
        assert traffic.bytes <= BUDGETS[name] * problem.floor[which]


@pytest.mark.parametrize("name", CASES)
def test_no_pass_moves_less_than_its_floor(counted, name):
    floor = build(name).floor
    assert floor.keys() == counted[name].keys()
    for which, traffic in counted[name].items():
        assert floor[which] <= traffic.distinct_bytes <= traffic.bytes <= traffic.sector_bytes


@pytest.mark.parametrize("name", CASES)
def test_the_fused_and_the_naive_result_agree(name):
    """What is compared is the same work; the losses' naive inputs differ on purpose, so only their kind."""
    problem = build(name, dtype="float32")
    ours = rows.tensors(problem.fused(*problem.fused_args))[0]
    theirs = rows.tensors(problem.naive(*problem.naive_args))[0]
    assert ours.shape == theirs.shape and ours.requires_grad == theirs.requires_grad
    if problem.fused_args is problem.naive_args:
        torch.testing.assert_close(ours, theirs)


def test_static_rows_have_every_key_and_survive_json(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--static", "--kernels", "gather_tokens", "--shapes", "ViT-B/16", "--dtypes", "bfloat16"]
    kernels.main([*arguments, "--archs", "sm_90", "gfx942", "--json", str(path)])
    stored = json.loads(path.read_text())
    assert stored["machine"]["mode"] == "static"
    assert [(row["pass"], row["arch"]) for row in stored["rows"]] == [
        *(("forward", "sm_90"), ("forward", "gfx942"), ("backward", "sm_90"), ("backward", "gfx942"))
    ]
    for row in stored["rows"]:
        assert row.keys() >= KEYS
        assert row["spills"] == 0 and row["load_bits"] == row["store_bits"] == 128
        assert 0 < row["occupancy"] <= 1
        assert row["predicted_us"]["H100"] == pytest.approx(row["bytes"] / 3.35e6)
    printed = capsys.readouterr().out
    assert printed.count("| gather_tokens |") == 6 and "predicted" in printed


def test_the_plan_covers_every_kernel_dtype_and_shape():
    args = kernels.read_arguments(["--static"])
    jobs = rows.plan(args.kernels, args.dtypes, [SHAPES[name] for name in args.shapes])
    assert CASES.keys() == BUDGETS.keys()
    assert len(jobs) == len(set(jobs)) == 3 * (2 * len(CASES) - len(INTEGER))
    assert args.archs == list(TARGETS) == ["sm_80", "sm_90", "sm_100", "gfx942"]


def test_the_script_runs_from_any_folder_and_refuses_to_measure_without_a_gpu(tmp_path):
    script = Path(kernels.__file__)
    command = [sys.executable, script, "--kernels", "unshuffle"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "no CUDA device; --static and --cpu need none" in run.stderr


@pytest.mark.parametrize(("name", "which"), PASSES, ids=lambda part: part)
def test_what_is_timed_on_a_gpu_runs(name, which):
    measured = kernels.measure_pass(build(name), which, "cpu", 1e9, rounds=2, compiler="aot_eager")
    torch.compiler.reset()
    assert measured.keys() == {"fused", "eager", "compiled"}
    for times in measured.values():
        assert times["p20_us"] <= times["median_us"] <= times["p80_us"]
        assert len(times["samples"]) == 2 and times["median_us"] == pytest.approx(5e5 * sum(times["samples"]))
        assert times["copy_percent"] == pytest.approx(100 * times["gb_per_s"])


def test_a_contender_that_fails_does_not_end_the_run(monkeypatch):
    def refuse(x, ids):
        raise RuntimeError("refused")

    original = CASES["gather_tokens"]
    broken = replace(original, build=lambda inputs: replace(original.build(inputs), naive=refuse))
    counted = rows.count_problem(build("gather_tokens"))
    monkeypatch.setattr(rows, "count_problem", lambda problem: counted)
    arguments = {"device": "cpu", "arch": "sm_90", "copy_bandwidth": 1e9, "rounds": 2}
    jobs = [("gather_tokens", "bfloat16", SMALL)]
    measured = kernels.measure_rows(jobs, **arguments, compiler="aot_eager")
    assert all("measured" in row and row.keys() >= KEYS for row in measured)
    monkeypatch.setitem(CASES, "gather_tokens", broken)
    failed = kernels.measure_rows(jobs, **arguments, compiler="aot_eager")
    torch.compiler.reset()
    assert [row["pass"] for row in failed] == ["forward", "backward"]
    assert all("refused" in row["error"] and "measured" not in row for row in failed)


def test_rows_that_were_counted_before_are_measured_as_they_are(tmp_path, capsys):
    jobs = [("gather_tokens", "bfloat16", SMALL), ("unshuffle", "bfloat16", SMALL)]
    identity = {"dtype": "bfloat16", "shape": f"{SMALL.name} batch {SMALL.batch}"}
    stored = [
        {"kernel": kernel, "pass": name, "arch": arch, "bytes": 7, **identity}
        for kernel in ("unshuffle", "gather_tokens")
        for name in ("forward", "backward")
        for arch in ("sm_80", "sm_90")
    ]
    found = list(rows.stored_rows(stored, jobs, ["sm_90"]))
    assert [row["kernel"] for row in found] == 2 * ["gather_tokens"] + 2 * ["unshuffle"]
    assert {row["arch"] for row in found} == {"sm_90"}
    with pytest.raises(ValueError, match=r"no stored rows of unshuffle float32 .* for sm_90; wanted some"):
        list(rows.stored_rows(stored, [("unshuffle", "float32", SMALL)], ["sm_90"]))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": stored}))
    with pytest.raises(SystemExit, match=r"^--counted .*rows.json: no stored rows of gather_tokens bfloat16"):
        kernels.read_counted(path, jobs, "sm_100")
    static = kernels.read_counted(path, jobs, "sm_90")
    measured = kernels.measure_rows(
        jobs[:1], "cpu", "sm_90", 1e9, rounds=2, compiler="aot_eager", static=static
    )
    torch.compiler.reset()
    assert [row["bytes"] for row in measured] == [7, 7]
    kernels.print_measured(measured)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| gather_tokens")]
    assert len(printed) == 2 * 3 and all(line.count("|") == 12 for line in printed)  # no host time here
    failed = {**stored[0], "error": "RuntimeError: refused"}
    lines = kernels.tables({"rows": [*measured, failed]})["kernels"].splitlines()
    assert lines[2].startswith(f"| gather_tokens | forward | {identity['shape']} | ")
    assert lines[4].startswith(f"| unshuffle | forward | {identity['shape']} | RuntimeError: refused | – |")
    assert {line.count("|") for line in lines} == {9} and len(lines) == 5


def test_the_cpu_comparison_reports_a_ratio_per_kernel():
    table = kernels.measure_on_cpu(["masked_pixel_loss", "unshuffle"], SMALL, ["float32"], rounds=2)
    assert [row["variant"] for row in table] == ["masked_pixel_loss", "unshuffle"]
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cpu", "--kernels", "gather_tokens"],
            "--cpu --kernels gather_tokens; expected of masked_pixel_loss",
        ),
        (["--cpu", "--shapes", "ViT-L/16"], "--shapes is not for --cpu"),
        (["--cpu", "--archs", "sm_90"], "--archs is for --static"),
    ],
)
def test_options_that_a_mode_would_ignore_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        kernels.read_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_nothing_spills_at_the_size_of_vit_b(name):
    dtype = "int64" if CASES[name].integer else "bfloat16"
    shape = rows.reported_as(name)(SHAPES["ViT-B/16"])
    for launches in rows.record_passes(rows.build(name, dtype, shape, "cpu")).values():
        assert rows.summarise_launches(launches, "sm_90")["spills"] == 0


def test_scalar_registers_in_lanes_of_vector_registers_are_no_spills():
    (launch,) = rows.record_passes(rows.build("unshuffle", "float32", SHAPES["ViT-B/16"], "cpu"))["backward"]
    assembly = compile_launch(launch, TARGETS["gfx942"]).asm["amdgcn"]
    assert ".private_segment_fixed_size: 0" in assembly and ".vgpr_spill_count: 0" in assembly
    assert inspect_launch(launch, "gfx942")["spills"] == 0


class TestCounting:
    def test_a_masked_lane_is_not_counted_and_a_shared_byte_counts_once_a_program(self):
        x, ids = torch.randn(1, 5, 3), torch.tensor([[4, 0]])
        with counting.count_traffic() as traffic:
            _dispatch_call(x, ids)
        # Two rows of 3 floats read and written, two ids read; the tile is 512 rows of 4.
        assert traffic.bytes == traffic.distinct_bytes == 2 * (2 * 12 + 8)
        assert traffic.launches == 1

    def test_what_two_programs_read_counts_twice(self):
        x, ids = torch.randn(1, 4, 512), torch.tensor([[1, 3]])
        with counting.count_traffic() as traffic:
            _dispatch_call(x, ids)
        # Two programs share a row, 256 columns each: both read both ids.
        assert traffic.distinct_bytes == 2 * (2 * 2048 + 8)
        assert traffic.bytes == traffic.distinct_bytes + 16

    def test_sectors_are_whole(self):
        x, ids = torch.randn(1, 4, 8)[..., :1], torch.tensor([[1, 3]])
        with counting.count_traffic() as traffic:
            _dispatch_call(x, ids)
        assert traffic.bytes == 2 * (4 + 4 + 8)
        assert traffic.sector_bytes == 2 * 32 + 32 + 32

    @pytest.mark.parametrize(
        ("call", "moved"),
        [
            (lambda x: x.view(16).expand(3, 16), None),
            (lambda x: torch.empty_like(x), None),
            (lambda x: x + 1, 128),
            (lambda x: x.add_(1), 128),
            (lambda x: x.zero_(), 64),
            (lambda x: x.new_zeros(8), 32),
            (lambda x: x.t().contiguous(), 128),
            (lambda x: x[:1].expand(4, 4) + x, 16 + 128),
            (lambda x: x.index_select(0, ONE_ID), 16 + 16 + 8),
            (lambda x: x.clone().copy_(x), 128 + 128),
        ],
        ids=["view", "allocation", "add", "add_", "zero_", "zeros", "copy", "expanded", "gather", "copy_"],
    )
    def test_bytes_of_aten_calls(self, call, moved):
        x = torch.ones(4, 4)
        with counting.count_traffic() as traffic:
            call(x)
        assert traffic.bytes == (moved or 0)
        assert (traffic.launches > 0) == (moved is not None)


def _dispatch_call(x, ids):
    """Select tokens, one launch."""
    return torch.ops.fastmim.gather_tokens(x, ids, 0)


def test_counting_leaves_the_dispatcher_as_it_was():
    before = _dispatch.MODE, _dispatch.launch, _dispatch.check_range
    with counting.count_traffic():
        pass
    assert before == (_dispatch.MODE, _dispatch.launch, _dispatch.check_range)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "occupancy"),
    [(32, 4, 0, 1.0), (255, 8, 0, 0.125), (64, 4, 0, 0.5), (16, 4, 100_000, 0.0625), (16, 1, 0, 0.5)],
)
def test_occupancy(registers, warps, shared, occupancy):
    """Values of NVIDIA's occupancy calculator for compute capability 8.0."""
    assert cuda_occupancy(registers, warps, shared, "sm_80") == occupancy


def test_contenders_take_turns_after_the_warmup():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    samples = harness.time_in_turns(runs, "cpu", rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 3, "b": 3}
    assert harness.ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == 3.0
    summary = harness.summarise([1e-6 * value for value in (1, 2, 3, 4, 5, 6)])
    assert summary == pytest.approx({"median_us": 3.5, "p20_us": 2.0, "p80_us": 5.0})
