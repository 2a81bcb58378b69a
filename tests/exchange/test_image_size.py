"""Weights for images of another size: the position tables that they have seen, resized, there and back."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from fastmim.errors import ConfigError
from fastmim.exchange.inward import import_weights
from fastmim.exchange.outward import export_weights
from fastmim.exchange.weights import read_weights
from fastmim.objectives import build_objective
from tests.exchange.peers import images_of, pixels_of, random_objective, saved, whole_features


def test_another_image_size_gets_the_resized_tables(tiny_config, tmp_path):
    config = tiny_config()
    objective = random_objective(config)
    ours = str(saved(objective, config, tmp_path / "ours.safetensors"))
    same = str(tmp_path / "same.safetensors")
    assert "positions: the sin-cos table, for 4 x 4 patches\n" in export_weights(ours, same, "timm")
    told = export_weights(ours, str(tmp_path / "timm.safetensors"), "timm", image_size=(16, 48))
    assert "positions: the sin-cos table, for 2 x 6 patches, resized from 4 x 4\n" in told
    model = eval(told.partition("to load it: ")[2], {"timm": timm}).eval()
    wanted = resample_abs_pos_embed(load_file(same)["pos_embed"], [2, 6], old_size=[4, 4])
    torch.testing.assert_close(model.pos_embed.detach(), wanted)
    larger = tiny_config("data.image_size=[16,48]", "model.positions_grid=[4,4]")
    peer = build_objective(larger).eval()
    peer.load_state_dict(objective.state_dict())
    images = images_of(larger)
    with torch.no_grad():
        features = model.forward_features(pixels_of(images, larger))
    assert (features - whole_features(peer, images)).abs().max() < 1e-5
    with pytest.raises(
        ConfigError, match=r"data.image_size=\[20, 16\]; expected multiples of model.patch_size=8"
    ):
        export_weights(ours, str(tmp_path / "x.safetensors"), "timm", image_size=(20, 16))


@pytest.mark.parametrize("layout", ["fastmim", "mae"])
def test_resized_tables_are_known_again(layout, tiny_config, tmp_path):
    config = tiny_config("objective.norm_pix_loss=true")
    objective = random_objective(config)
    ours = str(saved(objective, config, tmp_path / "ours.safetensors"))
    out = str(tmp_path / "larger.safetensors")
    export_weights(ours, out, layout, image_size=(48, 64))
    if layout == "mae":
        import_weights(out, str(tmp_path / "again.safetensors"))
        out = str(tmp_path / "again.safetensors")
    weights = read_weights(out)
    assert weights.config.grid == (6, 8) and weights.config.model.positions_grid == (4, 4)
    assert weights.tensors.keys() == objective.state_dict().keys()
    # Once more resized, it is still the table of training that is resized; at its own size it is that table.
    assert weights.at_size((64, 64)).config.positions_grid == (4, 4)
    back = build_objective(weights.at_size((32, 32)).config)
    assert torch.equal(back.encoder.pos_embed, objective.encoder.pos_embed)
    assert torch.equal(back.decoder.pos_embed, objective.decoder.pos_embed)


def test_positions_of_another_grid_are_another_network(tiny_config, tmp_path):
    config = tiny_config("objective.norm_pix_loss=true")
    ours = str(saved(random_objective(config), config, tmp_path / "ours.safetensors"))
    export_weights(ours, str(tmp_path / "mae.pth"), "mae", image_size=(48, 48))
    with pytest.raises(ConfigError, match=r"model.positions_grid=\[2, 2\]: .*mae.pth has \[4, 4\]"):
        import_weights(
            str(tmp_path / "mae.pth"),
            str(tmp_path / "x.safetensors"),
            overrides=["model.positions_grid=[2,2]"],
        )
