"""The regressor against its formula, what it reads, and how it is computed."""

import pytest
import torch
from fastmim.kernels import _dispatch
from torch import nn

from fastmim import recipes
from fastmim.masking import mask_from_order
from fastmim.models import Regressor
from fastmim.objectives import build_objective
from tests.objectives.naive_vit import NaiveViT, randomise

TINY = [
    "model.width=32",
    "model.depth=1",
    "model.heads=4",
    "model.mlp_ratio=2",
    "model.patch_size=8",
    "data.image_size=[32,24]",
    "objective.name=cae",
    "target.kind=pixels",
]


def setup(*overrides):
    config = recipes.override([*TINY, *overrides])
    torch.manual_seed(0)
    regressor = Regressor(config)
    randomise(regressor)
    patches = config.grid[0] * config.grid[1]
    mask = mask_from_order(torch.rand(3, patches).argsort(1), 5)
    return config, regressor, torch.randn(3, 6, 32), mask


@pytest.mark.parametrize("mode", ["reference", "interpret"])
def test_latents_are_those_of_the_formula(monkeypatch, mode):
    monkeypatch.setattr(_dispatch, "MODE", mode)
    config, regressor, latent, mask = setup("objective.regressor_depth=3")
    got = regressor(latent, mask)
    owner = nn.Module()
    owner.regressor = regressor
    owner.config = config
    naive = NaiveViT(owner)
    assert got.shape == (3, 7, 32)
    for sample in range(3):
        kept, removed = mask.ids_keep[sample].tolist(), mask.ids_mask[sample].tolist()
        want = naive.regress(latent[sample].double(), kept, removed)
        torch.testing.assert_close(got[sample].double(), want, rtol=1e-4, atol=1e-5)


def test_cls_is_not_read_and_other_latents_are():
    _, regressor, latent, mask = setup()
    latent.requires_grad_()
    (grad,) = torch.autograd.grad(regressor(latent, mask).square().sum(), latent)
    assert not grad[:, 0].any() and (grad[:, 1:].abs().amax(-1) > 0).all()


def test_checkpointing_changes_memory_only():
    results = []
    for checkpointing in (False, True):
        _, regressor, latent, mask = setup(f"train.activation_checkpointing={checkpointing}")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t
        ):
            out = regressor(latent.requires_grad_(), mask)
        out.square().sum().backward()
        results.append((sum(saved), out, [latent.grad, *(p.grad for p in regressor.parameters())]))
    (plain, out, grads), (saving, out_saving, grads_saving) = results
    assert saving < plain / 4
    torch.testing.assert_close(out, out_saving)
    torch.testing.assert_close(grads, grads_saving)


def test_stochastic_depth_acts_in_training_only():
    _, regressor, latent, mask = setup("model.drop_path=0.5")
    rates = [layer.drop_path.drop_prob for layer in regressor.layers]
    assert rates == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5])
    assert not torch.equal(regressor(latent, mask), regressor(latent, mask))
    regressor.eval()
    assert torch.equal(regressor(latent, mask), regressor(latent, mask))


def test_blocks_are_compiled_where_the_objective_compiles_its_own():
    objective = build_objective(recipes.override(TINY))
    objective.compile_blocks()
    layers = [*objective.encoder.blocks.layers, *objective.regressor.layers, *objective.decoder.blocks.layers]
    assert len(layers) == 9 and all(layer._compiled_call_impl is not None for layer in layers)
