"""Position tables: the learned one trains as in the published model, and others are resized as timm does."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from fastmim import recipes
from fastmim.exchange.layouts import MAE, Architecture, to_layout
from fastmim.masking import mask_from_order
from fastmim.models.position import resize_positions, sincos_positions
from fastmim.optim import parameter_groups
from tests.exchange.peers import PublicMAE, images_of, pixels_of, random_objective

TINY = ["model.size=null", "model.width=32", "model.depth=2", "model.heads=2", "model.patch_size=8"]
TINY += [
    "data.image_size=32",
    "objective.decoder_width=16",
    "objective.decoder_depth=1",
    "objective.decoder_heads=2",
]


def test_a_learned_table_has_the_gradient_of_the_published_model():
    config = recipes.override([*TINY, "model.positions=learned", "objective.norm_pix_loss=true"])
    objective = random_objective(config)
    peer = PublicMAE(config)
    peer.load_state_dict(
        to_layout(dict(objective.state_dict()), MAE, Architecture.of(config, decoder=True), config)
    )
    images = images_of(config, 3)
    order = torch.stack([torch.randperm(16) for _ in images])
    ours, _ = objective.loss(images, mask_from_order(order, 4))
    theirs = peer.eval()(pixels_of(images, config), order)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    table = objective.encoder.pos_embed
    torch.testing.assert_close(table.grad, peer.pos_embed.grad, rtol=1e-4, atol=1e-7)
    # Like the tokens, positions do not decay.
    decayed, kept = parameter_groups(objective, 0.05)
    assert any(parameter is table for parameter in kept["params"]) and kept["weight_decay"] == 0
    assert not any(parameter is table for parameter in decayed["params"])


@pytest.mark.parametrize("grid", [(4, 6), (9, 3)])
def test_tables_are_resized_as_timm_resizes(grid):
    table = torch.randn(1, 1 + 24, 8)
    expected = resample_abs_pos_embed(table, list(grid), old_size=[4, 6])
    torch.testing.assert_close(resize_positions(table, (4, 6), grid), expected)


@pytest.mark.parametrize("grid", [(6, 6), (3, 5)])
def test_fixed_tables_of_another_grid_are_resized(grid):
    size = [8 * side for side in grid]
    config = recipes.override([*TINY, f"data.image_size={size}", "model.positions_grid=[4,4]"])
    objective = random_objective(config)
    for table, width in ((objective.encoder.pos_embed, 32), (objective.decoder.pos_embed, 16)):
        expected = resample_abs_pos_embed(sincos_positions(width, (4, 4)), list(grid), old_size=[4, 4])
        torch.testing.assert_close(table, expected)
        assert not table[:, 0].any()


def test_fixed_tables_are_not_parameters():
    objective = random_objective(recipes.override(TINY))
    assert "encoder.pos_embed" not in objective.state_dict()
    assert torch.equal(objective.encoder.pos_embed, sincos_positions(32, (4, 4)))
