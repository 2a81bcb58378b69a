"""Rows of all ranks and their gradients, and the contrast over them, with two real gloo processes."""

import subprocess
import sys

import pytest
import torch

from fastmim import recipes
from fastmim.gather_ranks import gather_ranks
from fastmim.objectives import build_objective
from tests.launching import ROOT, SCRIPTS, environment

C_MAE = [
    *["model.width=32", "model.depth=1", "model.heads=2", "model.patch_size=8", "data.image_size=32"],
    *["objective.name=c_mae", "objective.decoder_width=16", "objective.decoder_depth=1"],
    *["objective.decoder_heads=2", "objective.projection=12"],
]
STOPPED = ["objective.share_decoder=true", "objective.stop_gradient=true"]

SCRIPT = """
import sys
import torch, torch.distributed as dist
from fastmim.gather_ranks import gather_ranks
from tests.test_gather_ranks import C_MAE, STOPPED, contrast

dist.init_process_group("gloo")
rank = dist.get_rank()
rows = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
everyone, first = gather_ranks(rows.T)
weights = torch.arange(12.0).view(6, 2) * (1 + rank)
(everyone * weights).sum().backward()
told = {"everyone": everyone.detach(), "first": first, "grad": rows.grad}
half = slice(4 * rank, 4 * rank + 4)
told["contrast"] = contrast(C_MAE, half)
told["stopped"] = contrast([*C_MAE, *STOPPED], half)
torch.save(told, f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def contrast(overrides, part):
    """Loss and gradients of C-MAE on a part of a batch of 8."""
    torch.manual_seed(0)
    objective = build_objective(recipes.override(overrides))
    images, places = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)[part], torch.arange(8)[part]
    loss = objective.loss(images, objective.sample_mask(torch.zeros_like(places), places))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in objective.named_parameters()}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    command = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node=2", str(folder / "script.py")]
    done = subprocess.run(
        [sys.executable, *command, str(folder)],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_rank_holds_all_rows_and_gets_the_gradients_of_all(told):
    rows = torch.cat([torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T + 10])
    weights = torch.arange(12.0).view(6, 2) * 3  # 1 + 2, over both ranks
    for rank, found in enumerate(told):
        assert torch.equal(found["everyone"], rows) and found["first"] == 3 * rank
        assert torch.equal(found["grad"], weights[3 * rank : 3 * rank + 3].T)


@pytest.mark.parametrize(("name", "options"), [("contrast", []), ("stopped", STOPPED)])
def test_two_ranks_contrast_as_one_with_the_whole_batch(told, name, options):
    loss, gradients = contrast([*C_MAE, *options], slice(None))
    found = [rank[name] for rank in told]
    torch.testing.assert_close(sum(part for part, _ in found) / 2, loss, rtol=1e-5, atol=0)
    for key, want in gradients.items():
        mean = sum(part[key] for _, part in found) / 2
        torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-6, msg=key)
    # Without the other rank's keys the loss is another.
    assert abs(contrast([*C_MAE, *options], slice(4))[0] - found[0][0]) > 0.1


def test_one_rank_keeps_its_rows():
    rows = torch.ones(2, 3)
    everyone, first = gather_ranks(rows)
    assert everyone is rows and first == 0
