"""The comparison with public implementations: the same steps from the same weights and masks, or none is timed."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import contenders, peers, report
from benchmarks.contenders import CONTENDERS, Problem
from benchmarks.workers import Worker
from fastmim.objectives import build_objective
from fastmim.optim import parameter_groups
from tests.benchmarks.test_report import KEYS

SMALL = [
    *("model.width=32", "model.depth=2", "model.heads=2", "model.patch_size=8", "data.image_size=32"),
    *("objective.decoder_width=16", "objective.decoder_depth=2", "objective.decoder_heads=2"),
]

# What models_mae.py has that matters here, names gone from timm and NumPy included; written for this test.
STUB = """
import numpy as np
import torch
from timm.models.vision_transformer import Block
from util.heads import heads


class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
                 decoder_num_heads, mlp_ratio, norm_layer, norm_pix_loss):
        super().__init__()
        assert np.arange(2, dtype=np.float).dtype == np.float64
        block = Block(embed_dim, heads(num_heads), mlp_ratio, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)
        self.blocks = torch.nn.ModuleList([block])

    def forward(self, imgs, mask_ratio=0.75):
        noise = torch.rand(len(imgs), 16, device=imgs.device)
        return noise.sum() + 0 * self.blocks[0].norm1.weight.sum(), None, None
"""


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    config = peers.configure("tiny", 4, SMALL)
    contenders.write_weights(config, folder)
    return Problem(config, "fp32", 4, folder)


@pytest.fixture(scope="module")
def wanted(problem):
    """Losses of two steps of our objective in a plain loop."""
    torch.manual_seed(problem.config.train.seed)
    objective = build_objective(problem.config)
    epochs, positions = problem.places
    batch = SimpleNamespace(images=problem.images(), epochs=epochs, positions=positions)
    optim = problem.config.optim
    groups = parameter_groups(objective, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    losses = []
    for _ in range(2):
        loss = objective(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[1] - losses[0]) > 1e-3 * losses[0]
    return losses


@pytest.mark.parametrize("name", ["transformers", "lightly"])
def test_a_peer_makes_the_same_steps(problem, wanted, name):
    with torch.compiler.set_stance("force_eager"):
        step = CONTENDERS[name](problem)
        assert [float(step()) for _ in range(2)] == pytest.approx(wanted, rel=1e-5)


def test_the_engine_makes_the_same_steps_in_a_process_of_its_own(problem, wanted):
    build = CONTENDERS["fastmim"]
    with Worker(build, problem, imports=contenders.IMPORTS[build]) as worker:
        assert [worker.step() for _ in range(2)] == pytest.approx(wanted, rel=1e-5)
        assert 0 < worker.peak_memory() < 2**29


def test_a_clone_of_the_published_code_is_imported_whatever_timm_is_installed(problem, tmp_path, monkeypatch):
    (tmp_path / "models_mae.py").write_text(STUB)
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "heads.py").write_text("def heads(number):\n    return number\n")
    monkeypatch.setattr(Problem, "state", lambda self: None)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
    cloned = Problem(problem.config, "fp32", 4, problem.weights, tmp_path)
    with torch.compiler.set_stance("force_eager"):
        assert float(CONTENDERS["facebookresearch/mae"](cloned)()) == 4 * sum(range(16))
    with pytest.raises(SystemExit):
        peers.read_arguments(["--mae-path", str(tmp_path / "util")])


class Still:
    """A contender that costs nothing."""

    losses = {"fastmim": 1.0, "transformers": 1.0}
    off_when_compiled = 0.0

    def __init__(self, name, problem):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def step(self, compiled=False):
        return self.losses[self.name] + compiled * self.off_when_compiled

    def forget_peak(self):
        pass

    def peak_memory(self):
        return 300 if self.name == "fastmim" else 400


def test_rows_have_every_key_and_different_losses_are_refused(problem, monkeypatch):
    monkeypatch.setattr(peers, "worker_of", Still)
    monkeypatch.setattr(report, "measure_peak_flops", lambda *args: 1e12)
    names, rate = list(Still.losses), report.PeakRate(torch.device("cpu"))
    rows = peers.measure(problem, "tiny", names, list(peers.MODES), 3, 0, rate)
    assert [row["variant"] for row in rows] == [f"{name}, {mode}" for mode in peers.MODES for name in names]
    assert all(row.keys() == KEYS | {"name", "against", "memory_ratio"} for row in rows)
    assert rows[0]["memory_ratio"] == 0.75 and rows[0]["against"].startswith("transformers")
    assert "| fastmim, eager | tiny | fp32 |" in peers.tables({"rows": rows})["peers"]
    assert peers.judge(rows)[0].startswith("tiny fp32: fastmim")
    monkeypatch.setattr(Still, "losses", {"fastmim": 1.0, "transformers": 1.001})
    with pytest.raises(SystemExit, match="no speed-up is told"):
        peers.measure(problem, "tiny", names, ["eager"], 1, 0, rate)
    monkeypatch.setattr(Still, "losses", {"fastmim": 1.0, "transformers": 1.0})
    monkeypatch.setattr(Still, "off_when_compiled", 0.001)
    with pytest.raises(SystemExit, match=r"fastmim, compiled has the loss 1\.001, fastmim, eager 1;"):
        peers.measure(problem, "tiny", names, list(peers.MODES), 1, 0, rate)


def test_this_engine_is_compared_with_the_peer_that_it_beats_by_least():
    # By medians `a, compiled` is the fastest peer, but round by round `b, eager` is nearer.
    samples = {
        ("fastmim", "eager"): [1.0, 1.0, 4.0],
        ("a", "compiled"): [2.0, 2.0, 2.0],
        ("b", "eager"): [1.1, 3.0, 4.4],
    }
    memory = {("fastmim", "eager"): 30, ("a", "compiled"): 60, ("b", "eager"): 40}
    own, fastest, other = peers.compare(samples, memory, "base", "fp32", 8, 1e9)
    assert own["against"] == "b, eager" and own["ratio"] == pytest.approx(1.1)
    assert own["memory_ratio"] == 0.75
    assert fastest["against"] == other["against"] == "a, compiled"
    assert (fastest["ratio"], other["memory_ratio"]) == (1.0, 40 / 60)


def test_a_ratio_is_told_with_the_interval_of_its_median():
    samples = {("fastmim", "eager"): [1.0] * 9, ("a", "eager"): [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0]}
    rows = peers.compare(samples, dict.fromkeys(samples, 2**20), "base", "fp32", 8, 1e9)
    # Of nine, the second and the eighth: eight coins of nine on one side are rarer than one time in twenty.
    assert peers.interval(rows, rows[0]) == "2.00–8.00" and peers.interval(rows, rows[1]) == "–"
    rate = report.PeakRate(torch.device("cpu"))
    rate.samples["fp32"] = [1e12]
    assert "| 5.00 | 2.00–8.00 | 1.00–9.00 |" in peers.tables({"rows": rate.fill(rows)})["peers"]
    few = peers.compare(
        {key: each[:5] for key, each in samples.items()}, dict.fromkeys(samples, 1), "base", "fp32", 8, 1e9
    )
    assert peers.interval(few, few[0]) == "–"


def fail(problem):
    raise ValueError(f"no {problem}")


def test_what_goes_wrong_in_a_process_is_told():
    with Worker(fail, "weights") as worker, pytest.raises(RuntimeError, match="ValueError: no weights"):
        worker.step()
